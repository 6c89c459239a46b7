package plugin

import (
	"context"
	"net/netip"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/headcni/headcni/pkg/config/netconf"
)

// Addresses is an IPAM plugin, bound to one request.
type Addresses interface {
	// Add takes addresses for the attachment.
	Add(ctx context.Context) (Given, error)
	// Del gives them back and says which. There may be none.
	Del(ctx context.Context) ([]netip.Addr, error)
	// Check fails unless the attachment holds want.
	Check(ctx context.Context, want []netip.Addr) error
	upkeep
}

type upkeep interface {
	// GC gives back what attachments hold that are not to be kept.
	GC(ctx context.Context, keep func(containerID, ifName string) bool) error
	// Status fails if Add would.
	Status(ctx context.Context) error
}

// Given is what an IPAM plugin answers.
type Given struct {
	IPs    []GivenIP
	Routes []*types.Route
	DNS    types.DNS
}

// GivenIP is an address and its gateway, if there is one.
type GivenIP struct {
	Addr    netip.Addr
	Gateway netip.Addr
}

// addressesFor chooses: headcni-ipam is part of this program, everything else is a program of its own.
func addressesFor(links Links, node Node) func(*Request) (Addresses, error) {
	return func(r *Request) (Addresses, error) {
		if t := r.Config.IPAM.Type; t != netconf.IPAMType {
			return newDelegate(r, "ipam.type", t, r.Stdin)
		}
		return newPool(r, links, node)
	}
}
