// Package fastpath has the kernel carry flows between pods of one node past the node's rules once they stand, where it can: by a flowtable.
//
// Such a flow is asked neither by rules nor by routing until it ends, its links go or the flowtable does. So whoever takes rights away
// takes the flowtable away first (Hold): from then on each packet meets the rules, and only flows that these let through come back.
package fastpath

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"sigs.k8s.io/knftables"

	"github.com/headcni/headcni/internal/nfcmd"
	"github.com/headcni/headcni/internal/nfnl"
	"github.com/headcni/headcni/internal/nlwatch"
	"github.com/headcni/headcni/internal/rtnl"
	"github.com/headcni/headcni/pkg/config/names"
	"github.com/headcni/headcni/pkg/reconcile"
)

const (
	// fullCheck is how often it is looked at although nobody told of a change.
	fullCheck = time.Minute
	// retry is how long after a failure it is tried again.
	retry = 10 * time.Second
	// wait gathers links that come, and changes of policies. Pods do not wait for us: they talk a little slower.
	wait = time.Second

	flowtable = "pods"
	chain     = "forward"
	// priority is behind everybody's: what any rule of the forward hook drops is not taken up.
	priority = "1000"
	// oneIn is how many packets of a flow pass, on average, until it is taken up: short connections are over before that, and would only
	// pay for it. The kernel's own count of a connection's packets needs net.netfilter.nf_conntrack_acct, which is the host's.
	oneIn = 16
)

// rule takes up flows that stand, as the kernel sees them at the end of the forward hook. Translated ones stay out: who ends these deletes
// what the kernel tracks, and expects that to be all. What IPVS translates conntrack does not call so: an answer has the service's address here,
// and not that of who sent it, to whom the way back by its link leads.
var rule = fmt.Sprintf(`iifname "%s" oifname "%[1]s" meta l4proto { tcp, udp } ct state established ct status & (snat | dnat) == 0 numgen random mod %d == 0 fib saddr . iif oif exists flow add @%s`,
	names.PodLinks, oneIn, flowtable)

// Links are the node's pods': a podlink.Handle.
type Links interface {
	// Names are those of the host's ends.
	Names() ([]string, error)
}

// Path keeps the flowtable of the network namespace of its callers. Make it with New. It is safe for concurrent use.
type Path struct {
	log   *slog.Logger
	links Links
	on    bool
	loop  *reconcile.Loop

	// Of the loop alone.
	said   string
	probed bool

	mu    sync.Mutex
	nft   nfcmd.NFT
	conn  nfnl.Conn
	held  int
	holds uint64 // how often one began or ended
	state State
}

// State is how it stands.
type State struct {
	// Links are how many pods' links are in it. Why says why there is no fast path, "" where there is one.
	Links int
	Why   string
}

// New makes a Path that has touched nothing yet. One that is not on takes away what an earlier one has left.
func New(log *slog.Logger, links Links, on bool) *Path {
	p := &Path{log: log, links: links, on: on, loop: reconcile.NewLoop(), nft: nfcmd.NFT{Modules: modules}, state: State{Why: "not yet"}}
	if !on {
		p.state.Why = "switched off (network.fastPath)"
	}
	p.loop.Pass = func(ctx context.Context, _ bool) time.Duration { return p.pass(ctx) }
	p.loop.Settle = func(time.Duration) time.Duration { return wait }
	return p
}

// modules are the kernel's that the table needs.
const modules = "nf_tables, nf_conntrack, nf_flow_table, nf_flow_table_inet, nft_flow_offload, nft_ct, nft_numgen and nft_fib_inet"

// Start takes away what an earlier process has left, and then keeps the flowtable until ctx ends. events calls a function for what a
// channel signals.
func (p *Path) Start(
	ctx context.Context, wg *sync.WaitGroup, events func(context.Context, func(context.Context) (<-chan struct{}, error), func()),
) {
	p.mu.Lock()
	err := p.remove()
	p.mu.Unlock()
	if err != nil {
		p.log.Warn("take away what an earlier process has left of the fast path between pods", "err", err)
	}
	if p.on {
		wg.Go(func() { p.loop.Run(ctx) })
		wg.Go(func() { events(ctx, changes, p.loop.Wake) })
	}
}

// State says how it stands.
func (p *Path) State() *State {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.state
	return &s
}

// Hold has every packet meet the rules from its return on, until release is called, and flows that the rules let through then are taken up
// again a little later. It is for who takes rights away, and is to be called before that: who is killed in between leaves no flow behind
// that goes past the rules. A nil Path has nothing to hold.
func (p *Path) Hold() (release func(), err error) {
	if p == nil {
		return func() {}, nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.remove(); err != nil {
		return nil, err
	}
	p.held++
	p.holds++
	return sync.OnceFunc(func() {
		p.mu.Lock()
		p.held--
		p.holds++
		p.mu.Unlock()
		p.loop.Wake()
	}), nil
}

// Leave takes the flowtable away for good, as when the daemon stops: who comes next may take rights away without knowing of it.
func (p *Path) Leave() {
	if _, err := p.Hold(); err != nil {
		p.log.Warn("take the fast path between pods away; do it by `nft delete table inet "+names.FastTable+"`", "err", err)
	}
}

// Remove takes everything away that a Path has made. Twice is fine.
func Remove() error { return new(Path).remove() }

// remove needs the lock. The flowtable's hooks are gone when it returns, its flows a little later. What the kernel tracks stays.
func (p *Path) remove() error {
	b := nfnl.NewBatch(unix.NFPROTO_INET)
	b.Add(unix.NFT_MSG_DELTABLE, 0, nfnl.Name(unix.NFTA_TABLE_NAME, names.FastTable))
	if err := p.conn.Run(b); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("delete table inet %s: %w", names.FastTable, p.nft.Explain(err))
	}
	return nil
}

// pass has the flowtable have all links. It tells of a failure once: pods talk without it.
func (p *Path) pass(ctx context.Context) time.Duration {
	state, next, err := p.look(ctx)
	if ctx.Err() != nil {
		return fullCheck
	}
	text := ""
	if err != nil {
		state, next, text = State{Why: err.Error()}, retry, err.Error()
	}
	if text != "" && text != p.said {
		p.log.Warn("keep the fast path between pods; pods talk, a little slower", "err", err)
	}
	p.said = text
	p.mu.Lock()
	p.state = state
	p.mu.Unlock()
	return next
}

// missing is of a kernel that has no flowtables, or may not load them.
const missing = "this kernel has no flowtables (CONFIG_NF_FLOW_TABLE, CONFIG_NFT_FLOW_OFFLOAD)"

// forgets is of a kernel before 5.14: a connection that comes back from the flowtable, as when it is idle for 30 s, is forgotten two minutes
// later, and policies take its next packet for the first of another.
const forgets = "this kernel forgets idle connections that were in a flowtable (Linux before 5.14)"

// remembers: this sysctl came with the change that has the kernel keep its own timeouts for such connections.
func remembers() bool {
	_, err := os.Stat("/proc/sys/net/netfilter/nf_flowtable_tcp_timeout")
	return err == nil
}

func (p *Path) look(ctx context.Context) (state State, next time.Duration, err error) {
	if !p.probed {
		has, err := p.probe(ctx)
		if err != nil {
			return State{}, 0, err
		}
		if !has {
			return State{Why: missing}, fullCheck, nil
		}
		if !remembers() {
			return State{Why: forgets}, fullCheck, nil
		}
		p.probed = true
	}
	links, err := p.links.Names()
	if err != nil {
		return State{}, 0, fmt.Errorf("list pods' links: %w", err)
	}
	state.Links = len(links)
	if len(links) < 2 {
		return state, fullCheck, nil
	}
	p.mu.Lock()
	before := p.holds
	p.mu.Unlock()
	nfnl.AwaitPackets() // one that an earlier set of rules let through must not be taken up after Hold
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.held > 0 || p.holds != before {
		return State{Why: "waits for NetworkPolicies that change"}, wait, nil
	}
	return state, fullCheck, p.write(ctx, links)
}

// write needs the lock. It adds links that lack, and makes everything anew where there is nothing, or where the kernel takes no more.
func (p *Path) write(ctx context.Context, links []string) error {
	have, there, err := devices()
	if err != nil {
		return err
	}
	lack := slices.DeleteFunc(slices.Clone(links), func(l string) bool { return slices.Contains(have, l) })
	if there && len(lack) == 0 {
		return nil
	}
	if there {
		// Kernels before 5.8 say yes to this, or no, and add nothing.
		err := p.nft.Write(ctx, func(tx *knftables.Transaction) { tx.Add(flows(lack)) })
		if err == nil {
			if have, _, err = devices(); err == nil && !slices.ContainsFunc(lack, func(l string) bool { return !slices.Contains(have, l) }) {
				return nil
			}
		}
	}
	err = p.nft.Write(ctx, func(tx *knftables.Transaction) {
		table := &knftables.Table{Family: knftables.InetFamily, Name: names.FastTable}
		tx.Add(table) // so that there is one to delete
		tx.Delete(table)
		define(tx, links)
	})
	if err != nil && gone(p.links, links) {
		p.loop.Wake() // nft refuses all of them for the one
		return nil
	}
	return err
}

// gone reports whether one of some links is there no more.
func gone(l Links, links []string) bool {
	now, err := l.Names()
	return err == nil && slices.ContainsFunc(links, func(l string) bool { return !slices.Contains(now, l) })
}

// probe asks the kernel without changing anything.
func (p *Path) probe(ctx context.Context) (has bool, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	err = p.nft.Check(ctx, func(tx *knftables.Transaction) { define(tx, []string{"lo"}) })
	if err == nil {
		return true, nil
	}
	if nfcmd.Lacks(err) {
		return false, nil
	}
	return false, fmt.Errorf("ask the kernel for flowtables: %w", err)
}

func define(tx *knftables.Transaction, links []string) {
	tx.Add(&knftables.Table{Family: knftables.InetFamily, Name: names.FastTable})
	tx.Add(flows(links))
	tx.Add(&knftables.Chain{
		Family: knftables.InetFamily, Table: names.FastTable, Name: chain, Type: knftables.PtrTo(knftables.FilterType),
		Hook: knftables.PtrTo(knftables.ForwardHook), Priority: knftables.PtrTo(knftables.BaseChainPriority(priority)),
		Policy: knftables.PtrTo(knftables.AcceptPolicy),
	})
	tx.Add(&knftables.Rule{Family: knftables.InetFamily, Table: names.FastTable, Chain: chain, Rule: rule})
}

func flows(links []string) *knftables.Flowtable {
	return &knftables.Flowtable{
		Family: knftables.InetFamily, Table: names.FastTable, Name: flowtable, Priority: knftables.PtrTo(knftables.FilterIngressPriority), Devices: links,
	}
}

// Attribute numbers that golang.org/x/sys lacks (include/uapi/linux/netfilter/nf_tables.h).
const (
	nftaFlowtableTable, nftaFlowtableName, nftaFlowtableHook = 1, 2, 3
	nftaFlowtableHookDevs                                    = 3
)

// devices are the links that the kernel's flowtable has. A link that goes leaves it.
func devices() (list []string, there bool, err error) {
	res, err := nfnl.Request(unix.NFPROTO_INET, unix.NFT_MSG_GETFLOWTABLE, 0, nfnl.Name(nftaFlowtableTable, names.FastTable), nfnl.Name(nftaFlowtableName, flowtable))
	if errors.Is(err, unix.ENOENT) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, fmt.Errorf("look at flowtable inet %s %s: %w", names.FastTable, flowtable, nfcmd.Explain(err))
	}
	for _, r := range res {
		devs, err := nfnl.List(nfnl.Get(nfnl.Get(r, nftaFlowtableHook), nftaFlowtableHookDevs))
		if err != nil {
			return nil, false, err
		}
		for _, d := range devs {
			list = append(list, nfnl.Text(d.Value))
		}
	}
	return list, true, nil
}

// changes signals soon after a pod's link came or went.
func changes(ctx context.Context) (<-chan struct{}, error) {
	out, err := nlwatch.Watch(ctx, unix.NETLINK_ROUTE, nlwatch.Debounce, relevant, unix.RTNLGRP_LINK)
	if err != nil {
		return nil, fmt.Errorf("subscribe to events of links: %w", err)
	}
	return out, nil
}

func relevant(_ uint16, msg []byte) bool {
	l, err := rtnl.ParseLink(msg)
	return err != nil || strings.HasPrefix(l.Name, names.PodLinkPrefix)
}
