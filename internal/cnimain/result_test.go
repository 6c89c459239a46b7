package cnimain

import (
	"bytes"
	"encoding/json"
	"net"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/google/go-cmp/cmp"
)

func cidr(t *testing.T, s string) net.IPNet {
	t.Helper()
	ip, n, err := net.ParseCIDR(s)
	if err != nil {
		t.Fatal(err)
	}
	return net.IPNet{IP: ip, Mask: n.Mask}
}

// TestPrintResult compares with the CNI library's own form. What was new in 1.1.0 is only in results of it.
func TestPrintResult(t *testing.T) {
	results := func(v1_1 bool) map[string]*types100.Result {
		full := &types100.Result{
			Interfaces: []*types100.Interface{{Name: "hc0", Mac: "02:00:00:00:00:01"}, {Name: "eth0", Sandbox: "/run/netns/a \"b\""}},
			IPs: []*types100.IPConfig{
				{Interface: types100.Int(0), Address: cidr(t, "10.244.0.2/32"), Gateway: net.ParseIP("169.254.1.1")},
				{Address: cidr(t, "fd00::2/128")},
			},
			Routes: []*types.Route{{Dst: cidr(t, "0.0.0.0/0"), GW: net.IPv4(169, 254, 1, 1)}, {Dst: cidr(t, "::/0")}},
			DNS:    types.DNS{Nameservers: []string{"100.100.100.100"}, Domain: "tail.net", Search: []string{"a", "b"}, Options: []string{"ndots:5"}},
		}
		if v1_1 {
			full.Interfaces[0].Mtu, full.Interfaces[1].SocketPath, full.Interfaces[1].PciID = 1280, "/s", "0000:00:1f.6"
			full.Routes[0].MTU, full.Routes[0].AdvMSS, full.Routes[0].Priority = 1200, 1160, 7
			full.Routes[1].Table, full.Routes[1].Scope = types100.Int(0), types100.Int(253)
		}
		return map[string]*types100.Result{"full": full, "empty": {}, "address": {IPs: full.IPs[1:]}, "domain": {DNS: types.DNS{Domain: "x"}}}
	}
	for _, version := range []string{"0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		for name, r := range results(version == "1.1.0") {
			converted, err := r.GetAsVersion(version)
			if err != nil {
				t.Fatal(err)
			}
			var want, got bytes.Buffer
			if err := converted.PrintTo(&want); err != nil {
				t.Fatal(err)
			}
			if err := PrintResult(&got, version, r); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(object(t, &want), object(t, &got)); diff != "" {
				t.Errorf("%s %s (-library +ours):\n%s", version, name, diff)
			}
		}
	}
	var old, reduced bytes.Buffer
	for out, r := range map[*bytes.Buffer]*types100.Result{&old: results(true)["full"], &reduced: results(false)["full"]} {
		if err := PrintResult(out, "1.0.0", r); err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff(reduced.String(), old.String()); diff != "" {
		t.Errorf("fields of 1.1.0 in a result of 1.0.0:\n%s", diff)
	}
}

// object reads a result; an empty dns, which the library prints before 1.0.0, is as good as none.
func object(t *testing.T, b *bytes.Buffer) map[string]any {
	t.Helper()
	m := map[string]any{}
	if err := json.Unmarshal(b.Bytes(), &m); err != nil {
		t.Fatalf("%v in %s", err, b)
	}
	if dns, ok := m["dns"].(map[string]any); ok && len(dns) == 0 {
		delete(m, "dns")
	}
	return m
}
