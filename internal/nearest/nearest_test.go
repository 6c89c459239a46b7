package nearest

import "testing"

func TestKey(t *testing.T) {
	known := []string{"auth_key", "args", "cniVersion", "gate", "headscale_url", "ipMasq", "ipam", "log_level", "mtu", "name", "pod_cidr", "runtimeConfig", "type"}
	for mistyped, want := range map[string]string{
		"mut": "mtu", "MTU": "mtu", "mtuu": "mtu", "podCIDR": "pod_cidr", "pod-cidr": "pod_cidr", "pod_cidrs": "pod_cidr", "authkey": "auth_key",
		"headscale": "headscale_url", "headscale_addr": "headscale_url", "loglvl": "log_level", "cniversion": "cniVersion", "runtimeconf": "runtimeConfig",
		"ipmask": "ipMasq", "nme": "name", "tpye": "type",
		"deviceID": "", "pciBusID": "", "cniArgs": "", "ipamConfig": "", "vlan": "", "isGateway": "", "bridge": "", "ips": "", "mac": "", "resourceName": "",
		"a": "", "": "", "k8s.v1.cni.cncf.io/x": "",
	} {
		if got := Key(mistyped, known); got != want {
			t.Errorf("%q: got %q, want %q", mistyped, got, want)
		}
	}
	if got := Key("anything", nil); got != "" {
		t.Errorf("nothing is known, and yet %q", got)
	}
}

func TestDistance(t *testing.T) {
	for _, tt := range []struct {
		a, b string
		want int
	}{
		{"", "", 0}, {"", "abc", 3}, {"abc", "", 3}, {"abc", "abc", 0}, {"abc", "abd", 1}, {"abc", "acb", 1}, {"abc", "ab", 1}, {"abc", "xabc", 1},
		{"strategie", "strategy", 2}, {"ca", "abc", 3}, {"kitten", "sitting", 3},
	} {
		if got, back := distance(tt.a, tt.b), distance(tt.b, tt.a); got != tt.want || back != tt.want {
			t.Errorf("%q, %q: got %d and %d, want %d", tt.a, tt.b, got, back, tt.want)
		}
	}
}
