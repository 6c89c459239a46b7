package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/headcni/headcni/pkg/config"
)

// Options say what a lab is to be. The zero value is two nodes, the first in host mode, the second in daemon mode.
type Options struct {
	// Nodes is how many machines there are beside the control host.
	Nodes int
	// Names are those of the nodes, "node-1" and so on where there are none.
	Names []string
	// Spare is how many of them, the last ones, are left alone: plugged in and with the plugins installed, but nothing
	// is configured or started.
	Spare int
	// Modes are those of the nodes, in turn: config.ModeHost or config.ModeDaemon.
	Modes []string
	// Bin is the folder of our programs; empty means $HEADCNI_BIN.
	Bin string
	// Tools are the folders of the real parts, separated by colons; empty means $HEADCNI_TOOLS.
	Tools string
	// Plugins are the reference plugins that nodes have beside ours, such as "host-local".
	Plugins []string
	// UnderlayMTU in bytes, 0 = 1500.
	UnderlayMTU int
	// OnlyIPv6 leaves IPv4 out on the underlay. It does not go with Relay.
	OnlyIPv6 bool
	// Delays are how long a frame is on a node's wire, in either direction, of the nodes in turn: a round trip between two
	// nodes takes four times that, one between a node and the control host twice. A wire with a delay is a line.
	Delays []time.Duration
	// Sites are where the nodes stand, in turn: without, all on the underlay. They go neither with Delays nor with OnlyIPv6.
	Sites []Site
	// TLS has Headscale, with its relay, at an https:// URL and port 443, by a name that nodes behind an HTTP proxy cannot resolve.
	TLS bool
	// Batch is how long Headscale gathers changes, 0 = 10 ms (its own default is 500 ms).
	Batch time.Duration
	// ServerURL is what Headscale is to call itself, where a proxy of the caller's stands before it; empty: its URL.
	ServerURL string
	// Relay has the relay (DERP server) run on the control host as a process of its own, instead of within Headscale.
	Relay bool
	// Derpers has Tailscale's own relays (derper) run, one for each, on machines of their own whose wires have these delays, instead of
	// the one within Headscale. Their tool is in no lab without them. It does not go with Relay, TLS and OnlyIPv6.
	Derpers []time.Duration
	// NoPings has the LocalAPI of daemon-mode nodes refuse pings, by which the daemon looks after sessions: so it is without.
	NoPings bool
	// Configure may change what is to be a node's daemon.yaml.
	Configure func(n *Node, c map[string]any)
	// Policy may change what is to be Headscale's policy.
	Policy func(p map[string]any)
	// Begin and Step, if set, are told when a step of the set-up begins and when it is done.
	Begin func(what string)
	Step  func(what string, took time.Duration)
}

func (o Options) withDefaults() Options {
	if o.Nodes == 0 {
		o.Nodes = 2
	}
	if len(o.Modes) == 0 {
		o.Modes = []string{config.ModeHost, config.ModeDaemon}
	}
	if o.Bin == "" {
		o.Bin = os.Getenv(BinEnv)
	}
	if o.Tools == "" {
		o.Tools = os.Getenv(ToolsEnv)
	}
	if o.UnderlayMTU == 0 {
		o.UnderlayMTU = 1500
	}
	if o.Batch == 0 {
		o.Batch = 10 * time.Millisecond
	}
	if o.Begin == nil {
		o.Begin = func(string) {}
	}
	if o.Step == nil {
		o.Step = func(string, time.Duration) {}
	}
	return o
}

// Lab is a running world. Its methods may be called from several goroutines unless said otherwise.
type Lab struct {
	Dir     string
	Control *Control
	Nodes   []*Node
	Derpers []*Derper

	opt  Options
	lock *os.File
	gone atomic.Uint64 // frames that wires carried which are no more
}

// New builds a world and waits until pods can be started on every node and reach each other. Leftovers of labs that
// were killed are removed first.
func New(ctx context.Context, opt Options) (_ *Lab, err error) {
	if err := opt.Check(); err != nil {
		return nil, err
	}
	l := &Lab{opt: opt.withDefaults()}
	if l.Dir, l.lock, err = newWorldDir(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Close())
		}
	}()
	for _, s := range []struct {
		what string
		do   func(context.Context) error
	}{
		{"namespaces for a control host and %d nodes, joined by a bridge", l.makeMachines},
		{"Headscale, with its relay, on the control host", l.startControl},
		{"%d nodes in the tailnet, their networks programmed by headcni-daemon", l.startNodes},
	} {
		began := time.Now()
		if err := s.do(ctx); err != nil {
			return nil, err
		}
		what := s.what
		if strings.Contains(what, "%d") {
			what = fmt.Sprintf(what, l.opt.Nodes-l.opt.Spare)
		}
		l.opt.Step(what, time.Since(began))
	}
	return l, nil
}

// each calls do for 0 to n-1 at once and joins the errors.
func each(n int, do func(int) error) error {
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { errs[i] = do(i) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// names are those of the control host and the nodes.
func (l *Lab) names() []string {
	names := []string{"control"}
	for i := range l.opt.Nodes {
		name := fmt.Sprintf("node-%d", i+1)
		if i < len(l.opt.Names) {
			name = l.opt.Names[i]
		}
		names = append(names, name)
	}
	return names
}

// hosts is what every machine has in /etc/hosts of the others, and, unless it is a node behind an HTTP proxy, of Headscale's name.
func (l *Lab) hosts(proxied bool) string {
	var hosts strings.Builder
	if l.opt.TLS && !proxied {
		fmt.Fprintf(&hosts, "%s %s\n", l.opt.underlay(1)[0].Addr(), tlsHost)
	}
	for i, name := range l.names() {
		addrs := l.opt.underlay(1)
		if i > 0 {
			addrs = l.opt.outside(l.opt.site(i-1), i+10)
		}
		for _, a := range addrs {
			fmt.Fprintf(&hosts, "%s %s\n", a.Addr(), name)
		}
	}
	return hosts.String()
}

// makeMachines makes the namespaces of the control host and the nodes.
func (l *Lab) makeMachines(ctx context.Context) error {
	names := l.names()
	machines := make([]*Machine, len(names))
	err := each(len(names), func(i int) (err error) {
		machines[i], err = newMachine(ctx, l.Dir, names[i], l.hosts(i > 0 && l.opt.site(i-1).Proxy), l.opt.path(), l.lock)
		return err
	})
	// What was made is handed over even after an error, for Close.
	if machines[0] != nil {
		l.Control = &Control{Machine: machines[0]}
	}
	for _, m := range machines[1:] {
		if m != nil {
			l.Nodes = append(l.Nodes, &Node{Machine: m, lab: l})
		}
	}
	if err != nil {
		return err
	}
	return l.wire(ctx)
}

// wire makes the underlay.
func (l *Lab) wire(ctx context.Context) error {
	if err := l.Control.addBridge(l.opt); err != nil {
		return err
	}
	if slices.ContainsFunc(l.opt.Sites, func(s Site) bool { return s.IPv6 || s.maps() }) {
		if err := l.Control.forward(); err != nil {
			return err
		}
	}
	if slices.ContainsFunc(l.opt.Sites, Site.maps) {
		if err := l.Control.addPublic(); err != nil {
			return err
		}
	}
	for i, n := range l.Nodes {
		if err := n.plugIn(ctx, i); err != nil {
			return err
		}
	}
	return l.addDerpers(ctx)
}

func (l *Lab) startControl(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, time.Minute, errors.New("Headscale did not answer within a minute"))
	defer cancel()
	if err := l.Control.setUp(ctx, l.opt); err != nil {
		return err
	}
	for _, d := range l.Derpers {
		if err := d.StartDerper(ctx); err != nil {
			return err
		}
	}
	return nil
}

// startNodes starts tailscaled and the daemon on every node but the spare ones and waits until all is as it should be.
func (l *Lab) startNodes(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, 2*time.Minute, errors.New("the nodes were not ready within 2 minutes"))
	defer cancel()
	return each(len(l.Nodes), func(i int) error {
		n := l.Nodes[i]
		if err := n.install(); err != nil || n.spare() {
			return err
		}
		if err := n.ConfigureDaemon(l.opt.Configure); err != nil {
			return err
		}
		if err := n.StartTailscaled(); err != nil {
			return err
		}
		if err := n.WaitSocket(ctx); err != nil {
			return err
		}
		if n.Mode == config.ModeHost { // whose tailscaled is the user's, and would write the host's resolv.conf
			if _, err := n.Run(ctx, "tailscale", "set", "--accept-dns=false"); err != nil {
				return err
			}
		}
		if err := n.StartDaemon(); err != nil {
			return err
		}
		if err := n.WaitReady(ctx); err != nil {
			return err
		}
		return n.WaitRoutes(ctx)
	})
}

// Close ends the world: every process in it, every namespace, and its folder.
func (l *Lab) Close() error {
	var wg sync.WaitGroup
	for _, n := range l.Nodes {
		wg.Go(n.unplug)
	}
	for _, m := range l.machines() {
		wg.Go(m.stop)
	}
	wg.Wait()
	err := removeWorld(l.Dir)
	l.lock.Close()
	return err
}

// machines are the control host, relays, the nodes and their routers, as far as they were made.
func (l *Lab) machines() []*Machine {
	var ms []*Machine
	if l.Control != nil {
		ms = append(ms, l.Control.Machine)
	}
	for _, d := range l.Derpers {
		ms = append(ms, d.Machine)
	}
	for _, n := range l.Nodes {
		ms = append(ms, n.Machine)
		for _, r := range n.Routers {
			ms = append(ms, r.Machine)
		}
	}
	return ms
}

// Logs are the log files so far, for whoever wants to know what went wrong.
func (l *Lab) Logs() []string {
	files, _ := filepath.Glob(filepath.Join(l.Dir, "*", "*.log")) // the pattern is well-formed
	return files
}
