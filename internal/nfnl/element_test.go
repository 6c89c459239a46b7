package nfnl

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
)

// The kernel's list of a set of intervals has a beginning and an end for each.
func TestWithin(t *testing.T) {
	element := func(a string, end bool) Element {
		e := Element{Key: string(netip.MustParseAddr(a).AsSlice())}
		if end {
			e.Flags = ElemEnd
		}
		return e
	}
	set := []Element{element("0.0.0.0", true), element("10.245.0.0", true), element("10.244.0.0", false), element("10.60.0.0", false), element("10.64.0.0", true)}
	for a, want := range map[string]bool{
		"10.244.0.0": true, "10.244.255.255": true, "10.245.0.0": false, "10.63.255.255": true, "10.64.0.0": false, "9.0.0.0": false, "255.0.0.0": false, "fd00::1": false,
	} {
		if got := Within(set, netip.MustParseAddr(a)); got != want {
			t.Errorf("%s: %v", a, got)
		}
	}
	if Within(nil, netip.MustParseAddr("10.244.1.7")) || Within(set, netip.Addr{}) {
		t.Error("what is not there is within")
	}
}

func TestPrefixes(t *testing.T) {
	for _, text := range []string{"", "10.244.0.0/16", "0.0.0.0/0", "10.0.0.0/16 10.1.0.0/16 10.3.0.7/32", "0.0.0.0/8 224.0.0.0/3", "fd00:244::/32 fd00:245::/64", "::/0"} {
		var want []netip.Prefix
		for _, p := range strings.Fields(text) {
			want = append(want, netip.MustParsePrefix(p))
		}
		elements := Intervals(want)
		slices.Reverse(elements) // the kernel lists them in some order
		if got, ok := Prefixes(elements); !ok || !slices.Equal(got, want) {
			t.Errorf("%s: %s, %t", text, got, ok)
		}
	}
	at := func(a string, flags uint32) Element {
		return Element{Key: string(netip.MustParseAddr(a).AsSlice()), Flags: flags}
	}
	if got, ok := Prefixes([]Element{at("0.0.0.0", ElemEnd), at("10.0.0.0", 0), at("10.0.0.4", ElemEnd)}); !ok || len(got) != 1 {
		t.Errorf("with an end that means nothing: %s, %t", got, ok)
	}
	for what, set := range map[string][]Element{
		"a range that is no prefix": {at("10.0.0.1", 0), at("10.0.0.4", ElemEnd)},
		"two beginnings":            {at("10.0.0.0", 0), at("10.0.1.0", 0), at("10.0.2.0", ElemEnd)},
		"an end alone":              {at("10.0.0.0", ElemEnd)},
		"more than a key":           {{Key: string([]byte{10, 0, 0, 0}), Odd: true}, at("10.0.1.0", ElemEnd)},
		"no address":                {{Key: "hc"}},
	} {
		if got, ok := Prefixes(set); ok {
			t.Errorf("%s: %s", what, got)
		}
	}
}
