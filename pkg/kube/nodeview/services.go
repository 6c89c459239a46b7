package nodeview

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/reconcile"
)

// serviceRetry is the wait after the first failed request; it doubles.
const serviceRetry = time.Second

// watchServices keeps the cluster's service ranges up to date: it asks until the API server answers, then every serviceInterval.
func (w *Watch) watchServices(ctx context.Context) {
	wait := serviceRetry
	for ctx.Err() == nil {
		found, err := w.askServices(ctx)
		w.mu.Lock()
		news := err == nil && !slices.Equal(w.services, found)
		if news {
			w.services = found
		}
		w.mu.Unlock()
		if news {
			w.changed()
		}
		if err == nil {
			wait = serviceInterval
		} else {
			// Services work without the ranges, and the part kubernetes reports an API server that does not answer.
			w.log.Debug("ask for the service ranges", "err", err)
			wait = min(2*wait, serviceInterval)
		}
		reconcile.Sleep(ctx, wait)
	}
}

// askServices asks the ServiceCIDR API (Kubernetes 1.33). Where that is missing or forbidden, it reads kubeadm's configuration.
func (w *Watch) askServices(ctx context.Context) ([]netip.Prefix, error) {
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	var texts []string
	list, err := w.client.ServiceCIDRs().List(ctx, metav1.ListOptions{})
	if err == nil {
		for _, s := range list.Items {
			texts = append(texts, s.Spec.CIDRs...)
		}
	} else if texts, err = w.askKubeadm(ctx); err != nil {
		return nil, err
	}
	var out []netip.Prefix
	for _, t := range texts {
		if p, err := netip.ParsePrefix(strings.TrimSpace(t)); err == nil {
			out = append(out, p.Masked())
		}
	}
	return netset.Union(out), nil
}

func (w *Watch) askKubeadm(ctx context.Context) ([]string, error) {
	cm, err := w.client.ConfigMaps("kube-system").Get(ctx, "kubeadm-config", metav1.GetOptions{})
	if err != nil {
		return nil, err
	}
	var c struct {
		Networking struct {
			ServiceSubnet string `json:"serviceSubnet"`
		} `json:"networking"`
	}
	if err := yaml.Unmarshal([]byte(cm.Data["ClusterConfiguration"]), &c); err != nil {
		return nil, err
	}
	return strings.Split(c.Networking.ServiceSubnet, ","), nil
}
