package sites

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/tailscale"
)

// settles is how long a pair is given to become direct.
const settles = 5 * time.Second

// BenchmarkPaths has pods talk that never did, one pair after the other: how soon there is an answer, and a direct path.
func BenchmarkPaths(b *testing.B) {
	w := newWorld(b, lab.Options{Modes: []string{config.ModeHost, config.ModeDaemon}})
	out := table(b)
	fmt.Fprintf(out, "\n| first answer, direct after, one TCP stream in Mb/s |")
	for _, p := range places[1:] {
		fmt.Fprintf(out, " %s |", p.name)
	}
	fmt.Fprintf(out, "\n%s\n", strings.Repeat("|---", len(places))+"|")
	for i, from := range w.pods[:len(w.pods)-1] {
		fmt.Fprintf(out, "| **%s** |%s", places[i].name, strings.Repeat(" |", i))
		for _, to := range w.pods[i+1:] {
			first, direct, err := meet(b, from, to)
			bps := 0.0
			if err == nil {
				bps, err = lab.Throughput(b.Context(), from, to, to.Addr(false), time.Second)
			}
			path := "relay"
			if direct != 0 {
				path = fmt.Sprintf("%.1f s", direct.Seconds())
			}
			if err != nil {
				b.Errorf("%s to %s: %v", from.Node.Name, to.Node.Name, err)
			}
			fmt.Fprintf(out, " %.2f s, %s, %.0f |", first.Seconds(), path, bps/1e6)
		}
		fmt.Fprintln(out)
	}
}

// meet returns how long the first answer took, and the direct path, 0 where there is none in time.
func meet(b *testing.B, from, to *lab.Pod) (first, direct time.Duration, err error) {
	b.Helper()
	api := tailscale.New(from.Node.Path(strings.TrimPrefix(from.Node.Socket(), "/var")))
	began := time.Now()
	for time.Since(began) < settles {
		if _, _, err = lab.Echo(b.Context(), from, to.Addr(false), 64); err != nil {
			continue // after the wait for an answer
		}
		if first == 0 {
			first = time.Since(began)
		}
		var st tailscale.Status
		if st, err = api.Status(b.Context()); err != nil {
			return first, 0, err
		}
		if slices.ContainsFunc(st.Peers, func(p tailscale.Peer) bool { return p.Name == to.Node.Name && p.CurAddr != "" }) {
			return first, time.Since(began), nil
		}
		time.Sleep(20 * time.Millisecond)
	}
	return first, 0, err
}
