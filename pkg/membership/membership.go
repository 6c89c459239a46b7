// Package membership makes a node a member of the tailnet and keeps it one: login, keys, approved routes, and what Headscale
// knows of the node.
package membership

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/secret"
	"github.com/headcni/headcni/pkg/findings"
	"github.com/headcni/headcni/pkg/headscale"
	"github.com/headcni/headcni/pkg/kube/nodeview"
	"github.com/headcni/headcni/pkg/reconcile"
	"github.com/headcni/headcni/pkg/tailscale"
	"github.com/headcni/headcni/pkg/tailscaled"
)

const (
	// lookInterval is how often Headscale is asked for what it was asked before.
	lookInterval = time.Minute
	// followRetry is how long after tailscaled could not be followed it is tried again.
	followRetry = time.Second
	// joinKeyLife is how long a pre-auth key that we make for ourselves can be used.
	joinKeyLife = 10 * time.Minute
	// approvalSettles is how long Headscale may take to hand out routes that were approved; half a second is usual.
	approvalSettles = 10 * time.Second
)

// Member is this node's membership in the tailnet: the tailscaled that it uses and, where it holds an API key, its dealings
// with Headscale. Make it with New. All methods but Look, Watch and Rearm are for one goroutine alone.
type Member struct {
	cfg        config.Config
	log        *slog.Logger
	headscale  *headscale.Connector
	kubernetes *Kubernetes // nil without Kubernetes

	client      *tailscale.Client // for socket, nil while none is known
	minted      secret.Secret     // a key that was made to join with
	mintedUntil time.Time
	approvedAt  time.Time // when we last approved something
	// advertisedAt is when we last changed what tailscaled advertises.
	advertisedAt time.Time
	confirmed    confirmation
	checkedAt    time.Time // when Check last had an answer, and
	warned       error     // what it warned of
	unknown      time.Time // since when Headscale is said not to know us, and
	rejoined     time.Time // when we last joined anew for that

	mu      sync.Mutex
	socket  string        // what client talks to
	changed chan struct{} // closed when socket changes
	// settled tells that peers have their sessions, settleBy until when they are waited for, zero before anybody has asked.
	settled  bool
	settleBy time.Time
}

// Kubernetes is what a member needs of Kubernetes.
type Kubernetes struct {
	// Node is the name of our Node object.
	Node string
	// Namespace is that of our own objects.
	Namespace string
	// JoinKey reads the key that the controller has made for nodes to join with.
	JoinKey func(context.Context) (secret.Secret, error)
}

// Seen is what has been observed that the membership goes by.
type Seen struct {
	// Mode is config.ModeHost or config.ModeDaemon, and "" while nobody answers and auto has not settled.
	Mode string
	// Tailnet is nil while tailscaled does not answer.
	Tailnet *tailscale.Status
	// TailnetErr is why tailscaled cannot be used, nil while it can.
	TailnetErr error
	// Kubernetes is nil without Kubernetes.
	Kubernetes *nodeview.View
	// PodCIDRs are this node's.
	PodCIDRs []netip.Prefix
}

// Running reports whether the tailnet carries traffic.
func (s Seen) Running() bool { return s.Tailnet != nil && s.Tailnet.State == tailscale.Running }

// NotRunning says how tailscaled stands that is not Running.
func (s Seen) NotRunning() string {
	if s.Tailnet == nil {
		return "tailscaled does not answer"
	}
	return "tailscaled says " + s.Tailnet.State
}

// confirmation is what Headscale said that it routes to the node with a node key.
type confirmation struct {
	key    string
	routes []netip.Prefix
	at     time.Time
}

// New makes the membership of the node that c describes; k is nil without Kubernetes. It connects to nobody.
func New(c config.Config, log *slog.Logger, getenv func(string) string, k *Kubernetes) *Member {
	return &Member{cfg: c, log: log, headscale: headscale.NewConnector(c.Headscale, getenv), kubernetes: k, changed: make(chan struct{})}
}

// Use makes socket the one to talk to.
func (m *Member) Use(socket string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if socket == m.socket {
		return
	}
	m.socket = socket
	m.client = tailscale.New(socket)
	close(m.changed)
	m.changed = make(chan struct{})
}

// Status asks tailscaled.
func (m *Member) Status(ctx context.Context, mode string) (*tailscale.Status, error) {
	if mode == "" {
		return nil, tailscaled.ErrNone(m.cfg.Tailscale)
	}
	status, err := m.client.Status(ctx)
	if errors.Is(err, tailscale.ErrUnreachable) && mode == config.ModeDaemon {
		if refused := tailscaled.BesideHost(m.cfg.Tailscale); refused != nil {
			return nil, fmt.Errorf("the dedicated tailscaled does not answer at %s and could not be started: %w", m.client.Socket(), refused)
		}
		return nil, findings.Errorf(findings.TailscaledSilent, "the dedicated tailscaled does not answer at %s: start it (systemctl start headcni-tailscaled, or run "+
			"`headcni-daemon tailscaled`)", m.client.Socket())
	}
	if err != nil {
		return nil, err
	}
	return &status, nil
}

// Look asks tailscaled for what status shows; nil where it does not answer.
func (m *Member) Look(ctx context.Context) (*tailscale.Status, tailscale.Prefs) {
	m.mu.Lock()
	socket := m.socket
	m.mu.Unlock()
	if socket == "" {
		return nil, tailscale.Prefs{}
	}
	c := tailscale.New(socket)
	s, err := c.Status(ctx)
	if err != nil {
		return nil, tailscale.Prefs{} // the part tailnet says why
	}
	p, err := c.Prefs(ctx)
	if err != nil {
		return nil, tailscale.Prefs{}
	}
	return &s, p
}

// Join makes sure that tailscaled is a running member of the tailnet.
func (m *Member) Join(ctx context.Context, s Seen) ([]string, error) {
	if s.TailnetErr != nil {
		return nil, s.TailnetErr
	}
	switch {
	case s.Running() && m.cfg.Headscale.URL != "":
		// One that is in already only notices where Headscale has moved. A host's tailscaled is not ours to move.
		move := tailscale.LoginOptions{ControlURL: m.cfg.Headscale.URL, Move: s.Mode == config.ModeDaemon}
		err := m.client.Login(ctx, move)
		if !errors.Is(err, tailscale.ErrNeedsKey) {
			return nil, errors.Join(err, s.Tailnet.Elsewhere(s.PodCIDRs))
		}
		if err := m.loginWith(ctx, move); err != nil {
			return nil, err
		}
		return []string{"moved to " + move.ControlURL}, reconcile.Waiting("has just moved")
	case s.Running():
		return nil, s.Tailnet.Elsewhere(s.PodCIDRs)
	case s.Tailnet.State == tailscale.Stopped && s.Mode == config.ModeHost:
		return nil, errStopped
	case s.Tailnet.Stateless() != "":
		return nil, findings.Errorf(findings.TailscaledState, "tailscaled runs and cannot join: %s", s.Tailnet.Stateless())
	case s.Tailnet.State == tailscale.Starting || s.Tailnet.State == tailscale.NoState:
		return nil, reconcile.Waiting("tailscaled is starting")
	case m.cfg.Headscale.URL == "":
		return nil, errors.New("tailscaled is not logged in and headscale.url is empty: set it and a key, or run `tailscale up --login-server URL`")
	}
	if m.kubernetes != nil && m.cfg.Tailscale.Hostname == "" && s.Mode == config.ModeDaemon {
		m.cfg.Tailscale.Hostname = m.kubernetes.Node
	}
	if err := m.login(ctx, false); err != nil {
		return nil, err
	}
	// The next pass sees the peers, one of which may have our CIDR.
	return []string{"joined " + m.cfg.Headscale.URL}, reconcile.Waiting("has just joined")
}

// login joins with the credential, or with a key made by it. again joins anew where Headscale has forgotten the node.
func (m *Member) login(ctx context.Context, again bool) error {
	return m.loginWith(ctx, tailscale.LoginOptions{ControlURL: m.cfg.Headscale.URL, Hostname: m.cfg.Tailscale.Hostname, Again: again})
}

func (m *Member) loginWith(ctx context.Context, opts tailscale.LoginOptions) error {
	api, cred, err := m.headscale.Connect(ctx)
	if errors.Is(err, config.ErrNoCredential) {
		cred.Key, err = m.controllersKey(ctx, err)
	}
	if err != nil {
		return err
	}
	if api == nil {
		opts.AuthKey = cred.Key
		return m.client.Login(ctx, opts)
	}
	if opts.AuthKey, err = m.mint(ctx, api); err != nil {
		return err
	}
	err = m.client.Login(ctx, opts)
	if errors.Is(err, tailscale.ErrKeyRefused) {
		// Headscale may have been restored from a backup that is older than the key.
		m.mintedUntil = time.Time{}
	}
	return err
}

// mint makes a key to join with. It can be used more than once, since the retries of a join that fails use the same one.
func (m *Member) mint(ctx context.Context, api *headscale.Client) (secret.Secret, error) {
	if time.Now().Before(m.mintedUntil) {
		return m.minted, nil
	}
	until := time.Now().Add(joinKeyLife)
	// Tags come with the key: the control server decides who may carry them.
	key, err := api.CreatePreAuthKey(ctx, headscale.PreAuthKeyRequest{Tags: m.cfg.Tailscale.Tags, Expiration: until, Reusable: true})
	if err != nil {
		return secret.Secret{}, fmt.Errorf("make a key to join with: %w", err)
	}
	m.minted, m.mintedUntil = key.Key, until.Add(-joinKeyLife/10)
	return m.minted, nil
}

// Approve makes sure that the tailnet routes our CIDRs to us: with an API key by approving them, else by saying what the policy
// lacks. Routes to services, which spec may have too, are the controller's. Headscale is asked where tailscaled or Headscale's last answer, which Check renews, says that they are not routed.
func (m *Member) Approve(ctx context.Context, s Seen, spec tailscale.PrefsSpec) (changed []string, err error) {
	self := s.Tailnet.Self
	missing := netset.Without(s.PodCIDRs, self.Routes)
	// Headscale tells the peers of an approval, and of its end, at once, the node itself with its next change. Its own word counts.
	answered := m.confirmed.key == self.NodeKey
	withdrawn := answered && len(netset.Without(s.PodCIDRs, m.confirmed.routes)) > 0
	confirmed := answered && !withdrawn
	if len(spec.DropRoutes) == 0 && !withdrawn && (len(missing) == 0 || confirmed && time.Since(m.confirmed.at) < lookInterval) {
		return nil, m.contradicted(s.Kubernetes, self.NodeKey, s.PodCIDRs)
	}
	if m.cfg.Headscale.URL == "" && s.Kubernetes == nil {
		return nil, m.cannotTell(missing, config.ErrNoCredential)
	}
	api, _, err := m.headscale.Connect(ctx)
	switch {
	case errors.Is(err, config.ErrNoCredential) && s.Kubernetes != nil:
		if len(missing) == 0 {
			return nil, nil // old routes of ours are the controller's to withdraw
		}
		return nil, m.approvedBy(s.Kubernetes, self.NodeKey, missing)
	case errors.Is(err, config.ErrNoCredential):
		return nil, m.cannotTell(missing, err)
	case confirmed && errors.Is(err, headscale.ErrUnreachable):
		return nil, nil // nothing says that it is otherwise now
	case err != nil:
		return nil, notApproved(s.PodCIDRs, err)
	case api == nil:
		return nil, m.cannotTell(missing, errors.New("a pre-auth key can neither see nor approve them"))
	}
	return m.approveBy(ctx, api, self.NodeKey, tailscale.PrefsSpec{AdvertiseRoutes: s.PodCIDRs, DropRoutes: spec.DropRoutes})
}

// approveBy approves with an API key and remembers what Headscale then routes to us.
func (m *Member) approveBy(ctx context.Context, api *headscale.Client, key string, spec tailscale.PrefsSpec) (changed []string, err error) {
	node, err := api.NodeByKey(ctx, key)
	if err != nil {
		return nil, fmt.Errorf("approve our routes: %w", err)
	}
	approved, err := api.ApproveRoutes(ctx, node, spec.AdvertiseRoutes, spec.DropRoutes)
	if err != nil {
		return nil, fmt.Errorf("approve our routes: %w", err)
	}
	if approved {
		m.approvedAt = time.Now()
		changed = []string{fmt.Sprintf("approved %v", spec.AdvertiseRoutes)}
		// From the list of nodes: only there Headscale says which routes are in use.
		if node, err = api.NodeByKey(ctx, key); err != nil {
			return changed, fmt.Errorf("look at our approved routes: %w", err)
		}
	}
	m.confirmed = confirmation{key: key, routes: node.Primary, at: time.Now()}
	switch missing := netset.Without(spec.AdvertiseRoutes, node.Primary); {
	case len(missing) == 0:
		return changed, nil
	case time.Since(m.approvedAt) < approvalSettles:
		return changed, reconcile.Waiting("the routes are approved and on their way")
	default:
		return changed, findings.Errorf(findings.RoutedElsewhere, "%v: approved in Headscale but not routed to this node; another node may advertise them too "+
			"(headscale nodes list-routes), or had them when it was deleted: restart Headscale 0.27 or 0.28 then", missing)
	}
}

// notApproved says what a person can do where we cannot approve.
func notApproved(missing []netip.Prefix, why error) error {
	return fmt.Errorf("%v: not approved in Headscale: %w; run `headscale nodes approve-routes`, give the daemon an API key, or add "+
		"autoApprovers to the policy: \"autoApprovers\": {\"routes\": {\"%s\": [\"tag:headcni\"]}}", missing, why, missing[0])
}

// cannotTell: without an API key there is only what Headscale tells the node of itself. Its policy may have approved the
// routes long ago: 0.29.3 tells the peers at once (a policy change), the node with the next change of its own, which may
// take hours.
func (m *Member) cannotTell(missing []netip.Prefix, why error) error {
	if time.Since(m.advertisedAt) < approvalSettles {
		return reconcile.Unseen{Err: reconcile.Waiting("the routes are advertised")}
	}
	return reconcile.Unseen{Err: findings.Errorf(findings.ApprovalUnseen, "%v: Headscale has not told whether they are approved, and %w; see `headscale nodes list-routes`. To have it "+
		"done, give the daemon an API key or add autoApprovers to the policy: \"autoApprovers\": {\"routes\": {\"%s\": [\"tag:headcni\"]}}",
		missing, why, missing[0])}
}

// Watch calls changed when tailscaled changes in a way that concerns us, until ctx ends.
func (m *Member) Watch(ctx context.Context, changed func()) {
	m.follow(ctx, func(ctx context.Context, c *tailscale.Client) error {
		return c.Watch(ctx, func(e tailscale.Event) {
			if e.Connected || e.Lost != nil || e.State != "" || e.Prefs || e.Peers {
				changed()
			}
		})
	})
}

// follow runs fn with a client for the current socket, again for each new socket, until ctx ends.
func (m *Member) follow(ctx context.Context, fn func(context.Context, *tailscale.Client) error) {
	for ctx.Err() == nil {
		m.mu.Lock()
		socket, changed := m.socket, m.changed
		m.mu.Unlock()
		if socket == "" {
			select {
			case <-ctx.Done():
			case <-changed:
			}
			continue
		}
		sub, cancel := context.WithCancel(ctx)
		go func() {
			select {
			case <-changed:
				cancel()
			case <-sub.Done():
			}
		}()
		err := fn(sub, tailscale.New(socket))
		cancel()
		if err != nil && !errors.Is(err, context.Canceled) {
			m.log.Warn("follow tailscaled", "err", err)
			reconcile.Sleep(ctx, followRetry)
		}
	}
}

// Prefs are tailscaled's now.
func (m *Member) Prefs(ctx context.Context) (tailscale.Prefs, error) { return m.client.Prefs(ctx) }

// Names asks tailscaled for what there is by name: its status, and what Headscale says of names, nil where an older tailscaled does not tell.
// It may be called beside everything else.
func (m *Member) Names(ctx context.Context) (tailscale.Status, *tailscale.DNS, error) {
	m.mu.Lock()
	socket := m.socket
	m.mu.Unlock()
	if socket == "" {
		return tailscale.Status{}, nil, tailscale.ErrUnreachable // before the first pass
	}
	c := tailscale.New(socket)
	s, err := c.Status(ctx)
	if err != nil {
		return s, nil, err
	}
	dns, err := c.DNS(ctx)
	if err != nil {
		return s, nil, nil // what it does not tell is said by leaving it out
	}
	return s, &dns, nil
}

// DNS is what Headscale says of names.
func (m *Member) DNS(ctx context.Context) (tailscale.DNS, error) { return m.client.DNS(ctx) }

// EnsurePrefs makes tailscaled's prefs what spec says, and returns what it changed, also when it failed half-way.
func (m *Member) EnsurePrefs(ctx context.Context, spec tailscale.PrefsSpec) ([]string, error) {
	changes, err := m.client.EnsurePrefs(ctx, spec)
	if len(changes) > 0 {
		m.advertisedAt = time.Now()
	}
	return changes, err
}

// Routes are what Headscale last said that it routes to the node with this key; ok is false where it was not asked.
func (m *Member) Routes(nodeKey string) (routes []netip.Prefix, ok bool) {
	return m.confirmed.routes, m.confirmed.key == nodeKey && nodeKey != ""
}

// errStopped: the user's `tailscale down` is theirs to undo.
var errStopped = findings.New(findings.TailscaledStopped, "tailscaled is stopped: run `tailscale up`")
