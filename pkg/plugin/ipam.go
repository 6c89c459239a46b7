package plugin

import (
	"context"
	"net/netip"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/headcni/headcni/pkg/config/netconf"
)

// IPAM is an IPAM plugin, bound to one request.
type IPAM interface {
	// Add takes addresses for the attachment.
	Add(ctx context.Context) (IPAMResult, error)
	// Del gives them back and says which. There may be none.
	Del(ctx context.Context) ([]netip.Addr, error)
	// Check fails unless the attachment holds want.
	Check(ctx context.Context, want []netip.Addr) error
	// GC gives back what attachments hold that are not to be kept.
	GC(ctx context.Context, keep func(containerID, ifName string) bool) error
	// Status fails if Add would.
	Status(ctx context.Context) error
}

// IPAMResult is the answer of an IPAM plugin.
type IPAMResult struct {
	IPs    []IPAMAddress
	Routes []*types.Route
	DNS    types.DNS
}

// IPAMAddress is an address and its gateway, if there is one.
type IPAMAddress struct {
	Addr    netip.Addr
	Gateway netip.Addr
}

// chooseIPAM tells headcni-ipam, which is part of this program, from every other IPAM plugin, which is a program of its own.
func chooseIPAM(links Links, node Node) func(*Request) (IPAM, error) {
	return func(r *Request) (IPAM, error) {
		if t := r.Config.IPAM.Type; t != netconf.IPAMType {
			return newDelegate(r, "ipam.type", t, r.Stdin)
		}
		return newPool(r, links, node)
	}
}
