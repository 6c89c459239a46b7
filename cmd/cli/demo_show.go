package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/headcni/headcni/internal/lab"
)

const (
	// burst is how long one throughput measurement sends; each path is measured rounds times, in turns.
	burst  = 1200 * time.Millisecond
	rounds = 2
	// fair is the least share of their nodes' throughput that pods must get. It is about 1 on a quiet machine, but two
	// seconds on a busy one prove little.
	fair = 0.5
	// watch is how long the pods are watched after a fault.
	watch = 2 * time.Second
	// backWithin bounds the wait for pods to talk again.
	backWithin = 30 * time.Second
)

// demo is the show.
type demo struct {
	*screen
	lab  *lab.Lab
	pods []*lab.Pod
}

// podNames names the pods, two for each node.
var podNames = []string{"web", "shop", "cart", "stock"}

func (d *demo) setUp(ctx context.Context) (err error) {
	d.heading("Set-up")
	d.lab, err = lab.New(ctx, lab.Options{
		Bin:   binDir(),
		Begin: func(what string) { d.now("%s ...", what) },
		Step:  func(what string, took time.Duration) { d.check(true, took, "%s", what) },
	})
	if err != nil {
		return err
	}
	for _, n := range d.lab.Nodes {
		addrs, err := n.TailnetAddrs()
		if err != nil {
			return err
		}
		d.detail("%s  %-11s  %-10s  %s, %s  pods %s, %s", n.Name, n.Mode+" mode", n.Tun, addrs[0], addrs[1], n.PodCIDRs[0], n.PodCIDRs[1])
	}
	var slowest time.Duration
	for i, name := range podNames {
		p, err := d.lab.Nodes[i/2].AddPod(ctx, name, lab.PodOptions{})
		if err != nil {
			return err
		}
		d.pods = append(d.pods, p)
		slowest = max(slowest, p.Setup)
	}
	d.check(true, slowest, "%d pods attached by the headcni plugin through libcni; the slowest took", len(d.pods))
	for _, p := range d.pods {
		d.detail("%-6s on %s  %-12s %s", p.Name, p.Node.Name, p.Addr(false), p.Addr(true))
	}
	return nil
}

func family(v6 bool) string {
	if v6 {
		return "IPv6"
	}
	return "IPv4"
}

// matrix lets every pod ask every pod, over UDP and TCP, which source address it sees.
func (d *demo) matrix(ctx context.Context) error {
	d.heading("Every pod reaches every pod by its own address (UDP round trip, best of 3)")
	began := time.Now()
	asked, held := 0, 0
	var wrong []string
	for _, v6 := range []bool{false, true} {
		row := fmt.Sprintf("%-10s", family(v6)+" from")
		for _, to := range d.pods {
			row += fmt.Sprintf("%12s", "to "+to.Name)
		}
		d.detail("%s", d.paint(faint, row))
		for _, from := range d.pods {
			row := fmt.Sprintf("%-10s", from.Name)
			for _, to := range d.pods {
				if from == to {
					row += fmt.Sprintf("%12s", ".")
					continue
				}
				asked++
				rtt, err := question(ctx, from, to, v6)
				if ctx.Err() != nil {
					return ctx.Err()
				}
				if err != nil {
					wrong = append(wrong, fmt.Sprintf("%s to %s, %s: %v", from.Name, to.Name, family(v6), err))
					row += fmt.Sprintf("%12s", "NO")
					continue
				}
				held++
				row += fmt.Sprintf("%12s", short(rtt))
			}
			d.detail("%s", row)
		}
	}
	d.check(held == asked, time.Since(began), "%d of %d pairs talk over UDP and TCP, and each sees the other's own address", held, asked)
	for _, w := range wrong {
		d.detail("%s", w)
	}
	return ctx.Err()
}

// question asks over TCP once and over UDP three times, and returns the shortest UDP round trip.
func question(ctx context.Context, from, to *lab.Pod, v6 bool) (best time.Duration, err error) {
	seen, err := lab.Ask(ctx, from, netip.AddrPortFrom(to.Addr(v6), lab.EchoPort))
	if err != nil {
		return 0, fmt.Errorf("TCP: %w", err)
	}
	if seen != from.Addr(v6) {
		return 0, fmt.Errorf("TCP: it saw %s instead of %s", seen, from.Addr(v6))
	}
	for range 3 {
		seen, rtt, err := lab.Echo(ctx, from, to.Addr(v6), 64)
		if err != nil {
			return 0, fmt.Errorf("UDP: %w", err)
		}
		if seen != from.Addr(v6) {
			return 0, fmt.Errorf("UDP: it saw %s instead of %s", seen, from.Addr(v6))
		}
		if best == 0 || rtt < best {
			best = rtt
		}
	}
	return best, nil
}

// throughput compares a large transfer between pods with the same between their nodes.
func (d *demo) throughput(ctx context.Context) error {
	d.heading("A large transfer across nodes (one TCP stream)")
	a, b := d.lab.Nodes[0], d.lab.Nodes[1]
	tailnet, err := b.TailnetAddrs()
	if err != nil {
		return err
	}
	from, to := d.pods[0], d.pods[2]
	paths := []struct {
		name     string
		from, to lab.Place
		addr     netip.Addr
		rate     float64
	}{
		{name: fmt.Sprintf("pod %s to pod %s", from.Name, to.Name), from: from, to: to, addr: to.Addr(false)},
		{name: "node to node over tailscale", from: a, to: b, addr: tailnet[0]},
		{name: "node to node, bare underlay", from: a, to: b, addr: b.Underlay[0]},
	}
	// The paths take turns and the best of each counts: other work on the machine slows now the one, now the other.
	for range rounds {
		for i := range paths {
			p := &paths[i]
			d.now("%s ...", p.name)
			rate, err := lab.Throughput(ctx, p.from, p.to, p.addr, burst)
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err != nil {
				d.check(false, 0, "%s: %v", p.name, err)
				return nil
			}
			p.rate = max(p.rate, rate)
		}
	}
	for _, p := range paths {
		d.detail("%-28s %6.2f Gbit/s  %s", p.name, p.rate/1e9, d.bar(p.rate, paths[2].rate))
	}
	d.check(paths[0].rate > fair*paths[1].rate, 0, "pods get %.0f %% of what their nodes get over tailscale", 100*paths[0].rate/paths[1].rate)
	return ctx.Err()
}

// names looks the second node up from a pod of the first.
func (d *demo) names(ctx context.Context) error {
	d.heading("Names")
	node := d.lab.Nodes[1]
	want, err := node.TailnetAddrs()
	if err != nil {
		return err
	}
	name := node.Name + "." + lab.BaseDomain
	began := time.Now()
	got, err := lab.Lookup(ctx, d.pods[0], name)
	took := time.Since(began)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		d.check(false, took, "pod %s asks MagicDNS for %s: %v", d.pods[0].Name, name, err)
		return nil
	}
	held := len(got) > 0
	var text []string
	for _, a := range got {
		held = held && slices.Contains(want, a.Unmap())
		text = append(text, a.Unmap().String())
	}
	d.check(held, took, "pod %s asks MagicDNS for %s: %s", d.pods[0].Name, name, strings.Join(text, ", "))
	return ctx.Err()
}

// streams are one-way flows between pods on different nodes, in both directions and both families.
type streams []*lab.Stream

func (d *demo) startStreams(ctx context.Context) (streams, error) {
	var all streams
	a, b := d.pods[0], d.pods[2]
	for _, pair := range [][2]*lab.Pod{{a, b}, {b, a}} {
		for _, v6 := range []bool{false, true} {
			s, err := lab.StartStream(ctx, pair[0].Name+" to "+pair[1].Name+", "+family(v6), pair[0], pair[1], pair[1].Addr(v6))
			if err != nil {
				all.stop()
				return nil, err
			}
			all = append(all, s)
		}
	}
	return all, nil
}

// stop ends all and adds their reports up.
func (all streams) stop() (sum lab.Report) {
	reports := make(chan lab.Report)
	for _, s := range all {
		go func() { reports <- s.Stop() }()
	}
	for range all {
		r := <-reports
		sum.Sent, sum.Lost, sum.Longest = sum.Sent+r.Sent, sum.Lost+r.Lost, max(sum.Longest, r.Longest)
	}
	return sum
}

// faults kills one part after the other.
func (d *demo) faults(ctx context.Context) error {
	d.heading(fmt.Sprintf("Faults, while a packet goes each %s between pods on both nodes, both ways, IPv4 and IPv6", short(lab.Beat)))
	for _, f := range []func(context.Context) error{d.killHeadscale, d.killDaemon, d.killTailscaled} {
		if err := f(ctx); err != nil {
			return err
		}
	}
	return ctx.Err()
}

// pause waits, unless ctx ends.
func pause(ctx context.Context, t time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(t):
	}
}

func (d *demo) killHeadscale(ctx context.Context) error {
	d.now("killing Headscale ...")
	flows, err := d.startStreams(ctx)
	if err != nil {
		return err
	}
	pause(ctx, 200*time.Millisecond)
	killErr := d.lab.Control.Headscale.Kill()
	pause(ctx, watch)
	r := flows.stop()
	if err := errors.Join(killErr, ctx.Err()); err != nil {
		return err
	}
	d.check(r.Lost == 0, 0, "Headscale killed: %d of %d packets arrived", r.Sent-r.Lost, r.Sent)
	began := time.Now()
	if err := d.lab.Control.StartHeadscale(ctx); err != nil {
		return err
	}
	d.detail("Headscale started again in %s", short(time.Since(began)))
	return nil
}

func (d *demo) killDaemon(ctx context.Context) error {
	node := d.lab.Nodes[0]
	d.now("killing headcni-daemon on %s ...", node.Name)
	flows, err := d.startStreams(ctx)
	if err != nil {
		return err
	}
	pause(ctx, 200*time.Millisecond)
	killErr := node.Daemon.Kill()
	late, addErr := node.AddPod(ctx, "late", lab.PodOptions{})
	pause(ctx, watch)
	r := flows.stop()
	if err := errors.Join(killErr, ctx.Err()); err != nil {
		return err
	}
	d.check(r.Lost == 0, 0, "headcni-daemon on %s killed: %d of %d packets arrived", node.Name, r.Sent-r.Lost, r.Sent)
	if addErr != nil {
		d.check(false, 0, "a new pod without the daemon: %v", addErr)
	} else {
		d.pods = append(d.pods, late)
		talks := true
		for _, v6 := range []bool{false, true} {
			_, err := question(ctx, late, d.pods[2], v6)
			talks = talks && err == nil
		}
		d.check(talks, late.Setup, "a new pod, %s, attached without it, and talking to %s on %s", late.Name, d.pods[2].Name, d.pods[2].Node.Name)
	}
	began := time.Now()
	if err := node.StartDaemon(); err != nil {
		return err
	}
	ready, cancel := context.WithTimeoutCause(ctx, backWithin, errors.New("the daemon was not ready again in time"))
	defer cancel()
	if err := node.WaitReady(ready); err != nil {
		return err
	}
	d.detail("headcni-daemon started again, ready after %s", short(time.Since(began)))
	return nil
}

// killTailscaled kills tailscaled on the first node, looks for packets in clear, and starts it again.
func (d *demo) killTailscaled(ctx context.Context) error {
	node := d.lab.Nodes[0]
	// Nodes reconnect to a restarted Headscale after some seconds; before, this would be two faults at once.
	d.now("waiting until all nodes have reconnected to Headscale ...")
	reconnect, cancel := context.WithTimeoutCause(ctx, backWithin, errors.New("the nodes did not reconnect to Headscale in time"))
	defer cancel()
	if err := d.lab.Control.WaitConnected(reconnect, len(d.lab.Nodes)); err != nil {
		return err
	}
	d.now("killing tailscaled on %s ...", node.Name)
	flows, err := d.startStreams(ctx)
	if err != nil {
		return err
	}
	defer flows.stop()
	capture, err := d.lab.CaptureUnderlay()
	if err != nil {
		return err
	}
	pause(ctx, 200*time.Millisecond)
	killed := time.Now()
	killErr := node.Tailscaled.Kill()
	pause(ctx, watch)
	dark := 0
	for _, f := range flows {
		if _, back := f.Back(killed.Add(100 * time.Millisecond)); !back {
			dark++
		}
	}
	seen, err := d.endCapture(capture)
	if err = errors.Join(killErr, err, ctx.Err()); err != nil {
		return err
	}
	// A capture that sees nothing because nothing happens, or because it cannot, proves nothing.
	d.check(seen.inClear == 0 && seen.proof && dark == len(flows), 0,
		"tailscaled on %s killed: %d packets in clear on the wire, while all flows are cut", node.Name, seen.inClear)
	switch {
	case seen.inClear > 0:
		d.detail("such as %s", strings.Join(seen.examples, "; "))
	case dark < len(flows):
		d.detail("but %d of %d flows were not cut", len(flows)-dark, len(flows))
	default:
		d.detail("%d frames passed; a packet sent in clear on purpose was seen: %s", seen.frames, yes(seen.proof))
	}
	began := time.Now()
	if err := node.StartTailscaled(); err != nil {
		return err
	}
	return d.waitBack(ctx, flows, began)
}

func yes(b bool) string {
	if b {
		return "yes"
	}
	return "NO"
}

type sightings struct {
	frames, inClear int
	examples        []string
	proof           bool
}

// endCapture ends the capture with the proof that it would have seen a leak.
func (d *demo) endCapture(c *lab.Capture) (sightings, error) {
	before := c.Clear()
	if err := d.lab.SendClear(d.lab.Nodes[1], d.pods[0].Addr(false), d.pods[2].Addr(false)); err != nil {
		_, stopErr := c.Stop()
		return sightings{}, errors.Join(err, stopErr)
	}
	got, err := c.Stop()
	return sightings{frames: got.Total, inClear: before, examples: got.Examples, proof: got.Clear == before+1}, err
}

// waitBack waits for all flows after tailscaled's start and then asks everybody again.
func (d *demo) waitBack(ctx context.Context, flows streams, began time.Time) error {
	d.now("tailscaled starts again ...")
	ctx, cancel := context.WithTimeoutCause(ctx, backWithin, fmt.Errorf("not within %s", backWithin))
	defer cancel()
	var longest time.Duration
	for _, f := range flows {
		back, err := f.WaitBack(ctx, began)
		if err != nil {
			d.check(false, time.Since(began), "tailscaled started again, but: %v", err)
			return nil
		}
		longest = max(longest, back)
	}
	d.check(true, longest, "tailscaled started again: pods talk again, both ways, IPv4 and IPv6, after")
	return nil
}

func (d *demo) cleanUp() error {
	d.now("cleaning up ...")
	began := time.Now()
	err := d.lab.Close()
	if err == nil {
		d.heading("Clean-up")
		d.check(true, time.Since(began), "every process, namespace and file of the demo is gone")
	}
	return err
}
