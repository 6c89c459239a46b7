package plugin

import "testing"

// FuzzArgs: whatever stands in CNI_ARGS, it is refused or its addresses are addresses.
func FuzzArgs(f *testing.F) {
	for _, s := range []string{"", "IgnoreUnknown=1;K8S_POD_NAMESPACE=a;K8S_POD_NAME=b", "IP=10.244.1.9,fd00::9;MAC=02:00:00:00:00:01", "IP=", "=;=", "MAC=ff"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		a, err := parseArgs(s)
		if err != nil {
			return
		}
		for _, ip := range a.IPs {
			if !ip.IsValid() {
				t.Errorf("%q: an address that is none", s)
			}
		}
		if n := len(a.MAC); n != 0 && n != 6 {
			t.Errorf("%q: a hardware address of %d bytes", s, n)
		}
	})
}
