package daemon

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"

	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/findings"
	"github.com/headcni/headcni/pkg/networking/deadman"
)

// fingerprint tells whether the configuration has changed since it was taken back. The CIDRs of other Nodes, which come and
// go, are no part of it.
func fingerprint(c config.Config) string {
	sum := sha256.Sum256([]byte(c.String())) // secrets are masked in it
	return hex.EncodeToString(sum[:8])
}

// fingerprint is that of the configuration with our own pod CIDRs, wherever they are from.
func (d *Daemon) fingerprint() string {
	c := d.cfg
	if d.kubernetes != nil {
		c.Network.PodCIDRs = nil
		for _, p := range d.saved.Kubernetes.PodCIDRs {
			c.Network.PodCIDRs = append(c.Network.PodCIDRs, p.String())
		}
	}
	return fingerprint(c)
}

// errTakenBack is why nothing is applied any more.
func errTakenBack(address string) error {
	return findings.Errorf(findings.TakenBack, "taken back: with our routes this node could not reach %s for %s, without them it could; look for a peer that "+
		"advertises its prefix (headscale nodes list-routes), set network.lanFirst: true or change the CIDRs: a changed configuration "+
		"is tried again", address, deadman.Patience)
}

// withdraw removes our rules, routes and prefs, but not the guard: what the node lost it gets back, and still nothing
// goes out in clear. It is noted first, so that no restart tries the same again. Once it is done, what cuts the node off is
// not ours any more.
func (d *Daemon) withdraw(ctx context.Context, address string) error {
	what := d.fingerprint()
	if what == d.withdrawn {
		return nil
	}
	d.note(func(s *state) { s.TakenBack, s.TakenBackFor = what, address })
	err := errors.Join(d.node.Remove(ctx), restorePrefs(ctx, d.cfg, d.saved))
	if err == nil {
		d.withdrawn = what
	}
	return err
}
