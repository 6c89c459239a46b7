package daemon

import (
	"context"
	"errors"

	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/policy/nodepolicy"
)

func (d *Daemon) newPolicy() *nodepolicy.Enforcer {
	return nodepolicy.New(nodepolicy.Options{
		Kubernetes: d.kubernetes, Metrics: d.metrics, Log: d.log, Strict: d.cfg.Network.PolicyStartup == config.PolicyStrict, Hold: d.fast.Hold, Changed: d.loop.Wake,
	})
}

// policyNeeds: who switches policies off waits until ADD does not ask for them any more.
func policyNeeds(p *nodepolicy.Enforcer) []string {
	if p == nil {
		return []string{partConflist}
	}
	return nil
}

// switchPolicyOff takes away what an earlier daemon enforced, once.
func (d *Daemon) switchPolicyOff(ctx context.Context) error {
	if d.policyIsOff {
		return nil
	}
	err := errors.Join(nodepolicy.Remove(ctx), nodepolicy.RemoveFiles())
	d.policyIsOff = err == nil
	return err
}
