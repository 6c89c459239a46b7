package netset

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
)

func prefixes(text string) (out []netip.Prefix) {
	for _, s := range strings.Fields(text) {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

func text(list []netip.Prefix) string { return strings.Trim(fmt.Sprint(list), "[]") }

func TestUnion(t *testing.T) {
	for _, c := range []struct{ a, b, want string }{
		{"", "", ""},
		{"10.1.0.0/16 10.0.0.0/16", "10.0.0.0/8", "10.0.0.0/8"},
		{"10.0.0.0/8", "10.0.0.0/16 10.255.0.0/16", "10.0.0.0/8"},
		{"10.0.0.0/17", "10.0.128.0/17", "10.0.0.0/17 10.0.128.0/17"}, // neighbours stay two
		{"fd00::/64 10.0.0.0/24", "10.0.0.5/24 fd00::/32", "10.0.0.0/24 fd00::/32"},
	} {
		if got := text(Union(prefixes(c.a), prefixes(c.b))); got != c.want {
			t.Errorf("%s and %s: %s, want %s", c.a, c.b, got, c.want)
		}
	}
	if got := Union([]netip.Prefix{{}}); len(got) != 0 {
		t.Errorf("the zero prefix: %v", got)
	}
}

func TestAggregate(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"", ""},
		{"10.244.1.0/24", "10.244.1.0/24"},
		{"10.244.1.0/24 10.244.0.0/24 10.244.3.0/24 10.244.2.0/24", "10.244.0.0/22"},
		{"10.244.1.0/24 10.244.2.0/24", "10.244.1.0/24 10.244.2.0/24"}, // neighbours without a common parent
		{"10.244.0.0/16 10.244.7.0/24", "10.244.0.0/16"},
		{"10.244.0.0/23 10.244.1.0/24 10.244.2.0/24", "10.244.0.0/23 10.244.2.0/24"},
		{"fd00::/65 fd00:0:0:0:8000::/65 10.0.0.0/24", "10.0.0.0/24 fd00::/64"},
	} {
		if got := text(Aggregate(prefixes(c.in))); got != c.want {
			t.Errorf("%s: %s, want %s", c.in, got, c.want)
		}
	}
	if got := text(Aggregate(append(prefixes("10.0.0.0/24"), netip.Prefix{}))); got != "10.0.0.0/24" {
		t.Errorf("beside the zero prefix: %s", got)
	}
}

func TestWithout(t *testing.T) {
	if got := text(Without(prefixes("10.2.0.0/16 10.1.0.0/16 10.1.1.0/24"), prefixes("10.1.0.0/16 10.9.0.0/16"))); got != "10.2.0.0/16 10.1.1.0/24" {
		t.Error(got)
	}
}

func TestOfFamily(t *testing.T) {
	all := prefixes("10.2.0.0/16 fd00::/32 10.1.0.0/16")
	if v4, v6 := text(OfFamily(all, false)), text(OfFamily(all, true)); v4 != "10.2.0.0/16 10.1.0.0/16" || v6 != "fd00::/32" {
		t.Error(v4, v6)
	}
}

func TestCovers(t *testing.T) {
	set := prefixes("10.244.0.0/16 fd00::/32")
	for p, want := range map[string]bool{
		"10.244.0.0/16": true, "10.244.9.0/24": true, "10.0.0.0/8": false, "10.245.0.0/24": false, "fd00:0:1::/48": true, "fd01::/48": false,
	} {
		if got := Covers(set, netip.MustParsePrefix(p)); got != want {
			t.Errorf("%s: %v", p, got)
		}
	}
}

func TestOverlapping(t *testing.T) {
	set := prefixes("10.244.0.0/16 fd00::/32")
	for p, want := range map[string]string{"10.0.0.0/8": "10.244.0.0/16", "fd00:0:1::/48": "fd00::/32", "10.1.0.0/16": ""} {
		if got, ok := Overlapping(set, netip.MustParsePrefix(p)); ok != (want != "") || ok && got.String() != want {
			t.Errorf("%s: %v, %v", p, got, ok)
		}
	}
}

// A Set says what the lists say that it stands for.
func TestSet(t *testing.T) {
	list := prefixes("10.0.0.0/8 10.1.2.0/24 10.1.2.128/25 192.168.7.0/24 0.0.0.0/5 fd00::/64 fd00:0:0:1::/64 2001:db8::1/128")
	s := NewSet(append(list, netip.Prefix{}, netip.MustParsePrefix("192.168.7.9/24"))...)
	for _, p := range prefixes("10.1.2.0/24 10.1.2.0/25 10.200.0.0/16 192.168.0.0/16 192.168.7.4/32 192.168.8.0/24 0.0.0.0/0 4.0.0.0/8 9.0.0.0/8 " +
		"172.16.0.0/12 fd00::/48 fd00::5/128 fd01::/48 ::/0 2001:db8::1/128 2001:db8::2/128 ::ffff:10.0.0.0/104") {
		_, want := Overlapping(list, p)
		if got, ok := s.Overlapping(p); ok != want || ok && !got.Overlaps(p) {
			t.Errorf("%s overlaps %s: %v, want %v", got, p, ok, want)
		}
		if got, ok := s.Covering(p); ok != Covers(list, p) || ok && (got.Bits() > p.Bits() || !got.Overlaps(p)) {
			t.Errorf("%s covers %s: %v", got, p, ok)
		}
	}
	if _, ok := NewSet().Overlapping(list[0]); ok {
		t.Error("nothing overlaps something")
	}
}
