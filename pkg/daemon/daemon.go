// Package daemon keeps a node's network as it should be: it observes the host, tailscaled and Headscale, plans purely,
// and applies add before delete. Everything it sets up stays in force while it is restarted or dead.
package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	"github.com/headcni/headcni/internal/atomicfile"
	"github.com/headcni/headcni/internal/pidlock"
	"github.com/headcni/headcni/internal/trusted"
	"github.com/headcni/headcni/pkg/cmdlog"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/conflist"
	"github.com/headcni/headcni/pkg/dns/nodedns"
	"github.com/headcni/headcni/pkg/findings"
	"github.com/headcni/headcni/pkg/hostfirewall"
	"github.com/headcni/headcni/pkg/kube/nodeview"
	"github.com/headcni/headcni/pkg/leases"
	"github.com/headcni/headcni/pkg/membership"
	"github.com/headcni/headcni/pkg/monitoring"
	"github.com/headcni/headcni/pkg/networking/antispoof"
	"github.com/headcni/headcni/pkg/networking/conntrack"
	"github.com/headcni/headcni/pkg/networking/deadman"
	"github.com/headcni/headcni/pkg/networking/fastpath"
	"github.com/headcni/headcni/pkg/networking/noderoutes"
	"github.com/headcni/headcni/pkg/networking/podlink"
	"github.com/headcni/headcni/pkg/nft"
	"github.com/headcni/headcni/pkg/nft/selftest"
	"github.com/headcni/headcni/pkg/nodestatus"
	"github.com/headcni/headcni/pkg/pathmtu"
	"github.com/headcni/headcni/pkg/policy/nodepolicy"
	"github.com/headcni/headcni/pkg/policy/subnets"
	"github.com/headcni/headcni/pkg/reconcile"
	"github.com/headcni/headcni/pkg/serviceroute"
	"github.com/headcni/headcni/pkg/tailscaled"
)

const (
	// fullCheck is how often everything is looked at although nobody told of a change.
	fullCheck = time.Minute
	// debounce is how long a burst of events is gathered before a pass.
	debounce = 100 * time.Millisecond
	// pathInterval is how often it is asked where peers are and what the paths to them carry.
	pathInterval = 10 * time.Second
	// spoolInterval is how often the spool of finished commands is looked at although nobody told of one.
	spoolInterval = 10 * time.Second
	// poolsTimeout bounds the counting of leases for a scrape.
	poolsTimeout = 5 * time.Second
	// retryMin and retryMax bound the wait after a pass in which something was not right.
	retryMin = time.Second
	retryMax = 30 * time.Second
)

// Daemon is the node daemon. Make it with New.
type Daemon struct {
	cfg     config.Config
	ipam    json.RawMessage // see conflist.Adopt
	log     *slog.Logger
	getenv  func(string) string
	metrics *monitoring.Metrics
	board   *reconcile.Board[*pass]
	loop    *reconcile.Loop

	node         *noderoutes.Routes
	tables       *nft.Tables
	hostFirewall *hostfirewall.Firewall
	member       *membership.Member
	kubernetes   *nodeview.Watch // nil without Kubernetes
	paths        *pathmtu.Watch
	table52      *noderoutes.Table52 // of the loop alone
	links        noderoutes.Links    // of the loop alone
	conntrack    conntrack.Watch     // of the loop alone
	pods         *leases.Mender
	ports        *leases.Ports
	guardTest    selftest.Once
	answerer     *nodedns.Answerer
	services     *serviceroute.Gate
	policy       *nodepolicy.Enforcer // nil where NetworkPolicies are not enforced
	fast         *fastpath.Path
	subnets      *subnets.Agent // nil where no Namespace is asked
	policyIsOff  bool           // of the loop alone: nothing of them is left in the kernel

	saved   state       // what we go by
	kept    state       // what is on disk
	keepErr error       // why that is not the same, nil where it is
	cutOff  chan string // from the deadman: what our routes keep this node from
	end     context.CancelCauseFunc
	version string
	began   time.Time

	// Of the loop alone: since when our conflist stands, the configuration that was taken back and left nothing, when a failed
	// uninstall is tried again (zero: none was begun), and whether it is done: then nothing is to be done any more.
	conflistAt  time.Time
	withdrawn   string
	uninstallAt time.Time
	uninstalled bool

	// firewall is what our tables are to hold, nil before the first pass, and where they are to go. Who holds its lock writes them.
	firewallMu sync.Mutex
	firewall   *nft.Config

	// For status, from the last pass.
	mu        sync.Mutex
	last      observation
	confirmed *[]netip.Prefix // routes that Headscale says it routes to us, nil where it was not asked
}

// New checks what the daemon cannot do without and opens its handles. It changes nothing on the host.
func New(c config.Config, log *slog.Logger, getenv func(string) string, version string) (*Daemon, error) {
	k, err := newWatch(c, log, getenv, version)
	if err != nil {
		return nil, err
	}
	c, ipam, err := conflist.Adopt(c, k != nil)
	if err != nil {
		return nil, err
	}
	if err := prerequisites(c, k != nil); err != nil {
		return nil, err
	}
	saved, err := loadState()
	if err != nil {
		return nil, err
	}
	if saved.Prefs == nil {
		// A node that has pods already goes on, and the part headscale says it.
		if err := lastingURL(c.Headscale.URL); err != nil {
			return nil, err
		}
	}
	m := monitoring.NewMetrics(version)
	d := &Daemon{
		cfg: c, ipam: ipam, log: log, getenv: getenv, metrics: m, kubernetes: k,
		tables: nft.New(), hostFirewall: hostfirewall.New(), table52: noderoutes.NewTable52(), pods: leases.NewMender(c.CNI.ConfDir), ports: leases.NewPorts(paths.DaemonSocket),
		paths: pathmtu.New(saved.Path),
		loop:  reconcile.NewLoop(), cutOff: make(chan string, 1), version: version, began: time.Now(),
	}
	var forMember *membership.Kubernetes
	if k != nil {
		forMember = &membership.Kubernetes{Node: k.Node(), Namespace: k.Namespace(), JoinKey: k.JoinKey}
	}
	if c.Network.PeerMTU == string(config.Auto) {
		d.paths.Widen(noderoutes.PeerMTU{})
	}
	d.fast = fastpath.New(log, new(podlink.Handle), c.Network.FastPath == string(config.Auto))
	if d.cfg.Network.NetworkPolicy = c.Network.NetworkPolicy && k != nil; d.cfg.Network.NetworkPolicy {
		d.policy = d.newPolicy()
	}
	if k != nil && c.Network.TailnetSubnets == config.SubnetsDeny {
		d.subnets = subnets.New(subnets.Config{Log: log, Client: k.Client(), Node: k.Node(), Table: d.tables, Links: new(podlink.Handle), Changed: d.loop.Wake})
	}
	d.member = membership.New(c, log, getenv, forMember)
	d.answerer = nodedns.New(d.member.Names)
	d.services = serviceroute.New(c.Network.AdvertiseServices.HealthURL, partFirewall, partRoutes, partLinks)
	d.board = d.newBoard(d.parts())
	d.loop.Pass, d.loop.Settle = d.look, func(time.Duration) time.Duration { return debounce }
	d.goBy(saved)
	return d, nil
}

// goBy takes over what is on disk.
func (d *Daemon) goBy(saved state) {
	d.saved, d.kept = saved, saved
	d.node = noderoutes.New(saved.Host, func(h noderoutes.Saved) error {
		return d.remember(func(s *state) { s.Host = h })
	})
}

func (d *Daemon) newBoard(parts []reconcile.Part[*pass]) *reconcile.Board[*pass] {
	opt := reconcile.Options{Log: d.log, Record: d.metrics.Part, FullCheck: fullCheck, RetryMin: retryMin, RetryMax: retryMax}
	if d.kubernetes != nil {
		opt.Report = d.kubernetes.Report
	}
	return reconcile.NewBoard(opt, parts)
}

// errNoPodCIDRs is for a node that nobody gives any.
var errNoPodCIDRs = findings.New(findings.NoPodCIDR, "network.podCIDRs: none; give this node a range of its own, such as 10.244.1.0/24")

// CheckConfig finds what makes a valid configuration useless on this machine, joined: no pod CIDRs, no key to join with, a key that
// cannot be read, or that everybody can. It uses what a conflist of the user's says where the configuration is silent, as New
// does. file is where the configuration was read from. A note is of what works only if something else is as it should.
func CheckConfig(c config.Config, getenv func(string) string, file string) (note string, err error) {
	kubernetes := c.InKubernetes(getenv)
	plain := c.Headscale.AuthKey
	c, _, err = conflist.Adopt(c, kubernetes)
	if err != nil {
		return "", err
	}
	if plain.Empty() {
		file = conflist.Path(c.CNI.ConfDir)
	}
	var errs []error
	if len(c.Network.PodCIDRs) == 0 && !kubernetes {
		errs = append(errs, errNoPodCIDRs)
	}
	mode := c.Tailscale.Mode
	if mode == config.ModeAuto {
		mode = tailscaled.Mode(c.Tailscale, "")
	}
	if !kubernetes {
		errs = append(errs, c.Network.AdvertiseServices.WithoutKubernetes())
	}
	if c.Headscale.URL == "" && mode != config.ModeHost {
		errs = append(errs, errors.New("headscale.url: none; give the control server's, such as https://headscale.example.com"))
	}
	if err := lastingURL(c.Headscale.URL); err != nil {
		errs = append(errs, err)
	}
	cred, err := c.Headscale.Credential(getenv)
	switch {
	case err == nil && !kubernetes: // a Secret's files can be read by everybody in the pod
		errs = append(errs, cred.Exposed(file))
	case errors.Is(err, config.ErrNoCredential) && kubernetes: // the controller has it
	case errors.Is(err, config.ErrNoCredential) && mode == config.ModeHost:
		note = "there is no Headscale key: tailscaled must be logged in (tailscale up --login-server=URL), and the pod CIDRs be approved in Headscale, " +
			"by hand or by autoApprovers"
	default:
		errs = append(errs, err)
	}
	return note, errors.Join(errs...)
}

// lastingURL says why a node would lose Headscale.
func lastingURL(url string) error {
	if err := config.Lasting(url); err != nil {
		return findings.Errorf(findings.URLNotLasting, "headscale.url: %q: %w", url, err)
	}
	return nil
}

// prerequisites names everything that is missing at once, each with its remedy.
func prerequisites(c config.Config, kubernetes bool) error {
	var errs []error
	if os.Geteuid() != 0 {
		errs = append(errs, findings.New(findings.NotRoot, "needs root for routes and nftables; run it with sudo or as a systemd unit"))
	}
	if _, err := exec.LookPath("nft"); err != nil {
		errs = append(errs, findings.New(findings.NoNFT, "needs the nft program (1.0.1 or later); install nftables (apt-get install nftables)"))
	}
	if len(c.Network.PodCIDRs) == 0 && !kubernetes {
		errs = append(errs, errNoPodCIDRs)
	}
	for _, dir := range []string{paths.StateDir, paths.RunDir} {
		if err := trusted.MkdirAll(dir, 0o755); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// Run keeps the node right until ctx ends. Then it stops and leaves the network working.
func (d *Daemon) Run(ctx context.Context) error {
	held, err := pidlock.Take(ctx, lockPath(), "headcni-daemon")
	if err != nil {
		return err
	}
	defer held.Close()
	// New read it without the lock: a daemon that has just ended, or an uninstall, may have written it since.
	saved, err := loadState()
	if err != nil {
		return err
	}
	d.goBy(saved)
	if err := errors.Join(atomicfile.Sweep(statePath()), atomicfile.Sweep(totalsPath()), conflist.Sweep(d.cfg.CNI.ConfDir)); err != nil {
		d.log.Warn("remove what an earlier daemon did not finish writing", "err", err)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	d.end = cancel
	var wg sync.WaitGroup
	defer wg.Wait()
	// vital starts what the daemon does not run without.
	vital := func(run func() error) {
		wg.Go(func() {
			if err := run(); err != nil {
				cancel(err)
			}
		})
	}
	socketErr := func(err error) { d.log.Warn("put a socket back that somebody has removed", "err", err) }
	spoolErr := func(err error) { d.log.Warn("count what the plugin did", "err", err) }
	if err := d.metrics.OpenSpool(totalsPath(), cmdlog.Spool(paths.DaemonSocket), d.pods.Tell, spoolErr); err != nil {
		spoolErr(err) // pods matter more than their number
	}
	d.metrics.Pools(d.pools)
	d.metrics.Drops(d.drops)
	d.metrics.Conntrack(conntrack.Totals)
	d.metrics.Policy(d.policy.Metrics)
	if d.cfg.Monitoring.Listen != "" {
		wait, err := monitoring.Serve(ctx, d.cfg.Monitoring.Listen, d.metrics, d.board)
		if err != nil {
			return err
		}
		vital(wait)
	}
	vital(func() error {
		return nodestatus.Serve(ctx, paths.APISocket, nodestatus.Answers{Status: d.status, Others: d.policy.Answers()}, func() {
			// From here on `headcni-daemon status` finds somebody: it may come right after `systemctl start`.
			if err := tellSystemd(d.getenv("NOTIFY_SOCKET"), "READY=1"); err != nil {
				d.log.Warn("tell systemd that the daemon is up", "err", err)
			}
		}, socketErr)
	})
	finished := make(chan struct{}, 1)
	vital(func() error {
		return cmdlog.Serve(ctx, paths.DaemonSocket, func() {
			d.policy.Wake()
			d.subnets.Wake()
			d.ports.Tell(d.loop.Wake)
			select {
			case finished <- struct{}{}:
			default: // one is waiting already
			}
		}, socketErr)
	})
	wg.Go(func() { d.count(ctx, finished) })
	vital(func() error { return held.Keep(ctx) })
	d.fast.Start(ctx, &wg, d.watchEvents)
	d.policy.Start(ctx, &wg, d.watchEvents)
	d.subnets.Start(ctx, &wg, d.watchEvents)
	antispoof.New(d.log, d.tables, new(podlink.Handle)).Start(ctx, &wg, d.watchEvents)
	d.watch(ctx, &wg)
	if d.kubernetes != nil {
		vital(func() error { return tailscaled.WatchMount(ctx) })
	}
	if every, _ := time.ParseDuration(d.cfg.IPAM.GCInterval); every > 0 { // validated
		wg.Go(func() { leases.NewSweeper(d.cfg.CNI.ConfDir, d.log, d.metrics.Released).Run(ctx, every) })
	}
	d.warn()
	if d.kubernetes != nil {
		d.log.Info("started", "node", d.kubernetes.Node(), "mode", d.cfg.Tailscale.Mode)
	} else {
		d.log.Info("started", "podCIDRs", d.cfg.Network.PodCIDRs, "mode", d.cfg.Tailscale.Mode)
	}
	d.loop.Run(ctx)
	d.guardTest.Running.Wait() // it ends with ctx
	d.policy.Stop()
	d.subnets.Stop()
	d.policy.Leave()
	d.fast.Leave()
	err = context.Cause(ctx)
	cancel(nil) // before the deferred Wait
	d.log.Info("stopped; the network stays in force")
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// warn tells of settings that work and may not be meant.
func (d *Daemon) warn() {
	if len(d.cfg.Network.ClusterCIDRs) == 0 && d.kubernetes == nil {
		d.log.Warn("network.clusterCIDRs is empty: pods of other nodes are strangers; set it to the range that all nodes' pods have")
	}
	if cred, err := d.cfg.Headscale.Credential(d.getenv); err == nil && cred.Plain {
		d.log.Warn("the Headscale key stands in a configuration file: move it to a file of mode 0600 and name that in HEADSCALE_API_KEY_FILE or headscale.apiKeyFile")
	}
}

// look makes a pass, after taking our routes back where they cut this node off.
func (d *Daemon) look(ctx context.Context, _ bool) time.Duration {
	select {
	case address := <-d.cutOff:
		if err := d.withdraw(ctx, address); err != nil {
			d.log.Error("take our routes back", "err", err)
		}
	default:
	}
	began := time.Now()
	next := d.pass(ctx)
	d.metrics.Pass(time.Since(began).Seconds())
	return next
}

// pools are for a scrape.
func (d *Daemon) pools() []monitoring.Pool {
	ctx, cancel := context.WithTimeout(context.Background(), poolsTimeout)
	defer cancel()
	found, err := leases.InUse(ctx, d.cfg.CNI.ConfDir)
	if err != nil {
		d.log.Warn("count the pools' addresses", "err", err)
	}
	return found
}

// lockPath is the file that the running daemon of this mount namespace locks.
func lockPath() string { return filepath.Join(paths.RunDir, "daemon.lock") }

// totalsPath is where the metrics of the plugin are kept until the next boot.
func totalsPath() string { return filepath.Join(paths.RunDir, "metrics.json") }

// count takes finished commands out of the spool soon after each, and now and then for those that came without a word.
func (d *Daemon) count(ctx context.Context, finished <-chan struct{}) {
	for ctx.Err() == nil {
		d.metrics.CountSpool()
		if lost, _ := d.pods.See(); lost { // the part pods says what is wrong
			d.loop.Wake()
		}
		select {
		case <-ctx.Done():
		case <-time.After(spoolInterval):
		case <-finished:
			reconcile.Sleep(ctx, debounce)
		}
	}
}

// watch turns changes of the kernel's network state and of tailscaled into passes, and keeps sessions armed.
func (d *Daemon) watch(ctx context.Context, wg *sync.WaitGroup) {
	for _, changes := range []func(context.Context) (<-chan struct{}, error){d.node.Changes, d.hostFirewall.Changes} {
		wg.Go(func() { d.watchEvents(ctx, changes, d.loop.Wake) })
	}
	wg.Go(func() {
		d.watchEvents(ctx, d.tables.Changes, func() {
			d.putTablesBack(ctx)
			d.loop.Wake()
		})
	})
	wg.Go(func() {
		d.watchEvents(ctx, noderoutes.PodLinkLosses, func() {
			if d.pods.Lacking(ctx) { // mostly a pod has ended
				d.loop.Wake()
			}
		})
	})
	addresses := []string{deadman.HostPort(d.cfg.Headscale.Dialed())}
	if d.kubernetes != nil {
		addresses = append(addresses, deadman.HostPort(d.kubernetes.Server()))
		wg.Go(func() { d.kubernetes.Run(ctx, d.loop.Wake) })
	}
	for _, address := range addresses {
		if address != "" {
			wg.Go(func() { deadman.New(address).Run(ctx, func() { d.reportCutOff(address) }) })
		}
	}
	wg.Go(func() { d.paths.Run(ctx, d.loop.Wake) })
	wg.Go(func() { d.answerer.Run(ctx, retryMax, d.loop.Wake) })
	wg.Go(func() { d.services.Run(ctx, d.loop.Wake) })
	wg.Go(func() { d.watchPaths(ctx) })
	wg.Go(func() { d.member.Watch(ctx, d.loop.Wake) })
	wg.Go(func() { d.member.Rearm(ctx, d.metrics.RearmPing, d.loop.Wake) })
}

// watchPaths tells of peers' endpoints, and that tailscaled hangs. Neither tailscaled's bus nor the kernel has an event for what changes here.
func (d *Daemon) watchPaths(ctx context.Context) {
	for ctx.Err() == nil {
		reconcile.Sleep(ctx, pathInterval)
		t, _ := d.member.Look(ctx)
		d.mu.Lock()
		o := d.last
		d.mu.Unlock()
		if o.Tailnet = t; o.Running() {
			d.paths.Set(o.tun, o.tunMTU, o.directPeers())
		} else if ctx.Err() == nil && d.board.Doubt(partTailnet, o.NotRunning()) {
			d.loop.Wake()
		}
	}
}

// reportCutOff never blocks: one report is enough.
func (d *Daemon) reportCutOff(address string) {
	select {
	case d.cutOff <- address:
	default:
	}
	d.loop.Wake()
}

// watchEvents has act called for events of the kernel. It subscribes again whenever a subscription ends, and then acts: events were
// missed.
func (d *Daemon) watchEvents(ctx context.Context, changes func(context.Context) (<-chan struct{}, error), act func()) {
	for ctx.Err() == nil {
		ch, err := changes(ctx)
		if err != nil {
			d.log.Error("watch the kernel", "err", err)
			reconcile.Sleep(ctx, retryMax)
			continue
		}
		act()
		for range ch {
			act()
		}
		reconcile.Sleep(ctx, debounce)
	}
}
