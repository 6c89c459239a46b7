package why

import (
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/headcni/headcni/internal/printable"
	"github.com/headcni/headcni/pkg/doctor"
	"github.com/headcni/headcni/pkg/findings"
)

// Led is a range of pods, and how far the way to it is there.
type Led struct {
	Range netip.Prefix `json:"range"`
	Node  string       `json:"node"`
	// Advertised: its node's tailscaled offers it. Approved: Headscale routes it there, as the node says or another has been told.
	Advertised bool `json:"advertised"`
	Approved   bool `json:"approved"`
	// Unseen: whether it is approved another node would know, and none was asked.
	Unseen bool `json:"unseen,omitempty"`
	// In are the other nodes whose kernel leads there by their tunnel. Lacking are those whose does not, with what it does instead.
	In      []string          `json:"in"`
	Lacking map[string]string `json:"lacking"`
}

// Routes are the ranges of all pods as all nodes know them.
type Routes struct {
	Version  string           `json:"version"`
	OK       bool             `json:"ok"`
	Findings []doctor.Finding `json:"findings"`
	Ranges   []Led            `json:"ranges"`
	// Silent are nodes that were not asked, with the reason.
	Silent map[string]string `json:"silent"`
}

// Lead is where this node's kernel leads packets to each of the addresses.
func Lead(to []netip.Addr) map[netip.Addr]Route {
	out := map[netip.Addr]Route{}
	for _, a := range to {
		out[a] = lookup(a, netip.Addr{}, "")
	}
	return out
}

// Ask are the addresses that kernels are asked for: one of each range.
func Ask(s doctor.Seen) (out []netip.Addr) {
	for _, l := range ledOf(s) {
		out = append(out, askFor(l.Range))
	}
	return out
}

// askFor is an address in a range that no pod has by itself: the network's.
func askFor(p netip.Prefix) netip.Addr { return p.Masked().Addr() }

// ledOf are the ranges of the nodes that were looked at, and of those that these know, by node and range.
func ledOf(s doctor.Seen) (out []Led) {
	known := func(p netip.Prefix) bool { return slices.ContainsFunc(out, func(l Led) bool { return l.Range == p }) }
	for _, n := range s.Nodes {
		if n.Status == nil {
			for _, p := range n.PodCIDRs {
				out = append(out, Led{Range: p, Node: n.Name})
			}
			continue
		}
		for _, p := range n.Status.PodCIDRs {
			out = append(out, Led{Range: p.CIDR, Node: n.Name, Advertised: p.Advertised, Approved: p.Approved})
		}
	}
	for _, n := range s.Nodes {
		if n.Status == nil || n.Status.Tailnet == nil {
			continue
		}
		for _, peer := range n.Status.Tailnet.Peers {
			for _, p := range peer.PodCIDRs {
				if !known(p) {
					out = append(out, Led{Range: p, Node: peer.Name})
				}
				for i := range out {
					if out[i].Range == p { // it would not have been told of it else
						out[i].Advertised, out[i].Approved = true, true
					}
				}
			}
		}
	}
	return out
}

// NewRoutes judges what nodes and their kernels said. It does no I/O.
func NewRoutes(version string, s doctor.Seen, kernels map[string]map[netip.Addr]Route, errs map[string]error) Routes {
	r := Routes{Version: version, OK: true, Findings: []doctor.Finding{}, Ranges: ledOf(s), Silent: map[string]string{}}
	for i := range r.Ranges {
		l := &r.Ranges[i]
		l.In, l.Lacking = []string{}, map[string]string{}
		for _, n := range s.Nodes {
			if n.Name == l.Node || n.Status == nil || errs[n.Name] != nil {
				continue
			}
			if route := kernels[n.Name][askFor(l.Range)]; route.Dev != "" && route.Dev == n.Status.Tun {
				l.In = append(l.In, n.Name)
			} else {
				l.Lacking[n.Name] = route.instead()
			}
		}
		l.Unseen = !l.Approved && len(l.In)+len(l.Lacking) == 0
		switch {
		case l.Unseen:
		case !l.Approved && l.Advertised:
			r.add(findings.NotApproved, l.Node, "%s is advertised and not approved", l.Range)
		case !l.Advertised:
			r.add(findings.NotReady, l.Node, "%s is not advertised", l.Range)
		default:
			for _, name := range slices.Sorted(maps.Keys(l.Lacking)) {
				r.add(findings.TunnelRoutes, name, "%s of %s: %s", l.Range, l.Node, l.Lacking[name])
			}
		}
	}
	for _, n := range s.Nodes {
		err := n.Err
		if err == nil {
			err = errs[n.Name]
		}
		if err != nil {
			r.OK, r.Silent[n.Name] = false, err.Error()
		}
	}
	return r
}

func (r *Routes) add(id findings.ID, where, format string, args ...any) {
	f := doctor.Found(id, where, "", fmt.Sprintf(format, args...))
	r.Findings = append(r.Findings, f)
	r.OK = r.OK && !f.Wrong()
}

// instead says where a packet goes that is not led into the tunnel.
func (r Route) instead() string {
	switch {
	case r.Error != "":
		return r.Error
	case r.Dev == "":
		return "the kernel does not say where"
	}
	return "by " + r.Dev
}

// Print writes a line for each range, and what is wrong.
func (r Routes) Print(out io.Writer, width int) error {
	b := &strings.Builder{}
	w := tabwriter.NewWriter(b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "RANGE\tNODE\tADVERTISED\tAPPROVED\tIN KERNELS OF")
	for _, l := range r.Ranges {
		approved := yesNo(l.Approved)
		if l.Unseen {
			approved = "not known"
		}
		where := fmt.Sprintf("%d of %d others", len(l.In), len(l.In)+len(l.Lacking))
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", l.Range, l.Node, yesNo(l.Advertised), approved, where)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	for _, f := range r.Findings {
		b.WriteString("\n" + printable.Fold(f.Where+"  ", 4, fmt.Sprintf("%s  %s: %s", f.ID, f.Title, f.Cause), width))
		b.WriteString(printable.Fold("  do  ", 6, f.Remedy, width))
	}
	for _, name := range slices.Sorted(maps.Keys(r.Silent)) {
		b.WriteString("\n" + printable.Fold(name+"  ", 4, "could not be asked: "+printable.Line(r.Silent[name]), width))
	}
	_, err := io.WriteString(out, b.String())
	return err
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}
