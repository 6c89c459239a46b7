package nodeview

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/kube"
	"github.com/headcni/headcni/pkg/reconcile"
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

// askPatience is how long a daemon that has just started waits for the API server's word before it goes by what was known last.
const askPatience = 10 * time.Second

// Usable says why the node cannot go by l yet, nil where it can. waited is for how long the daemon has run. A Node that was made anew while the machine was off gets
// other pod CIDRs, and a pod with an address of the former ones is reached by nobody: so the API server is heard first, where it answers. It does no I/O.
func (l LastKnown) Usable(v *View, waited time.Duration) error {
	fresh := v.Synced && v.Node != nil && len(v.Node.Spec.PodCIDRs) == 0 && v.Node.Spec.PodCIDR == ""
	switch {
	case len(l.PodCIDRs) == 0:
		return v.ErrNoCIDR(waited)
	case !v.Synced && v.Err == nil && waited < askPatience:
		return reconcile.Waiting(fmt.Sprintf("asks the API server whether this node's pod CIDRs are %v still", l.PodCIDRs))
	case fresh && waited < cidrPatience:
		return v.ErrNoCIDR(waited)
	}
	return nil
}

// WithoutVacated drops the former CIDRs that hold no live address.
func (l LastKnown) WithoutVacated(live []netip.Addr) LastKnown {
	l.Leaving = slices.DeleteFunc(slices.Clone(l.Leaving), func(p netip.Prefix) bool { return !slices.ContainsFunc(live, p.Contains) })
	return l
}
