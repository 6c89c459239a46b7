package nodestatus

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/headcni/headcni/pkg/reconcile"
)

// Print writes the status for people, with the parts where one of them has an error.
func (s Status) Print(out io.Writer) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	ready := "ready"
	if !s.Ready {
		ready = "NOT READY"
	}
	fmt.Fprintf(w, "node\t%s, %s mode, %s (MTU %d), headcni %s\n", ready, orUnknown(s.Mode), orUnknown(s.Tun), s.TunMTU, s.Version)
	if s.SmallPathBytes != 0 {
		fmt.Fprintf(w, "path\tto %s carries %d bytes: TCP of pods is clamped\n", s.SmallPath, s.SmallPathBytes)
	}
	if s.GuardTest != "" || len(s.Dropped) > 0 {
		fmt.Fprintf(w, "guard\t%s\n", s.guard())
	}
	if s.Policy != nil {
		s.Policy.print(w)
	}
	if f := s.FastPath; f != nil {
		text := fmt.Sprintf("between %d links of pods, for flows that stand", f.Links)
		if f.Why != "" {
			text = "none: " + f.Why
		}
		fmt.Fprintf(w, "fast path\t%s\n", text)
	}
	if p := s.PeerMTU; p != nil {
		text := fmt.Sprintf("%d of %d paths to nodes with pods carry more than %d bytes", p.Peers, p.Of, s.TunMTU)
		if p.Peers > 0 {
			text += fmt.Sprintf(", up to %d", p.Bytes)
		}
		fmt.Fprintf(w, "peer MTU\t%s\n", text)
	}
	if t := s.Tailnet; t == nil {
		fmt.Fprintln(w, "tailnet\ttailscaled does not answer")
	} else {
		fmt.Fprintf(w, "tailnet\t%s as %s %s at %s, tailscaled %s, key %s\n", t.State, orUnknown(t.Name), join(t.IPs), orUnknown(t.ControlURL), t.Version, expiry(t.KeyExpiry))
		if t.Outside.IsValid() {
			fmt.Fprintf(w, "outside\t%s, %s NAT\n", t.Outside, t.NAT)
		}
		for _, h := range t.Health {
			fmt.Fprintf(w, "\t! %s\n", h)
		}
	}
	for i, text := range s.Names {
		fmt.Fprintf(w, "%s\t! %s\n", []string{"names", ""}[min(i, 1)], text)
	}
	for _, c := range s.PodCIDRs {
		if s.Tailnet == nil {
			fmt.Fprintf(w, "pods\t%s\n", c.CIDR)
			continue
		}
		fmt.Fprintf(w, "pods\t%s %s, %s\n", c.CIDR, yes(c.Advertised, "advertised"), yes(c.Approved, "approved"))
	}
	for _, c := range s.Services {
		leads := "stands by, or Headscale has not told it more"
		if c.Approved {
			leads = "leads the tailnet there"
		}
		fmt.Fprintf(w, "services\t%s %s, %s\n", c.CIDR, yes(c.Advertised, "advertised"), leads)
	}
	if t := s.Tailnet; t != nil && len(t.Peers) > 0 {
		fmt.Fprintln(w, "\npeer\tpath\taddress\tpods")
		for _, p := range t.Peers {
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", p.Name, strings.TrimSpace(p.Path+" "+p.Endpoint), join(p.IPs), join(p.PodCIDRs))
		}
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if !s.Ready || slices.ContainsFunc(s.Parts, func(p reconcile.Status) bool { return !p.OK }) {
		fmt.Fprintln(out)
		s.PrintParts(out)
	}
	return nil
}

// maxUnknown is how many pods that wait for their policies are named.
const maxUnknown = 5

func (p *Policy) print(w io.Writer) {
	if !p.InForce {
		fmt.Fprintln(w, "policy\tNOT in force")
		return
	}
	text := fmt.Sprintf("in force: %d in the cluster, %d addresses of this node's pods isolated", p.Policies, p.Isolated)
	if p.Stale {
		text += ", as the API server last said before this daemon's start"
	}
	fmt.Fprintf(w, "policy\t%s\n", text)
	for i, u := range p.Unknown {
		if i == maxUnknown {
			fmt.Fprintf(w, "\t! and %d more pods\n", len(p.Unknown)-i)
			break
		}
		fmt.Fprintf(w, "\t! %s waits since %s: %s\n", u.Pod, u.Since.Format(time.TimeOnly), u.Why)
	}
}

// guard says what was dropped, what is most first, and whether the guard works.
func (s Status) guard() string {
	reasons := slices.SortedFunc(maps.Keys(s.Dropped), func(a, b string) int {
		return cmp.Or(cmp.Compare(s.Dropped[b], s.Dropped[a]), cmp.Compare(a, b))
	})
	out := "nothing dropped"
	for i, r := range reasons {
		if i == 0 {
			out = "dropped"
		} else {
			out += ","
		}
		out += fmt.Sprintf(" %d %s", s.Dropped[r], r)
	}
	if s.GuardTest != "" {
		out += "; " + s.GuardTest
	}
	return out
}

// PrintParts writes a line for each part.
func (s Status) PrintParts(out io.Writer) {
	for _, p := range s.Parts {
		text := "ok"
		if !p.OK {
			text = strings.TrimSpace(p.Error + "  " + p.IDs())
		}
		fmt.Fprintf(out, "%-10s %s\n", p.Name, text)
	}
}

func join[T netip.Addr | netip.Prefix](v []T) string {
	var out []string
	for _, x := range v {
		out = append(out, fmt.Sprint(x))
	}
	return strings.Join(out, " ")
}

func yes(b bool, what string) string {
	if b {
		return what
	}
	return "NOT " + what
}

func orUnknown(s string) string {
	if s == "" {
		return "unknown"
	}
	return s
}

func expiry(t *time.Time) string {
	if t == nil {
		return "never expires"
	}
	return "expires " + t.Format(time.RFC3339)
}
