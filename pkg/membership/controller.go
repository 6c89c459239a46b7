package membership

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/secret"
	"github.com/headcni/headcni/pkg/findings"
	"github.com/headcni/headcni/pkg/kube"
	"github.com/headcni/headcni/pkg/kube/nodeview"
	"github.com/headcni/headcni/pkg/reconcile"
)

const (
	// unknownPatience is how long the controller must say that Headscale does not know a node before it joins anew: it may have
	// looked while the node was joining. secondLook is the same for a node that asks Headscale itself.
	unknownPatience = 30 * time.Second
	secondLook      = 5 * time.Second
	// rejoinInterval bounds how often that is done: each time leaves a node in Headscale where the controller is wrong.
	rejoinInterval = 5 * time.Minute
	// viewPatience is how long the controller may take to look at a node.
	viewPatience = time.Minute
)

// controllersKey is what to join with where nothing else is given: in Kubernetes the controller's key.
func (m *Member) controllersKey(ctx context.Context, none error) (secret.Secret, error) {
	if m.kubernetes == nil {
		return secret.Secret{}, none
	}
	return m.kubernetes.JoinKey(ctx)
}

// approvedBy judges the controller's view of routes that tailscaled does not know to be routed.
func (m *Member) approvedBy(c *nodeview.View, key string, missing []netip.Prefix) error {
	v, err := c.Controller(key)
	switch {
	case err != nil:
		return err
	case v == nil && (c.Err != nil || !c.Synced):
		return m.cannotTell(missing, errors.New("the API server cannot be asked what headcni-controller says"))
	case v == nil && time.Since(m.advertisedAt) < viewPatience:
		return reconcile.Waiting("headcni-controller has not looked at this node yet")
	case v == nil:
		return findings.Errorf(findings.ControllerSilent, "%v: headcni-controller has said nothing of this node: see `kubectl -n %s logs deploy/headcni-controller`", missing, m.kubernetes.Namespace)
	case v.State == kube.StateUnseen:
		return m.cannotTell(missing, errors.New("headcni-controller has a pre-auth key, which can neither see nor approve them"))
	case v.State == kube.StateRouted && len(netset.Without(missing, v.Routes)) == 0:
		return nil
	case v.State == kube.StateRefused:
		return findings.Errorf(findings.ApprovalRefused, "%v: headcni-controller does not approve them: %s", missing, v.Message)
	case v.Message != "":
		return reconcile.Waiting("headcni-controller says: " + v.Message)
	}
	return reconcile.Waiting("headcni-controller is about to approve " + fmt.Sprint(missing))
}

// contradicted is what the controller says where it knows that routes which tailscaled believes in lead to this node no longer.
func (m *Member) contradicted(c *nodeview.View, key string, routes []netip.Prefix) error {
	v, err := c.Controller(key)
	if err != nil || v == nil || v.State != kube.StatePending && v.State != kube.StateRefused {
		return nil // a view that cannot be read contradicts nothing
	}
	return m.approvedBy(c, key, routes)
}

// checkByView is Check where the controller asks Headscale for us.
func (m *Member) checkByView(ctx context.Context, s Seen) ([]string, error) {
	self := s.Tailnet.Self
	v, err := s.Kubernetes.Controller(self.NodeKey)
	if err != nil {
		return nil, err
	}
	if v == nil || v.State != kube.StateUnknown {
		m.unknown = time.Time{}
		if v != nil && v.Expiry != nil {
			return nil, keyExpiry(*v.Expiry, time.Now())
		}
		return nil, keyExpiry(self.KeyExpiry, time.Now())
	}
	if s.Mode == config.ModeHost {
		return nil, findings.New(findings.NodeUnknown, "Headscale does not know this node (deleted there, or another server than headcni-controller's): log it in "+
			"again with `tailscale up --force-reauth`")
	}
	return m.joinAnew(ctx, unknownPatience, rejoinInterval)
}

// joinAnew joins a node again that Headscale has not known for as long as patience: one answer may be odd. It does so once
// within interval.
func (m *Member) joinAnew(ctx context.Context, patience, interval time.Duration) ([]string, error) {
	if m.unknown.IsZero() {
		m.unknown = time.Now()
	}
	if left := patience - time.Since(m.unknown); left > 0 {
		return nil, reconcile.Soon{Waiting: "Headscale does not know this node; joins anew if it stays so", In: left}
	}
	if time.Since(m.rejoined) < interval {
		return nil, findings.Errorf(findings.NodeUnknown, "Headscale does not know this node although it joined at %s: is headscale.url, here and of headcni-controller, "+
			"the Headscale that this node is in?", m.rejoined.UTC().Format(time.RFC3339))
	}
	if err := m.login(ctx, true); err != nil {
		return nil, findings.Errorf(findings.NodeUnknown, "Headscale does not know this node any more: %w", err)
	}
	m.rejoined, m.unknown, m.confirmed = time.Now(), time.Time{}, confirmation{}
	return []string{"joined anew: Headscale did not know this node any more"}, reconcile.Waiting("has just joined anew")
}
