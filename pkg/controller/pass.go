package controller

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/headscale"
	"github.com/headcni/headcni/pkg/kube"
)

const (
	// apiTimeout bounds one write to the API server.
	apiTimeout = 10 * time.Second
	// slowCheck is how often the policy and our own API key are looked at.
	slowCheck = 5 * time.Minute
)

// pass observes, plans and applies once. pending means that something is under way.
func (c *Controller) pass(ctx context.Context) (pending bool, err error) {
	nodes, synced := c.snapshot()
	if !synced {
		return true, nil
	}
	// A Node that is being uninstalled is left alone, the others are not: uninstall itself stops all controllers first, and
	// whoever has one node's kubelet can put that annotation on it.
	// It needs no Headscale, and nothing waits for it.
	defer func() { err = errors.Join(err, c.names(ctx, nodes)) }()
	up := 0.0
	defer func() { c.metrics.headscale.Set(up) }()
	api, cred, err := c.connect(ctx)
	if err != nil {
		if !errors.Is(err, headscale.ErrUnreachable) {
			c.report(ctx, nil, []finding{{checkKey, err.Error()}}, false)
		}
		return false, err
	}
	expires, keyErr := c.joinKey(ctx, api, cred.Key)
	switch {
	case !expires.IsZero():
		c.metrics.joinKey.Set(float64(expires.Unix()))
	case keyErr == nil:
		c.metrics.joinKey.Set(0)
	}
	if api == nil {
		// Of the tailnet's names the Nodes' own are known.
		c.nodeNames = []string{}
		for _, n := range nodes {
			c.nodeNames = append(c.nodeNames, n.name)
		}
		return false, errors.Join(keyErr, c.unseen(ctx, nodes))
	}
	tailnet, err := api.Nodes(ctx)
	if errors.Is(err, headscale.ErrUnauthorized) {
		c.report(ctx, nil, []finding{{checkKey, fmt.Sprintf("%s: %v", cred.Source, err)}}, false)
		return false, err // the join key's error says the same
	}
	if err != nil {
		return false, errors.Join(keyErr, err)
	}
	up = 1
	c.nodeNames = []string{}
	for _, t := range tailnet {
		c.nodeNames = append(c.nodeNames, t.Name)
	}
	o := observation{now: c.now(), ranges: c.cfg.Network.ClusterCIDRs.Prefixes(), services: c.cfg.Network.ServiceCIDRs.Prefixes(),
		tags: c.cfg.Tailscale.Tags, nodes: nodes, tailnet: tailnet}
	o.grace, _ = time.ParseDuration(c.cfg.Kubernetes.NodeGrace) // validated
	var found *corev1.ConfigMap
	if o.memory, found, err = c.loadMemory(ctx); err != nil {
		return false, errors.Join(keyErr, err)
	}
	var lacking []finding
	o.serve, lacking, _ = c.serving(ctx, nodes, o.memory.Serve)
	p := makePlan(o)
	if err := c.saveMemory(ctx, p.memory, found); err != nil {
		return false, errors.Join(keyErr, err) // what is not remembered is not done
	}
	err = c.apply(ctx, api, o, p)
	c.slow(ctx, api, o)
	findings := append(slices.Clone(c.findings), lacking...)
	if p.expiring != "" {
		findings = append(findings, finding{checkNodeKeys, p.expiring})
	}
	if p.full != nil {
		findings = append(findings, finding{checkRanges, p.full.Error()})
	}
	if p.held > 0 {
		findings = append(findings, finding{checkRemovals, p.heldText(o)})
	}
	if p.claimed != "" {
		findings = append(findings, finding{checkClaims, p.claimed})
	}
	c.report(ctx, withViews(nodes, p.views), findings, true)
	return p.pending, errors.Join(keyErr, err)
}

// connect is a client where the credential is an API key, else nil. With another key everything is looked at anew.
func (c *Controller) connect(ctx context.Context) (*headscale.Client, config.Credential, error) {
	api, cred, err := c.headscale.Connect(ctx)
	if api != nil && api != c.api {
		c.api, c.keyAt, c.slowAt = api, time.Time{}, time.Time{}
	}
	return api, cred, err
}

// apply makes the differences, going on past errors.
func (c *Controller) apply(ctx context.Context, api *headscale.Client, o observation, p plan) error {
	errs := []error{c.approve(ctx, api, p.approvals, o.serve.Ranges)}
	errs = append(errs, joinErrors(each(p.disableExpiry, func(id headscale.ID) error { return unlessGone(api.DisableExpiry(ctx, id)) })))
	errs = append(errs, joinErrors(each(p.remove, func(t headscale.Node) error {
		err := api.DeleteNode(ctx, t)
		if err == nil {
			c.log.Info("removed a node of the tailnet whose Node is gone", "node", t.ID, "name", t.Name)
		}
		return unlessGone(err)
	})))
	return errors.Join(append(errs, c.giveAll(ctx, p.allocate), c.showAll(ctx, o.nodes, p.views))...)
}

// approve takes routes before it gives any, so that a range that moves is never approved for two: one that could not be
// taken from a node is given to none, but for those that several may have (shared). A node has one approval in the list, and so one
// call at a time.
func (c *Controller) approve(ctx context.Context, api *headscale.Client, list []approval, shared []netip.Prefix) error {
	set := func(t headscale.Node, own, stale []netip.Prefix) error {
		changed, err := api.ApproveRoutes(ctx, t, own, stale)
		if err == nil && changed {
			c.log.Info("approved", "node", t.ID, "routes", own, "taken back", stale)
		}
		return unlessGone(err)
	}
	taking := slices.DeleteFunc(slices.Clone(list), func(a approval) bool { return len(a.stale) == 0 })
	taken := each(taking, func(a approval) error { return set(a.node, nil, a.stale) })
	var kept []netip.Prefix
	for i, a := range taking {
		if taken[i] != nil {
			kept = append(kept, slices.DeleteFunc(slices.Clone(a.stale), func(p netip.Prefix) bool { return netset.Covers(shared, p) })...)
		}
	}
	giving := slices.DeleteFunc(slices.Clone(list), func(a approval) bool {
		return len(a.own) == 0 || slices.ContainsFunc(a.own, func(p netip.Prefix) bool { return slices.ContainsFunc(kept, p.Overlaps) })
	})
	given := each(giving, func(a approval) error { return set(a.node, a.own, nil) })
	return errors.Join(joinErrors(taken), joinErrors(given))
}

func (c *Controller) showAll(ctx context.Context, nodes []node, views map[string]kube.View) error {
	changed := slices.DeleteFunc(slices.Clone(nodes), func(n node) bool { _, ok := views[n.name]; return !ok })
	return joinErrors(each(changed, func(n node) error { return c.show(ctx, n, views[n.name]) }))
}

// show writes a view on a Node.
func (c *Controller) show(ctx context.Context, n node, v kube.View) error {
	if err := c.annotate(ctx, n.name, map[string]any{kube.Headscale: v.String()}); err != nil {
		return err
	}
	if n.view.State != v.State {
		c.log.Info("node", "name", n.name, "state", v.State, "message", v.Message)
	}
	return nil
}

func (c *Controller) giveAll(ctx context.Context, given map[string][]netip.Prefix) error {
	return joinErrors(each(slices.Sorted(maps.Keys(given)), func(name string) error { return c.give(ctx, name, given[name]) }))
}

// give writes pod CIDRs on a Node that has none. The API server takes them once.
func (c *Controller) give(ctx context.Context, name string, cidrs []netip.Prefix) error {
	var texts []string
	for _, p := range cidrs {
		texts = append(texts, p.String())
	}
	err := c.patch(ctx, name, types.StrategicMergePatchType, map[string]any{
		"metadata": map[string]any{"annotations": map[string]string{kube.Allocated: "true"}},
		"spec":     map[string]any{"podCIDR": texts[0], "podCIDRs": texts},
	})
	if err == nil {
		c.log.Info("gave pod CIDRs", "node", name, "podCIDRs", texts)
	}
	return err
}

func (c *Controller) patch(ctx context.Context, node string, kind types.PatchType, change any) error {
	body, err := json.Marshal(change)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	_, err = c.client.Nodes().Patch(ctx, node, kind, body, metav1.PatchOptions{})
	if apierrors.IsNotFound(err) {
		return nil // gone since
	}
	if err != nil {
		return fmt.Errorf("write to Node %s: %w", node, err)
	}
	return nil
}

// unseen is a pass with a pre-auth key: nodes can join, and nothing can be seen or approved.
func (c *Controller) unseen(ctx context.Context, nodes []node) error {
	views := map[string]kube.View{}
	serve, findings, known := c.serving(ctx, nodes, serving{})
	for _, n := range nodes {
		v := kube.View{NodeKey: n.key, State: kube.StateUnseen}
		if !known {
			v.Services = n.view.Services
		} else if serve.chooses(n) {
			v.Services = serve.Routes
		}
		if n.key != "" && !n.leaving && v.String() != n.viewText {
			views[n.name] = v
		}
	}
	o := observation{now: c.now(), ranges: c.cfg.Network.ClusterCIDRs.Prefixes(), nodes: nodes}
	findings = append(findings, finding{checkAutoApprovers, preAuthAdvice(slices.Concat(o.podRanges(), serve.Routes), c.cfg.Tailscale.Tags)})
	given, full := o.allocate()
	err := errors.Join(c.showAll(ctx, nodes, views), c.giveAll(ctx, given))
	if full != nil {
		findings = append(findings, finding{checkRanges, full.Error()})
	}
	c.report(ctx, withViews(nodes, views), findings, true)
	return err
}

// preAuthAdvice says what a pre-auth key needs of the policy, and what it gives up.
func preAuthAdvice(ranges []netip.Prefix, tags []string) string {
	lines := ""
	for i, r := range ranges {
		if i > 0 {
			lines += ", "
		}
		lines += fmt.Sprintf("\"%s\": %s", r, headscale.JSONList(tags))
	}
	return fmt.Sprintf("the key in Secret %s is a pre-auth key: routes are approved only by the policy, which needs \"autoApprovers\": {\"routes\": {%s}}; "+
		"and then any node with the tag may take any pod range. With an API key headcni-controller approves exactly each Node's own", kube.AuthSecret, lines)
}

// slow looks at what seldom changes: the policy and our own key.
func (c *Controller) slow(ctx context.Context, api *headscale.Client, o observation) {
	if c.now().Sub(c.slowAt) < slowCheck {
		return
	}
	health, err := api.Health(ctx)
	if err != nil {
		return // the next pass says so
	}
	var found []finding
	text, err := api.Policy(ctx)
	if errors.Is(err, headscale.ErrNotFound) {
		text, err = "{}", nil // without a policy everything is allowed
	}
	if err == nil {
		found, err = checkPolicy(text, needs{o.podRanges(), o.serve.Routes, o.tags, o.sharing(), headscale.StarCoversRoutes(health.Version)})
	}
	if err != nil {
		c.log.Warn("look at the policy", "err", err)
		// What was found before stands: that it cannot be seen makes nothing right again.
		found = slices.DeleteFunc(slices.Clone(c.findings), func(f finding) bool { return f.check == checkKey })
	}
	if f := c.ownKey(ctx, api); f != "" {
		found = append(found, finding{checkKey, f})
	}
	c.findings, c.slowAt = found, c.now()
}

// ownKey measures when our API key expires, and says what to do where that is soon.
func (c *Controller) ownKey(ctx context.Context, api *headscale.Client) string {
	key, err := api.OwnAPIKey(ctx)
	c.metrics.apiKey.Set(0)
	if err != nil || key.Expiration.Unix() <= 0 {
		return "" // an older server does not tell
	}
	c.metrics.apiKey.Set(float64(key.Expiration.Unix()))
	if key.Expiration.Sub(c.now()) > headscale.APIKeyWarning {
		return ""
	}
	return fmt.Sprintf("the API key %s expires at %s: make another (headscale apikeys create) and put it into Secret %s; it is picked up without a restart",
		key.Prefix, key.Expiration.UTC().Format(time.RFC3339), kube.AuthSecret)
}
