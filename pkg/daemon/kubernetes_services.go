package daemon

import (
	"context"
	"net/netip"
	"slices"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/reconcile"
)

// watchServices keeps the cluster's service ranges: at the start as soon as the API server answers, then now and then.
func (k *cluster) watchServices(ctx context.Context) {
	wait := retryMin
	for ctx.Err() == nil {
		found, err := k.askServices(ctx)
		k.mu.Lock()
		news := err == nil && !slices.Equal(k.services, found)
		if news {
			k.services = found
		}
		k.mu.Unlock()
		if news {
			k.changed()
		}
		if err == nil {
			wait = serviceInterval
		} else {
			// It matters little: services are reached with or without, and the part kubernetes tells of a server that is away.
			k.log.Debug("ask for the service ranges", "err", err)
			wait = min(2*wait, serviceInterval)
		}
		reconcile.Sleep(ctx, wait)
	}
}

// askServices asks the ServiceCIDR API (Kubernetes 1.33), and where it is not, or not for us, what kubeadm was told.
func (k *cluster) askServices(ctx context.Context) ([]netip.Prefix, error) {
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	var texts []string
	list, err := k.client.NetworkingV1().ServiceCIDRs().List(ctx, metav1.ListOptions{})
	if err == nil {
		for _, s := range list.Items {
			texts = append(texts, s.Spec.CIDRs...)
		}
	} else if texts, err = k.askKubeadm(ctx); err != nil {
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

func (k *cluster) askKubeadm(ctx context.Context) ([]string, error) {
	cm, err := k.client.CoreV1().ConfigMaps("kube-system").Get(ctx, "kubeadm-config", metav1.GetOptions{})
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
