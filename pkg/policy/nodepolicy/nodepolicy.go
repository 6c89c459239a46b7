// Package nodepolicy enforces NetworkPolicies on a node: it puts together who watches, compiles, applies, explains and counts.
package nodepolicy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"path/filepath"
	"sync"
	"time"

	"github.com/headcni/headcni/internal/atomicfile"
	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/kube"
	"github.com/headcni/headcni/pkg/kube/nodeview"
	"github.com/headcni/headcni/pkg/monitoring"
	"github.com/headcni/headcni/pkg/networking/podlink"
	"github.com/headcni/headcni/pkg/nft"
	"github.com/headcni/headcni/pkg/nodestatus"
	"github.com/headcni/headcni/pkg/policy"
	"github.com/headcni/headcni/pkg/policy/agent"
	"github.com/headcni/headcni/pkg/policy/enforce"
	"github.com/headcni/headcni/pkg/policy/explain"
	"github.com/headcni/headcni/pkg/policy/nflog"
	"github.com/headcni/headcni/pkg/policy/report"
	"github.com/headcni/headcni/pkg/policy/watch"
)

// Enforcer enforces NetworkPolicies beside the node's passes. A nil one does nothing. Make it with New.
type Enforcer struct {
	watch    *watch.Watch
	agent    *agent.Agent
	table    *enforce.Table
	reporter *agent.Reporter
	strict   bool
	log      *slog.Logger

	cancel  context.CancelFunc
	running sync.WaitGroup
}

// snapshotPath is where the last snapshot is kept, notePath is there in this boot while it is not behind the kernel, and rulesPath is what the
// kernel's rules looked like when they were written.
func snapshotPath() string { return filepath.Join(paths.StateDir, "policy.json") }
func notePath() string     { return filepath.Join(paths.RunDir, "policy-kept") }
func rulesPath() string    { return filepath.Join(paths.RunDir, "policy-rules.json") }

// Options are what an Enforcer works with.
type Options struct {
	Kubernetes *nodeview.Watch
	Metrics    *monitoring.Metrics
	Log        *slog.Logger
	// Strict isolates a pod until its policies are known.
	Strict bool
	// Hold has each packet meet the rules until release is called, where flows go past them else.
	Hold func() (release func(), err error)
	// Changed is called when Err may say something else.
	Changed func()
}

// New changes nothing.
func New(o Options) *Enforcer {
	k := o.Kubernetes
	events := kube.Reporter{Client: k.Client(), Program: "daemon", Instance: k.Node()}
	p := &Enforcer{
		watch: watch.New(k.Client(), k.Node(), k.Nodes), table: enforce.New(rulesPath()),
		reporter: agent.NewReporter(events.Write), cancel: func() {}, log: o.Log, strict: o.Strict,
	}
	p.table.Hold = o.Hold
	k.OnAddrs(p.watch.NodesChanged)
	p.agent = agent.New(agent.Config{
		Log: o.Log, Node: k.Node(), Cluster: p.watch, Table: p.table, Links: new(podlink.Handle),
		Options: policy.Options{Strict: p.strict}, Hold: o.Hold, File: snapshotPath(), Note: notePath(),
		Changed: o.Changed, Tell: p.reporter.Tell, Synced: o.Metrics.PolicySynced, Failed: o.Metrics.PolicyFailed,
	})
	return p
}

// Err is why policies are not in force.
func (p *Enforcer) Err() error { return p.agent.Err() }

// Start begins to enforce policies until ctx ends. events calls a function for what a channel signals.
func (p *Enforcer) Start(
	ctx context.Context, wg *sync.WaitGroup, events func(context.Context, func(context.Context) (<-chan struct{}, error), func()),
) {
	if p == nil {
		return
	}
	ctx, p.cancel = context.WithCancel(ctx)
	for _, run := range []func(){
		func() { p.watch.Run(ctx, p.agent.Wake) },
		func() { p.agent.Run(ctx) },
		func() { p.reporter.Run(ctx) },
		func() { events(ctx, agent.LinkChanges, p.agent.Wake) },
		func() { events(ctx, p.table.Changes, p.agent.Repair) },
	} {
		p.running.Go(run)
	}
	wg.Go(p.running.Wait)
}

// Wake has it look for a new pod.
func (p *Enforcer) Wake() {
	if p != nil {
		p.agent.Wake()
	}
}

// Stop ends what Start began. What is in the kernel stays.
func (p *Enforcer) Stop() {
	if p != nil {
		p.cancel()
		p.running.Wait()
	}
}

// leaveTimeout bounds what is asked when the daemon stops.
const leaveTimeout = 3 * time.Second

// Leave is called when the daemon stops. Policies stay in force, unless who comes next enforces none: new pods would be unknown for
// ever. The last snapshot stays in any case: with it they are back at once where the rights were taken by mistake.
func (p *Enforcer) Leave() {
	if p == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), leaveTimeout)
	defer cancel()
	if !p.watch.Revoked(ctx) {
		return
	}
	p.log.Warn("NetworkPolicies are taken off this node: its daemons may read them no longer, as after a rollback to a version that enforces none")
	if err := Remove(ctx); err != nil {
		p.log.Error("take NetworkPolicies off this node; do it by `nft delete table inet headcni-policy`", "err", err)
	}
}

// Remove takes the table away, and puts pods' links back into the group that they had.
func Remove(ctx context.Context) error {
	var links podlink.Handle
	defer links.Close()
	return agent.Off(ctx, enforce.New(""), &links)
}

// RemoveFiles removes what is kept on disk.
func RemoveFiles() error {
	var errs []error
	for _, path := range []string{notePath(), snapshotPath(), rulesPath()} {
		errs = append(errs, atomicfile.Remove(path), atomicfile.Sweep(path))
	}
	return errors.Join(errs...)
}

// linksNow reads pods' links anew each time, for several who ask at once.
type linksNow struct{}

func (linksNow) Attached() (map[string]podlink.Attachment, error) {
	var h podlink.Handle
	defer h.Close()
	return h.Attached()
}

// Answers are for those who ask why.
func (p *Enforcer) Answers() map[string]http.HandlerFunc {
	if p == nil {
		off := func(w http.ResponseWriter, _ *http.Request) {
			http.Error(w, "this node enforces no NetworkPolicies: set network.networkPolicy to true (chart: config.network.networkPolicy), on a node with a Kubernetes API", http.StatusUnprocessableEntity)
		}
		return map[string]http.HandlerFunc{
			"GET " + report.ListPath: off, "GET " + report.ExplainPath: off, "GET " + report.DropsPath: off, "GET " + report.FollowPath: off,
		}
	}
	d := explain.Drops{
		Explainer: &explain.Explainer{State: p.explained, Kernel: p.table, Links: linksNow{}, Beside: nft.Beside}, Log: p.agent.LogDenied, Read: nflog.Read,
	}
	return d.Handlers()
}

func (p *Enforcer) explained() (*explain.State, error) {
	snapshot, rules := p.agent.Current()
	err := p.agent.Err()
	if snapshot == nil {
		return nil, fmt.Errorf("no NetworkPolicy is in force yet: %w", err)
	}
	out := &explain.State{Snapshot: snapshot, Rules: rules, Strict: p.strict, Problem: err}
	for _, u := range p.agent.State().Unknown {
		out.Waiting = append(out.Waiting, explain.Waiting{Pod: u.Pod, Why: u.Why, Since: u.Since})
	}
	return out, nil
}

// denied are the packets that policies dropped, by pod.
func (p *Enforcer) denied(s *monitoring.PolicyState) error {
	snapshot, _ := p.agent.Current()
	if snapshot == nil {
		return nil
	}
	n, err := p.table.Denied(context.Background())
	if err != nil {
		return err
	}
	s.DeniedUnknown, s.DeniedStateless = n.Unknown, n.Stateless
	all := map[monitoring.Denied]uint64{} // a pod that comes again has its predecessor's name
	for _, pod := range snapshot.Pods {
		if pod.Node != snapshot.Node {
			continue
		}
		for _, a := range pod.IPs {
			for direction, counts := range map[string]map[netip.Addr]uint64{"ingress": n.In, "egress": n.Out} {
				if packets, isolated := counts[a]; isolated {
					all[monitoring.Denied{Namespace: pod.Namespace, Pod: pod.Name, Direction: direction}] += packets
				}
			}
		}
	}
	for d, packets := range all {
		d.Packets = packets
		s.Denied = append(s.Denied, d)
	}
	return nil
}

// inForce: what was in force once may be no more.
func (p *Enforcer) inForce(s agent.State) bool { return s.InForce && p.agent.Err() == nil }

// Metrics are for a scrape.
func (p *Enforcer) Metrics() monitoring.PolicyState {
	if p == nil {
		return monitoring.PolicyState{}
	}
	s := p.agent.State()
	out := monitoring.PolicyState{Enforced: p.inForce(s), Unknown: len(s.Unknown)}
	if err := p.denied(&out); err != nil {
		p.log.Warn("count what network policies drop", "err", err)
	}
	size := p.table.Stats()
	out.Sets, out.Elements, out.Chains, out.Recheck = size.Sets+size.Maps, size.Elements, size.Chains, size.Recheck
	if len(s.Unknown) > 0 { // the oldest comes first
		out.OldestUnknown = time.Since(s.Unknown[0].Since)
	}
	return out
}

// Status is what people see of it.
func (p *Enforcer) Status() *nodestatus.Policy {
	if p == nil {
		return nil
	}
	s := p.agent.State()
	out := &nodestatus.Policy{InForce: p.inForce(s), Policies: s.Policies, Isolated: s.Isolated, Stale: s.Stale}
	for _, u := range s.Unknown {
		out.Unknown = append(out.Unknown, nodestatus.UnknownPod{Pod: u.Pod, Since: u.Since, Why: u.Why})
	}
	return out
}
