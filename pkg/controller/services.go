package controller

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/dns/records"
	"github.com/headcni/headcni/pkg/headscale"
	"github.com/headcni/headcni/pkg/kube"
)

const (
	// checkServices is that the tailnet reaches services where it is to.
	checkServices = "services"
	// rangesCheck is how often the ranges of services are asked for.
	rangesCheck = 10 * time.Minute
	// maxNamed is how many addresses of single Services the tailnet is told of: each is a route on every device, and in an annotation of
	// each Node that leads there, and whoever may make Services can name them.
	maxNamed = 200
)

// serving is what the tailnet is to reach of the cluster's services, and by whom. Its zero value is nothing.
type serving struct {
	// Ranges are those of all services: within them no Node has an approved route but those that are chosen.
	Ranges []netip.Prefix `json:"ranges,omitempty"`
	// Routes are the ranges themselves, or single addresses in them.
	Routes []netip.Prefix           `json:"routes,omitempty"`
	By     config.AdvertiseServices `json:"-"`
}

// chooses reports whether a Node is to lead there.
func (s serving) chooses(n node) bool { return s.By.Selects(n.labels) }

// serving finds out what the tailnet is to reach, and what is lacking for that. What cannot be known now is as it was: an API server that
// does not answer takes nothing from the tailnet. known is false where that is so.
func (c *Controller) serving(ctx context.Context, nodes []node, was serving) (s serving, lacking []finding, known bool) {
	a := c.cfg.Network.AdvertiseServices
	if len(a.NodeSelector) == 0 {
		return serving{}, nil, true
	}
	s, known = serving{was.Ranges, was.Routes, a}, true
	lacks := func(format string, args ...any) {
		lacking = append(lacking, finding{checkServices, "network.advertiseServices: " + fmt.Sprintf(format, args...)})
	}
	ranges, err := c.serviceRanges(ctx, nodes)
	switch {
	case err == nil:
		s.Ranges = ranges
	case errors.As(err, new(unusable)):
		lacks("%s", strings.ReplaceAll(err.Error(), "\n", "; "))
		return serving{Ranges: s.Ranges, By: a}, lacking, true
	default:
		known = false
		if len(s.Ranges) == 0 {
			lacks("%s", strings.ReplaceAll(err.Error(), "\n", "; "))
		}
	}
	if a.Only == "" {
		s.Routes = s.Ranges
	} else if named, more, ok := c.namedServices(ctx, s.Ranges); !ok {
		known = false
	} else {
		if s.Routes = named; more > 0 {
			lacks("%d more addresses of Services with the annotation %s than the %d that the tailnet is told of: the youngest are left out", more, kube.TailnetName, maxNamed)
		}
	}
	if !slices.ContainsFunc(nodes, s.chooses) {
		var labels []string
		for _, key := range slices.Sorted(maps.Keys(a.NodeSelector)) {
			labels = append(labels, key+"="+a.NodeSelector[key])
		}
		lacks("no Node has the labels %s, so that the tailnet reaches no Service: kubectl label node NODE %s", strings.Join(labels, ","), strings.Join(labels, " "))
	}
	return s, lacking, known
}

// unusable are ranges that are known, and that no route may lead to.
type unusable struct{ error }

// serviceRanges are those of the configuration, else what Kubernetes says.
func (c *Controller) serviceRanges(ctx context.Context, nodes []node) ([]netip.Prefix, error) {
	r := c.cfg.Network.Ranges()
	if len(r.Services) == 0 {
		if c.now().Sub(c.rangesAt) >= rangesCheck {
			ctx, cancel := context.WithTimeout(ctx, apiTimeout)
			defer cancel()
			found, err := kube.ServiceRanges(ctx, c.client)
			if err == nil && len(found) == 0 {
				err = errors.New("Kubernetes names none")
			}
			if err != nil {
				return nil, fmt.Errorf("the ranges of services are not known: %w; set network.serviceCIDRs (Helm: config.network.serviceCIDRs)", err)
			}
			c.rangesOf, c.rangesAt = found, c.now()
		}
		r.Services = c.rangesOf
	}
	r.Cluster = observation{ranges: r.Cluster, nodes: nodes}.podRanges()
	own := c.cfg // a fault in what is said of other clusters, which each node refuses, takes nothing from who reaches this one's services
	own.Network.RemoteCIDRs, own.Network.RemoteClusters = nil, nil
	if err := own.ValidateRanges(r); err != nil {
		return nil, unusable{err}
	}
	return netset.Union(r.Services), nil
}

// namedServices are the addresses of the Services that have a name in the tailnet, and how many are left out. ok is false before the
// Services are read.
func (c *Controller) namedServices(ctx context.Context, ranges []netip.Prefix) (routes []netip.Prefix, more int, ok bool) {
	c.mu.Lock()
	services, known := slices.Collect(maps.Values(c.services)), c.services != nil
	c.mu.Unlock()
	if !known {
		return nil, 0, false
	}
	had, err := c.recordsHad(ctx)
	if err != nil {
		return nil, 0, false
	}
	list, _ := records.Accept(services, c.nodeNames, had)
	for _, s := range list {
		for _, ip := range s.IPs {
			if p := netip.PrefixFrom(ip, ip.BitLen()); netset.Covers(ranges, p) {
				routes = append(routes, p)
			}
		}
	}
	if more = len(routes) - maxNamed; more > 0 {
		routes = routes[:maxNamed]
	}
	return netset.Union(routes), more, true
}

// leads says which routes to services each Node has approved: those that are chosen have all of them, but for who is cordoned or not
// ready. Where that is so of all, it is rather Kubernetes' fault than theirs, and none loses its routes.
func (o observation) leads(claims map[string]headscale.Node, granted map[string]grant) map[string][]netip.Prefix {
	chosen := slices.DeleteFunc(slices.Clone(o.nodes), func(n node) bool {
		_, joined := claims[n.name]
		return !joined || n.leaving || granted[n.name].why != "" || !o.serve.chooses(n)
	})
	isFit := func(n node) bool { return n.fit }
	anyFit := slices.ContainsFunc(chosen, isFit)
	out := map[string][]netip.Prefix{}
	for _, n := range chosen {
		if n.fit || !anyFit {
			out[n.name] = o.serve.Routes
		}
	}
	return out
}

// leftOf are the routes that a node of the tailnet has, or is to have, by our approval: what we approved stays in the memory until it is
// seen to be gone.
func leftOf(was, want, approved []netip.Prefix) []netip.Prefix {
	out := slices.Clone(want)
	for _, r := range was {
		if slices.Contains(approved, r) && !slices.Contains(out, r) {
			out = append(out, r)
		}
	}
	return out
}
