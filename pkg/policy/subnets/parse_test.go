package subnets

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/headcni/headcni/internal/netset"
)

func prefixes(text string) (out []netip.Prefix) {
	for _, s := range strings.Fields(text) {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

func text(list []netip.Prefix) string { return strings.Trim(fmt.Sprint(list), "[]") }

const taken = "10.244.0.0/16 10.96.0.0/12 fd00:244::/32 fd00:96::/112"

func TestParse(t *testing.T) {
	many := strings.Repeat("192.168.50.0/24,", 3)
	for i := range maxPrefixes + 5 {
		many += fmt.Sprintf("172.16.%d.0/24,", i)
	}
	for _, c := range []struct{ in, want, fault string }{
		{"", "", ""},
		{" , ,", "", ""},
		{"192.168.50.0/24,fd00:50::/64", "192.168.50.0/24 fd00:50::/64", ""},
		{" 192.168.50.0/24 , 192.168.50.7/32,\n192.168.50.0/24 ", "192.168.50.0/24 192.168.50.7/32", ""},
		{"192.168.50.0/24,nonsense", "192.168.50.0/24", `"nonsense" is no prefix`},
		{"192.168.50.7", "", "write 192.168.50.7/32"},
		{"fd00:50::7", "", "write fd00:50::7/128"},
		{"192.168.50.7/24", "", "write 192.168.50.0/24"},
		{"192.168.50.0/33", "", "is no prefix"},
		{"fe80::1%eth0", "", "is no prefix"},
		{"0.0.0.0/0,192.168.50.0/24", "192.168.50.0/24", "is an exit node"},
		{"::/0", "", "is an exit node"},
		{"0.0.0.0/1,128.0.0.0/1", "", "is too wide"},
		{"2000::/3", "", "is too wide"},
		{"127.0.0.0/8", "", "overlaps 127.0.0.0/8"},
		{"169.254.169.254/32", "", "overlaps 169.254.0.0/16"},
		{"::ffff:192.168.50.0/120", "", "overlaps ::ffff:0.0.0.0/96"},
		{"ff02::/16", "", "overlaps ff00::/8"},
		{"100.64.0.0/10", "", "the tailnet's own addresses"},
		{"100.100.100.100/32", "", "the tailnet's own addresses"},
		{"100.0.0.0/8", "", "the tailnet's own addresses"},
		{"fd7a:115c:a1e0::/64", "", "the tailnet's own addresses"},
		{"10.244.7.0/24", "", "overlaps the cluster's 10.244.0.0/16"},
		{"10.0.0.0/8", "", "overlaps the cluster's"},
		{"fd00:96::/112", "", "overlaps the cluster's fd00:96::/112"},
		{"192.168.50.0/24;192.168.51.0/24", "", "is no prefix"},
		{"\x1b[2J" + strings.Repeat("x", 300), "", `"\\x1b[2Jxx`},
		{many, "192.168.50.0/24", fmt.Sprintf("only the first %d", maxPrefixes)},
	} {
		named, faults := Parse(c.in, prefixes(taken))
		if got := text(named); c.in == many {
			if len(named) != maxPrefixes {
				t.Errorf("%d of many", len(named))
			}
		} else if got != c.want {
			t.Errorf("%q: %s, want %s", c.in, got, c.want)
		}
		if got := strings.Join(faults, "; "); (c.fault == "") != (got == "") || !strings.Contains(got, c.fault) || strings.Contains(got, "\x1b") || len(got) > 400 {
			t.Errorf("%q: %s, want %s", c.in, got, c.fault)
		}
	}
}

// FuzzParse: whatever somebody writes, nothing of the cluster's or the tailnet's is in what comes out, and nothing is opened wide.
func FuzzParse(f *testing.F) {
	for _, s := range []string{"192.168.50.0/24,fd00:50::/64", "0.0.0.0/0", "10.0.0.0/8,::/0", "1.2.3.4", ",,", "::ffff:10.244.0.0/112", "fe80::%x/64", "192.168.0.0/016"} {
		f.Add(s)
	}
	cluster := prefixes(taken)
	f.Fuzz(func(t *testing.T, in string) {
		named, faults := Parse(in, cluster)
		if len(named) > maxPrefixes || len(faults) > maxPrefixes+1 {
			t.Errorf("%d prefixes, %d faults", len(named), len(faults))
		}
		for _, p := range named {
			if _, hit := netset.Overlapping(cluster, p); hit || isTailnet(p) || p != p.Masked() || p.Bits() < 8 || p.Addr().Is4In6() {
				t.Errorf("%q: %s", in, p)
			}
		}
		if again, _ := Parse(in, cluster); text(again) != text(named) {
			t.Errorf("%q: %v, then %v", in, named, again)
		}
	})
}
