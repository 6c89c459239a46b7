// Package agent keeps NetworkPolicies in force for the pods of one node: from what the API server and the node's links say to the
// kernel, and from there to the links' groups, which let a pod out.
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nfnl"
	"github.com/headcni/headcni/internal/procfs"
	"github.com/headcni/headcni/pkg/config/names"
	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/kube"
	"github.com/headcni/headcni/pkg/networking/ipvs"
	"github.com/headcni/headcni/pkg/networking/podlink"
	"github.com/headcni/headcni/pkg/policy"
	"github.com/headcni/headcni/pkg/policy/enforce"
	"github.com/headcni/headcni/pkg/policy/watch"
	"github.com/headcni/headcni/pkg/reconcile"
)

const (
	// settleMin and settleMax bound how long a burst of changes is gathered: many pods start at once after a boot.
	settleMin = 2 * time.Millisecond
	settleMax = 200 * time.Millisecond
	// fullCheck is how often links are looked at although nobody told of a change.
	fullCheck = time.Minute
	// retryMin and retryMax bound the wait after a failure; it doubles.
	retryMin = 200 * time.Millisecond
	retryMax = 30 * time.Second
	// awayPatience is how long after the start the API server may fail, and syncPatience how long it may take to send everything, before
	// what an earlier process knew is used.
	awayPatience = 2 * time.Second
	syncPatience = 15 * time.Second
	// startCheck is how often it is looked at until then.
	startCheck = 500 * time.Millisecond
	// recheckFirst and recheckAgain are when flows of pods that lost rights are looked through.
	recheckFirst = time.Second
	recheckAgain = 30 * time.Second
	// unreadyCheck is how often a link whose pod's end is not up is looked at.
	unreadyCheck = 10 * time.Second
)

// Cluster is what the API server says: a watch.Watch.
type Cluster interface {
	// Snapshot is nil until everything is known.
	Snapshot() *watch.Cluster
	// Away says why the API server cannot be asked, and since when.
	Away() (since time.Time, err error)
}

// Table is the kernel's: an enforce.Table.
type Table interface {
	Apply(ctx context.Context, want *policy.Ruleset, opt policy.Options) (enforce.Change, error)
	Recheck(ctx context.Context, allowed func(policy.Flow) (egress, ingress bool)) (left int, err error)
	Remove(ctx context.Context) error
}

// Links are the node's pods': a podlink.Handle.
type Links interface {
	Attached() (map[string]podlink.Attachment, error)
	SetGroup(group uint32, indexes ...int) error
}

// Config is what an Agent works with.
type Config struct {
	Log     *slog.Logger
	Node    string
	Cluster Cluster
	Table   Table
	Links   Links
	Options policy.Options
	// Hold has each packet meet the rules until release is called, where flows go past them else; nil where each does.
	Hold func() (release func(), err error)
	// File is where the last snapshot is kept for a start without the API server, and Note a file that goes with the boot: it is there while File
	// is not behind what the kernel was made to hold.
	File, Note string
	// Changed is called when what Err returns has changed.
	Changed func()
	// Tell writes an event, when it can.
	Tell func(kube.Event)
	// Synced is told how long it took from a change to its being in force, in seconds, and Failed of each failure. Both are for metrics.
	Synced func(seconds float64)
	Failed func()
}

// Agent is made with New.
type Agent struct {
	Config
	loop     *reconcile.Loop
	compiler *policy.Compiler
	began    time.Time

	// Of the loop alone.
	locals *locals
	retry  time.Duration
	notes  notes
	saver  saver
	// file is the last snapshot of an earlier process, until the API server has sent everything; loaded tells that it was looked for. kept is what
	// this node goes by until then.
	file, kept *watch.Cluster
	loaded     bool

	// freed: what the first reading of the cluster took was given back.
	freed bool

	// dirty: the kernel has to be written to although nothing has changed.
	dirty atomic.Bool

	// logs: the kernel is to log what it denies.
	logs atomic.Bool

	recheck chan struct{} // asks for a recheck

	mu       sync.Mutex
	state    State
	snapshot *policy.Snapshot // what rules were made of
	rules    *policy.Ruleset  // in force
	err      error
}

// State is how policies stand on this node.
type State struct {
	// InForce: the kernel has had all that was known at some time.
	InForce bool
	// Policies is how many there are in the cluster, Isolated how many addresses of own pods they concern.
	Policies, Isolated int
	// Unknown are the pods that wait for their policies.
	Unknown []Unknown
	// Stale: the API server is away, and what is in force is what it said before.
	Stale bool
}

// Unknown is a pod that waits for its policies.
type Unknown struct {
	Pod   string // NAMESPACE/NAME
	Since time.Time
	Why   string
}

// New makes an Agent that has touched nothing yet.
func New(c Config) *Agent {
	a := &Agent{
		Config: c, loop: reconcile.NewLoop(), compiler: policy.NewCompiler(), began: time.Now(), locals: newLocals(), notes: newNotes(c.Tell),
		recheck: make(chan struct{}, 1), err: reconcile.Waiting("asks the API server for policies"),
	}
	a.saver = saver{file: c.File, note: c.Note, log: c.Log, stop: make(chan struct{})}
	a.dirty.Store(true)
	a.loop.Pass = func(ctx context.Context, _ bool) time.Duration { return a.pass(ctx) }
	a.loop.Settle = func(took time.Duration) time.Duration { return min(max(settleMin, took/4), settleMax) }
	return a
}

// Wake asks for a look at everything: something has changed.
func (a *Agent) Wake() { a.loop.Wake() }

// Repair asks for the kernel's table to be made right: somebody else has changed it.
func (a *Agent) Repair() {
	a.dirty.Store(true)
	a.loop.Wake()
}

// Run works until ctx ends. What is in force stays so.
func (a *Agent) Run(ctx context.Context) {
	var wg sync.WaitGroup
	wg.Go(func() { a.rechecks(ctx) })
	a.loop.Run(ctx)
	wg.Wait()
	a.saver.end()
}

// Err says what keeps policies from being in force, nil where they are.
func (a *Agent) Err() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.err
}

// State returns how policies stand.
func (a *Agent) State() State {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.state
}

// pass looks at everything once and returns when to look again.
func (a *Agent) pass(ctx context.Context) time.Duration {
	next, err := a.sync(ctx)
	if ctx.Err() != nil {
		return next // we are being stopped
	}
	var waiting reconcile.Waiting
	if err != nil && !errors.As(err, &waiting) {
		a.Failed()
		a.retry = min(max(2*a.retry, retryMin), retryMax)
		next = min(next, a.retry)
	} else {
		a.retry = 0
	}
	a.mu.Lock()
	news := fmt.Sprint(a.err) != fmt.Sprint(err)
	a.err = err
	a.mu.Unlock()
	if news {
		a.Changed()
	}
	if !a.freed && err == nil {
		a.freed = true
		debug.FreeOSMemory() // a whole cluster was read, of which little is kept
	}
	return next
}

// sync brings what is known into the kernel.
func (a *Agent) sync(ctx context.Context) (next time.Duration, err error) {
	links, err := a.Links.Attached()
	if err != nil {
		return fullCheck, fmt.Errorf("list pods' links: %w", err)
	}
	cluster, stale, err := a.cluster(links)
	if cluster == nil {
		return startCheck, err
	}
	snapshot, owners, changed := a.locals.place(cluster, links)
	if a.dirty.Load() || changed || !cluster.Since.IsZero() {
		if err := a.apply(ctx, snapshot, owners, stale); err != nil {
			return fullCheck, err
		}
		if !cluster.Since.IsZero() {
			a.Synced(time.Since(cluster.Since).Seconds())
		}
		switch {
		case !stale:
			a.saver.save(snapshot, cluster.Static)
		case cluster == a.file:
			a.saver.current()
		}
	}
	if err := a.group(owners); err != nil {
		return fullCheck, err
	}
	unknown, next := a.notes.unknown(owners, since(a.Cluster.Away()), a.Options.Strict, time.Now())
	a.mu.Lock()
	a.state.Unknown, a.state.Stale = unknown, stale
	a.mu.Unlock()
	return next, ipvs.Find()
}

// cluster is what is known of the cluster; stale where it is what an earlier process knew. Without the API server and without that the
// node stays as it is, unless it has no pods yet: then the table stands with nothing in it, so that pods can start and wait.
func (a *Agent) cluster(links map[string]podlink.Attachment) (c *watch.Cluster, stale bool, err error) {
	_, away := a.Cluster.Away()
	c = a.Cluster.Snapshot()
	waited := time.Since(a.began)
	if c == nil && (waited < awayPatience || away == nil && waited < syncPatience) {
		return nil, false, reconcile.Waiting("asks the API server for policies")
	}
	if !a.loaded {
		a.loaded = true
		boot, _ := procfs.Read(paths.BootID) // without it the file counts as one of an earlier boot
		if a.file, err = load(a.File, a.Node, boot); err != nil {
			a.Log.Warn("read what policies depended on: the file is not used", "err", err)
		}
		if a.file != nil && c != nil {
			a.locals.place(a.file, links) // pods that the API server no longer shows, and that still run
		}
	}
	if c != nil {
		a.file, a.kept = nil, nil
		return c, false, nil
	}
	if a.kept == nil && a.file != nil {
		// What the kernel holds may be of policies that came later. Without a table old ones are better than none.
		if here, err := present(); err != nil {
			return nil, false, err
		} else if here && a.saver.behind() {
			return nil, false, fmt.Errorf("what is known of network policies (%s) is older than what is in force%s; pods that run are not touched, new ones wait until the API server answers", a.File, since(a.Cluster.Away()))
		}
		a.kept = a.file
	}
	if a.kept == nil && len(links) == 0 {
		a.kept = &watch.Cluster{Snapshot: &policy.Snapshot{Node: a.Node}}
	}
	if a.kept == nil {
		return nil, false, fmt.Errorf("nothing is known of network policies%s; pods that run are not touched, new ones wait", since(a.Cluster.Away()))
	}
	return a.kept, true, nil
}

// apply has the kernel hold what policies say.
func (a *Agent) apply(ctx context.Context, s *policy.Snapshot, owners []owner, stale bool) error {
	a.dirty.Store(false)
	rules := a.compiler.Compile(s)
	if here, err := present(); err != nil {
		a.dirty.Store(true)
		return err
	} else if !here {
		// With its rules comes the table's gate: pods that are there already lose nothing by it.
		if err := a.group(owners); err != nil {
			a.dirty.Store(true)
			return err
		}
	}
	if !stale {
		if err := a.saver.begin(); err != nil {
			a.dirty.Store(true)
			return fmt.Errorf("note that what is kept of network policies is old: %w; make the folder of %s writable", err, a.Note)
		}
	}
	change, err := a.Table.Apply(ctx, rules, a.options())
	if err != nil {
		a.dirty.Store(true)
		return err
	}
	if change.Rechecked > 0 || a.rules == nil {
		select {
		case a.recheck <- struct{}{}:
		default: // one is asked for already
		}
	}
	if len(change.Repaired) > 0 && !change.First {
		a.Log.Warn("put policies back that somebody else had changed", "changes", change.Repaired)
	}
	isolated := len(rules.In)
	for addr := range rules.Out {
		if _, both := rules.In[addr]; !both {
			isolated++
		}
	}
	a.mu.Lock()
	first := !a.state.InForce
	a.state.InForce, a.state.Policies, a.state.Isolated = true, len(s.Policies), isolated
	a.snapshot, a.rules = s, rules
	a.mu.Unlock()
	if first {
		a.Log.Info("network policies are in force", "policies", len(s.Policies), "isolated", isolated, "stale", stale)
	}
	a.notes.faults(a.Log, s, rules.Faults)
	return nil
}

// group lets out the pods whose policies are in force, and holds those of which nothing is known (any more).
func (a *Agent) group(owners []owner) error {
	var out, in []int
	for i, o := range owners {
		switch grouped := o.link.Group == names.PolicyLinkGroup; {
		case o.known && !grouped && o.link.Ready:
			out = append(out, o.link.Index)
			owners[i].link.Group = names.PolicyLinkGroup
		case !o.known && grouped:
			in = append(in, o.link.Index)
			owners[i].link.Group = 0
		}
	}
	if len(in) > 0 && a.Hold != nil {
		release, err := a.Hold()
		if err != nil {
			return fmt.Errorf("have all packets meet the rules: %w", err)
		}
		defer release()
	}
	err := errors.Join(a.Links.SetGroup(names.PolicyLinkGroup, out...), a.Links.SetGroup(0, in...))
	if err != nil {
		return fmt.Errorf("set the groups of pods' links: %w", err)
	}
	return nil
}

// rechecks has flows of pods that lost rights looked through, until ctx ends: those without a forbidden one take the short way again.
func (a *Agent) rechecks(ctx context.Context) {
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
			return
		case <-a.recheck:
		}
		for wait := recheckFirst; ctx.Err() == nil; wait = recheckAgain {
			reconcile.Sleep(ctx, wait)
			left, err := a.Table.Recheck(ctx, a.judge())
			if err != nil && ctx.Err() == nil {
				a.Log.Warn("look through the flows of pods that lost rights", "err", err)
				a.Failed()
			}
			if left == 0 {
				break
			}
		}
	}
}

// judge returns what says whether each end of a flow allows it, by what is in force. The own node's flows pass no rule.
func (a *Agent) judge() func(policy.Flow) (egress, ingress bool) {
	a.mu.Lock()
	rules := a.rules
	a.mu.Unlock()
	here := map[netip.Addr]bool{}
	addrs, _ := net.InterfaceAddrs() // without them a pod stays under recheck until the next look
	for _, addr := range addrs {
		if p, err := netip.ParsePrefix(addr.String()); err == nil {
			here[p.Addr().Unmap()] = true
		}
	}
	return func(f policy.Flow) (egress, ingress bool) {
		if here[f.Src] || here[f.Dst] {
			return true, true
		}
		egress, _ = rules.Judge(rules, policy.Egress, f) // a Ruleset's own look-ups do not fail
		ingress, _ = rules.Judge(rules, policy.Ingress, f)
		return egress, ingress
	}
}

// present reports whether the kernel has the table's rules that meet packets, which come last.
func present() (bool, error) {
	chain, err := nfnl.Request(unix.NFPROTO_INET, unix.NFT_MSG_GETCHAIN, 0, nfnl.Name(unix.NFTA_CHAIN_TABLE, policy.Table), nfnl.Name(unix.NFTA_CHAIN_NAME, names.PolicyChain))
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look for chain %s of nft table inet %s: %w", names.PolicyChain, policy.Table, err)
	}
	use := nfnl.Get(chain[0], unix.NFTA_CHAIN_USE) // `nft flush table` leaves chains
	return slices.ContainsFunc(use, func(b byte) bool { return b != 0 }), nil
}

// Off takes everything off the node that an Agent has put there.
func Off(ctx context.Context, t Table, l Links) error {
	if err := t.Remove(ctx); err != nil {
		return err
	}
	links, err := l.Attached()
	if err != nil {
		return fmt.Errorf("list pods' links: %w", err)
	}
	var ours []int
	for _, link := range links {
		if link.Group == names.PolicyLinkGroup {
			ours = append(ours, link.Index)
		}
	}
	return l.SetGroup(0, ours...)
}
