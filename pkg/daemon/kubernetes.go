package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/kube/nodeview"
)

// uninstallRetry is how long after a failed uninstall it is tried again.
const uninstallRetry = 5 * time.Second

// newWatch is nil without Kubernetes.
func newWatch(c config.Config, log *slog.Logger, getenv func(string) string, version string) (*nodeview.Watch, error) {
	if !c.InKubernetes(getenv) {
		return nil, c.Network.AdvertiseServices.WithoutKubernetes()
	}
	if p := c.Network.PodCIDRs; len(p) > 0 {
		return nil, fmt.Errorf("network.podCIDRs: %v: in Kubernetes the Node object says which they are (Node.spec.podCIDRs): remove the "+
			"key, or set kubernetes.enable: false", []string(p))
	}
	return nodeview.New(c.Kubernetes, log, getenv, version)
}

// rangesInForce are those of the configuration, with what Kubernetes says.
func rangesInForce(c config.Config, l nodeview.LastKnown) (config.Ranges, error) {
	r := c.Network.Ranges()
	r.Pods = l.PodCIDRs
	r.Cluster = append(r.Cluster, netset.Union(l.ClusterCIDRs, l.Leaving)...)
	if len(r.Services) == 0 {
		r.Services = l.ServiceCIDRs
	}
	if err := c.ValidateRanges(r); err != nil {
		return r, fmt.Errorf("with what Kubernetes says: %w", err)
	}
	return r, nil
}

// uninstallIfAsked takes everything off the node where its Node object asks for it, and says so there. It reports whether there is nothing
// else to do, and when to look again. Once done it stays so until the process ends: the annotation goes before we are stopped.
func (d *Daemon) uninstallIfAsked(ctx context.Context) (asked bool, next time.Duration) {
	v := d.kubernetes.View()
	if v == nil || !d.uninstalled && !v.UninstallAsked() {
		if !d.uninstallAt.IsZero() && !d.uninstalled {
			d.end(errors.New("an uninstall has failed half-way and is wanted no more: start again, which puts everything back"))
			return true, fullCheck
		}
		return d.uninstalled, fullCheck
	}
	if wait := time.Until(d.uninstallAt); wait > 0 {
		return true, wait // what a failed try changed in the kernel wakes us at once
	}
	if err := d.uninstallFor(ctx, v); err != nil {
		d.log.Error("uninstall from this node", "err", err)
		d.uninstallAt = time.Now().Add(uninstallRetry)
		return true, uninstallRetry
	}
	return true, fullCheck
}

func (d *Daemon) uninstallFor(ctx context.Context, v *nodeview.View) error {
	if !d.uninstalled {
		d.subnets.Stop()
		d.fast.Leave()
		d.policy.Stop() // it would put back what is taken away
		d.firewallMu.Lock()
		d.firewall = nil
		d.firewallMu.Unlock()
		if err := uninstall(ctx, d.cfg, d.saved, d.log, v.Runtime()); err != nil {
			return err
		}
		d.log.Info("everything of ours is off this node; idle from here on")
		d.uninstalled = true
	}
	return d.kubernetes.Uninstalled(ctx, v)
}
