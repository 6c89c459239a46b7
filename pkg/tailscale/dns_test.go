package tailscale

import (
	"encoding/json"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

func TestDNS(t *testing.T) {
	var w wireDNS
	err := json.Unmarshal([]byte(`{"Routes":{"tailnet.test.":null,"Cluster.Local":[{"Addr":"10.96.0.10"}],"a.b.":[{"Addr":"1.1.1.1"},{"Addr":"https://x"}]},"Proxied":true,
		"ExtraRecords":[{"Name":"Web.tailnet.test","Type":"A","Value":"10.96.3.4"},{"Name":"web.tailnet.test.","Type":"AAAA","Value":"fd00::4"},
		{"Name":"untyped.x","Value":"10.0.0.1"},{"Name":"odd.x","Type":"A","Value":"fd00::1"},{"Name":"text.x","Type":"TXT","Value":"10.0.0.1"},{"Name":"bad.x","Type":"A","Value":"x"}]}`), &w)
	if err != nil {
		t.Fatal(err)
	}
	addr := netip.MustParseAddr
	want := DNS{Splits: []string{"a.b", "cluster.local"}, Records: map[string][]netip.Addr{
		"web.tailnet.test": {addr("10.96.3.4"), addr("fd00::4")}, "untyped.x": {addr("10.0.0.1")}}}
	if diff := cmp.Diff(want, w.dns(), cmpopts.EquateComparable(netip.Addr{})); diff != "" {
		t.Error(diff)
	}
}
