package config

import (
	"errors"
	"net/netip"
	"slices"
	"strconv"

	"github.com/headcni/headcni/internal/netset"
)

// Ranges are the networks of a node and its clusters, from the configuration alone (Network.Ranges) or with what Kubernetes says.
type Ranges struct {
	// Pods are this node's, Cluster those of all nodes of its cluster, Remote those of other clusters.
	Pods, Cluster, Remote []netip.Prefix
	Services              []netip.Prefix
}

// All are the cluster's, and other clusters'.
func (r Ranges) All() []netip.Prefix { return netset.Union(r.Pods, r.Cluster, r.Remote, r.Services) }

// Ranges are those that the configuration names.
func (n Network) Ranges() Ranges {
	return Ranges{
		Pods: n.PodCIDRs.Prefixes(), Cluster: n.ClusterCIDRs.Prefixes(), Remote: n.remote(), Services: n.ServiceCIDRs.Prefixes(),
	}
}

// remote are the ranges of other clusters, each once.
func (n Network) remote() []netip.Prefix {
	out := n.RemoteCIDRs.Prefixes()
	for _, c := range n.RemoteClusters {
		for _, p := range c.ranges().Prefixes() {
			if !slices.Contains(out, p) {
				out = append(out, p)
			}
		}
	}
	return out
}

// Outside returns the pod CIDRs of a node that the cluster CIDRs, where there are any, do not cover: other nodes would not know
// them as pods, and send to them in clear.
func (n Network) Outside(pods []netip.Prefix) []netip.Prefix {
	if len(n.ClusterCIDRs) == 0 {
		return nil
	}
	cluster := n.ClusterCIDRs.Prefixes()
	return slices.DeleteFunc(slices.Clone(pods), func(p netip.Prefix) bool { return netset.Covers(cluster, p) })
}

// ValidateRanges returns all faults that the configuration has with these ranges, joined, each with the key that it belongs to.
func (c Config) ValidateRanges(r Ranges) error {
	var v faults
	c.validateRanges(&v, r)
	return errors.Join(v...)
}

func (c Config) validateRanges(v *faults, r Ranges) {
	lists := []struct {
		key      string
		prefixes []netip.Prefix
	}{
		{"network.podCIDRs", r.Pods}, {"network.clusterCIDRs", r.Cluster}, {"network.remoteCIDRs", c.Network.RemoteCIDRs.Prefixes()}, {"network.serviceCIDRs", r.Services},
	}
	for _, l := range lists {
		for _, p := range l.prefixes {
			v.prefix(l.key, p)
		}
	}
	if mtu := c.Network.MTU; mtu != 0 && mtu < 1280 && slices.ContainsFunc(r.Pods, func(p netip.Prefix) bool { return p.Addr().Is6() }) {
		v.add("network.mtu", strconv.Itoa(mtu), "IPv6 pod CIDRs need at least 1280 bytes (RFC 8200 section 5)")
	}
	for _, s := range c.Network.RemoteCIDRs.Prefixes() {
		for _, p := range r.Pods {
			if netset.Covers([]netip.Prefix{p}, s) {
				v.add("network.remoteCIDRs", s.String(), "is inside network.podCIDRs "+p.String()+", whose addresses are this node's own pods'; no other cluster can have them")
			}
		}
	}
	for i, a := range r.Pods {
		for _, b := range r.Pods[:i] {
			if a.Overlaps(b) {
				v.add("network.podCIDRs", a.String(), "overlaps "+b.String()+"; give each family one CIDR of its own")
			}
		}
	}
	if host := c.Headscale.host(); host.IsValid() {
		for _, l := range lists {
			for _, p := range l.prefixes {
				if p.Contains(host) {
					v.add(l.key, p.String(), "holds Headscale's own address "+host.String()+": it could not be reached any more")
				}
			}
		}
	}
	for _, s := range r.Services {
		for _, l := range lists[:3] {
			for _, p := range l.prefixes {
				if p.Overlaps(s) {
					v.add(l.key, p.String(), "overlaps the service CIDR "+s.String()+"; pods and services need ranges of their own")
				}
			}
		}
	}
	c.validateRemote(v, r)
}
