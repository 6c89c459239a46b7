package membership

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/findings"
	"github.com/headcni/headcni/pkg/headscale"
	"github.com/headcni/headcni/pkg/reconcile"
	"github.com/headcni/headcni/pkg/tailscale"
)

// Check asks Headscale once per lookInterval, where there is an API key to ask with, whether it still knows this node, and
// repairs what can be repaired: a node that was deleted behind our back goes on saying Running.
func (m *Member) Check(ctx context.Context, s Seen) ([]string, error) {
	if m.cfg.Headscale.URL == "" || time.Since(m.checkedAt) < lookInterval {
		return nil, m.warned
	}
	api, cred, err := m.headscale.Connect(ctx)
	switch {
	case errors.Is(err, config.ErrNoCredential) && s.Kubernetes != nil:
		return m.checkByView(ctx, s)
	case errors.Is(err, config.ErrNoCredential), err == nil && api == nil:
		return nil, errors.Join(keyExpiry(s.Tailnet.Self.KeyExpiry, time.Now()), m.exposed(cred)) // all that we can see
	case err != nil:
		return nil, err
	}
	changes, err := m.known(ctx, api, s)
	if err == nil {
		err = keysAndClock(ctx, api)
	}
	stands := err == nil || errors.As(err, new(reconcile.Warning))
	if gone := netset.Without(s.PodCIDRs, m.confirmed.routes); stands && len(gone) > 0 {
		return changes, reconcile.Waiting(fmt.Sprintf("Headscale does not route %v to this node", gone)) // Approve comes next
	}
	// What stands for long is not asked for with each pass: Headscale would tell nothing new, and it costs it the hash of a key.
	if stands {
		err = errors.Join(err, m.exposed(cred))
		m.checkedAt, m.warned = time.Now(), err
	}
	return changes, err
}

// known makes sure that Headscale knows the node and lets it stay.
func (m *Member) known(ctx context.Context, api *headscale.Client, s Seen) ([]string, error) {
	node, err := api.NodeByKey(ctx, s.Tailnet.Self.NodeKey)
	switch {
	case errors.Is(err, headscale.ErrNotFound) && !m.ours(s.Tailnet.Self):
		return nil, findings.New(findings.NodeUnknown, "Headscale does not know this node any more: log it in again with `tailscale up --force-reauth`")
	case errors.Is(err, headscale.ErrNotFound):
		return m.joinAnew(ctx, secondLook, lookInterval)
	case err != nil:
		return nil, err
	}
	m.unknown = time.Time{}
	m.confirmed = confirmation{key: node.NodeKey, routes: node.Primary, at: time.Now()}
	if expiry := node.Expiry; !expiry.IsZero() && time.Until(expiry) < headscale.NodeKeyRescue {
		if err := api.DisableExpiry(ctx, node.ID); err != nil {
			return nil, errors.Join(keyExpiry(expiry, time.Now()), err)
		}
		return []string{"the node key does not expire any more"}, nil
	}
	return nil, keyExpiry(node.Expiry, time.Now())
}

// ours reports whether the node joined with our tags, not as a user's machine.
func (m *Member) ours(self tailscale.Peer) bool {
	return slices.ContainsFunc(m.cfg.Tailscale.Tags, func(t string) bool { return slices.Contains(self.Tags, t) })
}

// keyExpiry warns of a node key that is about to expire: with it goes the pods' network.
func keyExpiry(expiry, now time.Time) error {
	if expiry.IsZero() || expiry.Sub(now) > headscale.NodeKeyWarning {
		return nil
	}
	return reconcile.Warning{Err: findings.Errorf(findings.NodeKeyEnds, "the node key expires at %s, and with it the pods' network: give the daemon an API key, run `headscale nodes "+
		"expire --disable -i ID`, or log in with a key that has tags", expiry.UTC().Format(time.RFC3339))}
}

// exposed warns of a key that every user of this machine can read. A Secret's files can be read by everybody in the pod.
func (m *Member) exposed(cred config.Credential) error {
	if m.kubernetes != nil {
		return nil
	}
	if err := cred.Exposed(""); err != nil {
		return reconcile.Warning{Err: err}
	}
	return nil
}

// keysAndClock warns of our own API key's end and of clocks that are apart.
func keysAndClock(ctx context.Context, api *headscale.Client) error {
	h, err := api.Health(ctx)
	if err != nil {
		return err
	}
	if h.Skew.Abs() > headscale.MaxSkew {
		return reconcile.Warning{Err: findings.Errorf(findings.ClocksApart, "Headscale's clock is about %s from this node's: keys may seem expired; let an NTP client set both", h.Skew.Round(time.Minute))}
	}
	key, err := api.OwnAPIKey(ctx)
	if errors.Is(err, headscale.ErrNotFound) {
		return nil // an older server does not tell
	}
	if err != nil {
		return err
	}
	if !key.Expiration.IsZero() && time.Until(key.Expiration) < headscale.APIKeyWarning {
		return reconcile.Warning{Err: findings.Errorf(findings.APIKeyEnds, "the API key %s expires at %s: make another (headscale apikeys create) and put it into the key file; it is "+
			"picked up without a restart", key.Prefix, key.Expiration.UTC().Format(time.RFC3339))}
	}
	return nil
}
