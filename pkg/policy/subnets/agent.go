package subnets

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"

	"github.com/headcni/headcni/pkg/kube"
	"github.com/headcni/headcni/pkg/networking/podlink"
	"github.com/headcni/headcni/pkg/policy/agent"
	"github.com/headcni/headcni/pkg/reconcile"
	"github.com/headcni/headcni/pkg/tailscale"
)

const (
	// fullCheck is how often links are looked at although nobody told of a change.
	fullCheck = time.Minute
	// retry is how long after a failure it is tried again.
	retry = time.Second
	// action is the word of our events.
	action = "subnets"
)

// Table is the kernel's: an nft.Tables.
type Table interface {
	Consent(map[netip.Prefix][]int) (changed int, err error)
	ConsentChanges(context.Context) (<-chan struct{}, error)
}

// Links are the node's pods': a podlink.Handle.
type Links interface {
	Attached() (map[string]podlink.Attachment, error)
}

// Config is what an Agent works with.
type Config struct {
	Log    *slog.Logger
	Client kube.Client
	// Node is the name of this one.
	Node  string
	Table Table
	Links Links
	// Changed is called when Named or Err may say something else.
	Changed func()
}

// Agent keeps, for the pods of one node, who may use which subnet. A nil one knows of no Namespaces. Make it with New.
type Agent struct {
	Config
	loop     *reconcile.Loop
	reporter *agent.Reporter

	cancel  context.CancelFunc
	running sync.WaitGroup

	mu         sync.Mutex
	namespaces map[string]namespace // those with the annotation
	synced     bool
	ranges     bool // the cluster's are known, taken
	taken      []netip.Prefix
	told       map[string]bool // faults
	denied     error           // the API server lets us not read Namespaces
	failed     error           // the kernel is not as it should be
}

// namespace is what is kept of a Namespace.
type namespace struct {
	name string
	uid  types.UID
	text string
}

func trim(n *corev1.Namespace) namespace {
	return namespace{name: n.Name, uid: n.UID, text: n.Annotations[kube.TailnetSubnets]}
}

// New makes an Agent that has touched nothing yet.
func New(c Config) *Agent {
	events := kube.Reporter{Client: c.Client, Program: "daemon", Instance: c.Node}
	a := &Agent{
		Config: c, loop: reconcile.NewLoop(), reporter: agent.NewReporter(events.Write), cancel: func() {},
		namespaces: map[string]namespace{}, told: map[string]bool{},
	}
	a.loop.Pass = func(context.Context, bool) time.Duration { return a.pass() }
	a.loop.Settle = func(time.Duration) time.Duration { return 2 * time.Millisecond }
	return a
}

// Start begins to work until ctx ends. events calls a function for what a channel signals. What is in the kernel stays.
func (a *Agent) Start(
	ctx context.Context, wg *sync.WaitGroup, events func(context.Context, func(context.Context) (<-chan struct{}, error), func()),
) {
	if a == nil {
		return
	}
	ctx, a.cancel = context.WithCancel(ctx)
	for _, run := range []func(){
		func() { a.follow(ctx) },
		func() { a.loop.Run(ctx) },
		func() { a.reporter.Run(ctx) },
		func() { events(ctx, agent.LinkChanges, a.loop.Wake) },
		func() { events(ctx, a.Table.ConsentChanges, a.loop.Wake) },
	} {
		a.running.Go(run)
	}
	wg.Go(a.running.Wait)
}

// Stop ends what Start began.
func (a *Agent) Stop() {
	if a != nil {
		a.cancel()
		a.running.Wait()
	}
}

// Wake has it look for a new pod.
func (a *Agent) Wake() {
	if a != nil {
		a.loop.Wake()
	}
}

// Err is what keeps consent from being in force.
func (a *Agent) Err() error {
	if a == nil {
		return nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	return errors.Join(a.denied, a.failed)
}

// Named are the subnets that Namespaces ask for, if that is known. taken are the cluster's own ranges, which none of them is in.
func (a *Agent) Named(taken []netip.Prefix) (named []netip.Prefix, known bool) {
	if a == nil {
		return nil, true
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.ranges || !slices.Equal(a.taken, taken) {
		a.ranges, a.taken = true, slices.Clone(taken)
		a.loop.Wake()
	}
	for _, list := range a.parse() {
		named = append(named, list...)
	}
	slices.SortFunc(named, netip.Prefix.Compare)
	return slices.Compact(named), a.synced
}

// News are what Namespaces ask for, and what a tailscaled says: t is nil while it does not answer, prefs too. cluster are the ranges of
// pods and services.
func (a *Agent) News(cluster []netip.Prefix, t *tailscale.Status, prefs *tailscale.SavedPrefs) News {
	n := News{Cluster: cluster, Tailnet: t != nil && t.State == tailscale.Running && prefs != nil}
	n.Named, n.NamedKnown = a.Named(cluster)
	n.Asked = n.NamedKnown || a.Err() != nil
	if n.Tailnet {
		n.Exit = prefs.ExitNode
		for _, p := range t.Peers {
			n.Advertised = append(n.Advertised, p.Allowed...)
		}
	}
	return n
}

// parse reads the annotations, and tells of what is wrong with them once.
func (a *Agent) parse() map[string][]netip.Prefix {
	out := map[string][]netip.Prefix{}
	told := map[string]bool{}
	for _, n := range a.namespaces {
		named, faults := Parse(n.text, a.taken)
		out[n.name] = named
		if len(faults) == 0 {
			continue
		}
		note := fmt.Sprintf("annotation %s: %s; what is right counts", kube.TailnetSubnets, strings.Join(faults, "; "))
		key := string(n.uid) + note
		if told[key] = true; a.told[key] {
			continue
		}
		a.Log.Warn("a Namespace asks for a subnet that it cannot have", "namespace", n.name, "problem", note)
		hash := fnv.New64a()
		hash.Write([]byte(key))
		a.reporter.Tell(kube.Event{
			Time: time.Now(), Key: fmt.Sprintf("%x", hash.Sum64()), Action: action, Note: note,
			About: corev1.ObjectReference{Kind: "Namespace", APIVersion: "v1", Name: n.name, UID: n.uid},
		})
	}
	a.told = told
	return out
}

// follow keeps Namespaces known.
func (a *Agent) follow(ctx context.Context) {
	kube.Follow(ctx, a.Client, a.Client.Namespaces(), &corev1.Namespace{}, kube.Feed[*corev1.Namespace, namespace]{
		Trim: trim, Answered: a.answered,
		Replace: func(all []namespace) {
			a.change(func() bool {
				clear(a.namespaces)
				for _, n := range all {
					if n.text != "" {
						a.namespaces[n.name] = n
					}
				}
				a.synced = true
				return true
			})
		},
		Set: func(n namespace) {
			a.change(func() bool {
				before := a.namespaces[n.name]
				if n.text == "" {
					delete(a.namespaces, n.name)
				} else {
					a.namespaces[n.name] = n
				}
				return before.text != n.text
			})
		},
		Remove: func(n namespace) {
			a.change(func() bool {
				_, had := a.namespaces[n.name]
				delete(a.namespaces, n.name)
				return had
			})
		},
	})
}

// change does what changes what is known, and tells of it where it reports that it did.
func (a *Agent) change(do func() bool) {
	a.mu.Lock()
	news := do()
	a.mu.Unlock()
	if news {
		a.loop.Wake()
		a.Changed()
	}
}

// answered notes that the API server does not let us; that it is away others tell.
func (a *Agent) answered(err error) {
	var denied error
	if apierrors.IsForbidden(err) || apierrors.IsUnauthorized(err) {
		denied = fmt.Errorf("read namespaces: %w; the service account %s must be allowed to list and watch them (see the chart's ClusterRole); "+
			"who may use subnets stays as it is", err, kube.DaemonAccount)
	} else if err != nil {
		return
	}
	a.fails(&a.denied, denied)
}

func (a *Agent) fails(where *error, err error) {
	a.mu.Lock()
	news := fmt.Sprint(*where) != fmt.Sprint(err)
	*where = err
	a.mu.Unlock()
	if news {
		a.Changed()
	}
}

// pass has the kernel hold what is known.
func (a *Agent) pass() time.Duration {
	a.mu.Lock()
	if !a.synced || !a.ranges {
		a.mu.Unlock()
		return fullCheck // what an earlier process knew is in force
	}
	named := a.parse()
	a.mu.Unlock()
	links, err := a.Links.Attached()
	if err == nil {
		_, err = a.Table.Consent(consent(named, links))
	}
	a.fails(&a.failed, err)
	if err != nil {
		return retry
	}
	return fullCheck
}

// consent says which links' pods may use which subnet. A pod's link says which Namespace it is of.
func consent(named map[string][]netip.Prefix, links map[string]podlink.Attachment) map[netip.Prefix][]int {
	out := map[netip.Prefix][]int{}
	for _, name := range slices.Sorted(maps.Keys(links)) {
		namespace, _, ok := strings.Cut(links[name].Label, "/")
		if !ok {
			continue
		}
		for _, p := range named[namespace] {
			out[p] = append(out[p], links[name].Index)
		}
	}
	return out
}
