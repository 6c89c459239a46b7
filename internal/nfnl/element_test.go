package nfnl

import (
	"net/netip"
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
