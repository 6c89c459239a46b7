package config

import (
	"strings"
	"testing"
)

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

// A proxy without a password, and only for TLS. What is refused shows no password.
func TestProxy(t *testing.T) {
	const https = "https://hs.example.com"
	for _, c := range []struct{ url, proxy, want string }{
		{https, "", ""},
		{https, "http://proxy.example.com:3128", ""},
		{https, "https://[fd00::1]:3128/", ""},
		{"", "http://127.0.0.1:3128", ""},
		{https, "proxy.example.com:3128", "want http://HOST:PORT"},
		{https, "socks5://10.0.0.1:1080", "want http://HOST:PORT"},
		{https, "http://10.0.0.1/pac", "want http://HOST:PORT"},
		{https, "http://:3128", "want http://HOST:PORT"},
		{https, "http://user:password@10.0.0.1:3128", "forwarder"},
		{https, "http://user:password%@10.0.0.1:3128", "forwarder"},
		{"http://10.0.0.1:8080", "http://10.0.0.2:3128", "https:// headscale.url only"},
	} {
		cfg := Default()
		cfg.Headscale.URL, cfg.Headscale.Proxy = c.url, c.proxy
		err := cfg.Validate()
		switch {
		case c.want == "" && err != nil, c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
			t.Errorf("%s by %s: %v", c.url, c.proxy, err)
		case err != nil && (strings.Contains(err.Error(), "password@") || strings.Contains(err.Error(), "password%")):
			t.Errorf("the error shows the password: %v", err)
		}
	}
	if h := (Headscale{URL: https}); h.Dialed() != https {
		t.Errorf("dials %s", h.Dialed())
	}
	if h := (Headscale{URL: https, Proxy: "http://10.0.0.2:3128"}); h.Dialed() != h.Proxy {
		t.Errorf("dials %s", h.Dialed())
	}
}
