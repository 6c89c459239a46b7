package nodeview

import (
	"net/netip"
	"slices"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/kube"
)

// LastKnown is the last answer of Kubernetes, saved for a boot without the API server.
type LastKnown struct {
	// Node is the name of the Node that it is about. With another name the node is a different one to Kubernetes.
	Node     string         `json:"node"`
	PodCIDRs []netip.Prefix `json:"podCIDRs,omitempty"`
	// Leaving are former pod CIDRs that pods on this node still use.
	Leaving      []netip.Prefix `json:"leaving,omitempty"`
	ClusterCIDRs []netip.Prefix `json:"clusterCIDRs,omitempty"`
	ServiceCIDRs []netip.Prefix `json:"serviceCIDRs,omitempty"`
	// Services are the routes to services that the controller has this node advertise.
	Services []netip.Prefix `json:"services,omitempty"`
}

// Update merges in what the view says of the Node of this name. It does no I/O.
func (l LastKnown) Update(v *View, node string) (LastKnown, error) {
	if l.Node != node {
		l = LastKnown{Node: node, Leaving: netset.Union(l.PodCIDRs, l.Leaving)}
	}
	if v.ServiceCIDRs != nil {
		l.ServiceCIDRs = v.ServiceCIDRs
	}
	if !v.Synced {
		return l, nil
	}
	l.ClusterCIDRs = v.PodCIDRs
	if v.Node == nil {
		return l, nil
	}
	if said, _, err := kube.ViewOf(v.Node); err == nil { // a damaged one is written anew
		l.Services = said.Services
	}
	now, err := kube.PodCIDRs(v.Node)
	if err != nil || len(now) == 0 {
		return l, err
	}
	l.Leaving = netset.Without(netset.Union(l.Leaving, netset.Without(l.PodCIDRs, now)), now)
	l.PodCIDRs = now
	return l, nil
}

// WithoutVacated drops the former CIDRs that hold no live address.
func (l LastKnown) WithoutVacated(live []netip.Addr) LastKnown {
	l.Leaving = slices.DeleteFunc(slices.Clone(l.Leaving), func(p netip.Prefix) bool { return !slices.ContainsFunc(live, p.Contains) })
	return l
}
