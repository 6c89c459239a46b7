package tailscale

import (
	"net/netip"
	"slices"

	"github.com/headcni/headcni/internal/netset"
)

// NAT is what is between a node and the others, by what tailscaled's own endpoints show.
type NAT string

const (
	// NATNone: others see an address that the host has itself.
	NATNone NAT = "none"
	// NATEasy: the router keeps the port.
	NATEasy NAT = "easy"
	// NATHard: the router gives another port, perhaps another one for each peer.
	NATHard NAT = "hard"
	// NATUnknown: nobody has told tailscaled how it is seen from outside. No relay was reached by UDP.
	NATUnknown NAT = "unknown"
)

// NAT compares the endpoints that tailscaled tells its peers with the host's own networks. outside is how others see it,
// zero where that is not known. Only IPv4 counts: nobody translates IPv6.
func (s Status) NAT(host []netip.Prefix) (nat NAT, outside netip.AddrPort) {
	own := func(a netip.Addr) bool { return netset.Contains(host, a) }
	var ports []uint16 // that it listens on
	public := false
	for _, e := range s.Endpoints {
		if own(e.Addr()) {
			ports = append(ports, e.Port())
			public = public || e.Addr().Is4() && !e.Addr().IsPrivate()
		}
	}
	nat = NATUnknown
	if public {
		nat = NATNone
	}
	for _, e := range s.Endpoints {
		switch {
		case !e.Addr().Is4() || own(e.Addr()):
		case !slices.Contains(ports, e.Port()):
			return NATHard, e
		case nat != NATEasy:
			nat, outside = NATEasy, e
		}
	}
	return nat, outside
}
