package config

import "testing"

func TestLasting(t *testing.T) {
	for url, want := range map[string]bool{
		"https://hs.example.com": true, "https://192.0.2.1:8443": true, "http://10.0.0.1:8080": true, "http://172.31.0.1": true, "http://192.168.1.1:8080": true,
		"http://127.0.0.1": true, "http://localhost:8080": true, "http://[fd00::1]:8080": true, "http://[::1]": true, "": true,
		"http://192.0.2.1:8080": false, "http://172.32.0.1": false, "http://hs.example.com:8080": false, "http://headscale.lan:8080": false,
		"http://10.0.0.1.example.com": false, "http://[2001:db8::1]": false, "http://100.64.0.1:8080": false, "http://169.254.1.1": false,
	} {
		if got := Lasting(url) == nil; got != want {
			t.Errorf("%q: %v", url, got)
		}
	}
}
