package kube

import (
	"context"
	"net/netip"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/headcni/headcni/internal/netset"
)

// ServiceRanges asks for the ranges of services' addresses: by the ServiceCIDR API (Kubernetes 1.33), and where that is missing or
// forbidden, from kubeadm's configuration.
func ServiceRanges(ctx context.Context, client Client) ([]netip.Prefix, error) {
	var texts []string
	list, err := client.ServiceCIDRs().List(ctx, metav1.ListOptions{})
	if err == nil {
		for _, s := range list.Items {
			texts = append(texts, s.Spec.CIDRs...)
		}
	} else if texts, err = askKubeadm(ctx, client); err != nil {
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

func askKubeadm(ctx context.Context, client Client) ([]string, error) {
	n, err := kubeadmNetworking(ctx, client)
	return strings.Split(n.ServiceSubnet, ","), err
}

// networking is what kubeadm was told of a cluster's ranges, which are separated by commas.
type networking struct {
	PodSubnet     string `json:"podSubnet"`
	ServiceSubnet string `json:"serviceSubnet"`
}

func kubeadmNetworking(ctx context.Context, client Client) (networking, error) {
	cm, err := client.ConfigMaps("kube-system").Get(ctx, "kubeadm-config", metav1.GetOptions{})
	if err != nil {
		return networking{}, err
	}
	var c struct {
		Networking networking `json:"networking"`
	}
	err = yaml.Unmarshal([]byte(cm.Data["ClusterConfiguration"]), &c)
	return c.Networking, err
}

// KubeadmPods are the ranges that kubeadm was told to cut Nodes' pod CIDRs from, nil where it did not make the cluster.
func KubeadmPods(ctx context.Context, client Client) (out []netip.Prefix) {
	n, err := kubeadmNetworking(ctx, client)
	if err != nil {
		return nil // it is a better answer than the Nodes' own ranges, no more
	}
	for _, t := range strings.Split(n.PodSubnet, ",") {
		if p, err := netip.ParsePrefix(strings.TrimSpace(t)); err == nil {
			out = append(out, p.Masked())
		}
	}
	return out
}
