package nodeview

import (
	"net/netip"
	"slices"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/kube"
)

// LastKnown is what Kubernetes said last, kept for a boot without its API server.
type LastKnown struct {
	// Node is whose it is: under another name the node is another one to Kubernetes.
	Node     string         `json:"node"`
	PodCIDRs []netip.Prefix `json:"podCIDRs,omitempty"`
	// Leaving are former pod CIDRs whose pods still run here.
	Leaving      []netip.Prefix `json:"leaving,omitempty"`
	ClusterCIDRs []netip.Prefix `json:"clusterCIDRs,omitempty"`
	ServiceCIDRs []netip.Prefix `json:"serviceCIDRs,omitempty"`
}

// Update takes over what the view says of the Node of this name. It does no I/O.
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
	now, err := kube.PodCIDRs(v.Node)
	if err != nil || len(now) == 0 {
		return l, err
	}
	l.Leaving = netset.Without(netset.Union(l.Leaving, netset.Without(l.PodCIDRs, now)), now)
	l.PodCIDRs = now
	return l, nil
}

// WithoutVacated leaves out the former CIDRs that no live address is in any more.
func (l LastKnown) WithoutVacated(live []netip.Addr) LastKnown {
	l.Leaving = slices.DeleteFunc(slices.Clone(l.Leaving), func(p netip.Prefix) bool { return !slices.ContainsFunc(live, p.Contains) })
	return l
}
