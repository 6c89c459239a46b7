package config

import (
	"slices"
	"strings"
	"testing"
)

func remote(name, pods, services, domain string, servers ...string) RemoteCluster {
	return RemoteCluster{Name: name, PodCIDRs: CIDRs{pods}, ServiceCIDRs: CIDRs{services}, DNS: RemoteDNS{Domain: domain, Servers: servers}}
}

func TestRemoteClusters(t *testing.T) {
	c := Default()
	c.Network.ClusterCIDRs, c.Network.ServiceCIDRs, c.Network.RemoteCIDRs = CIDRs{"10.244.0.0/16"}, CIDRs{"10.96.0.0/16"}, CIDRs{"10.245.0.0/16"}
	west := remote("west", "10.245.0.0/16", "10.97.0.0/16", "west.k8s", "10.97.0.10")
	c.DNS.Alias = "here.k8s"
	c.Headscale.URL = "https://192.0.2.7"
	c.Network.RemoteClusters = []RemoteCluster{west}
	if err := c.Validate(); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, p := range c.Network.Ranges().Remote {
		got = append(got, p.String())
	}
	if want := []string{"10.245.0.0/16", "10.97.0.0/16"}; !slices.Equal(got, want) {
		t.Errorf("ranges of other clusters are %v, want %v", got, want)
	}
	for want, other := range map[string]RemoteCluster{
		`network.remoteClusters[east]: "10.245.1.0/24": overlaps 10.245.0.0/16 of network.remoteClusters[west]`: remote("east", "10.245.1.0/24", "10.98.0.0/16", ""),
		`remoteClusters[east]: "10.244.9.0/24": overlaps 10.244.0.0/16 of this cluster's own pods`:              remote("east", "10.244.9.0/24", "10.98.0.0/16", ""),
		`remoteClusters[east]: "10.96.0.0/12": overlaps 10.96.0.0/16 of this cluster's own services`:            remote("east", "10.246.0.0/16", "10.96.0.0/12", ""),
		"is the domain of network.remoteClusters[west] too":                                                     remote("east", "10.246.0.0/16", "10.98.0.0/16", "west.k8s", "10.98.0.10"),
		"overlaps 192.0.2.7/32 of Headscale":                                                                    remote("east", "192.0.2.0/24", "10.98.0.0/16", ""),
		"is the domain of this cluster (dns.alias) too":                                                         remote("east", "10.246.0.0/16", "10.98.0.0/16", "here.k8s", "10.98.0.10"),
		"want a domain":        remote("east", "10.246.0.0/16", "10.98.0.0/16", "a..b", "10.98.0.10"),
		"in none of the":       remote("east", "10.246.0.0/16", "10.98.0.0/16", "east.k8s", "192.0.2.1"),
		"want the address":     remote("east", "10.246.0.0/16", "10.98.0.0/16", "east.k8s"),
		"that no other":        remote("west", "10.246.0.0/16", "10.98.0.0/16", ""),
		"has host bits set":    remote("east", "10.246.0.1/16", "10.98.0.0/16", ""),
		"has neither podCIDRs": {Name: "east"},
		"want an address":      remote("east", "10.246.0.0/16", "10.98.0.0/16", "east.k8s", "dns"),
		"overlaps 100.64.0.0":  remote("east", "100.64.0.0/16", "10.98.0.0/16", ""),
	} {
		c.Network.RemoteClusters = []RemoteCluster{west, other}
		if err := c.Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	if err := c.Set("network.remoteClusters", "x"); err == nil {
		t.Error("a list of clusters from one word")
	}
}

// TestRemoteClustersInKubernetes: there the ranges of the cluster itself are not in the configuration, and two clusters often have the same.
func TestRemoteClustersInKubernetes(t *testing.T) {
	c := Default()
	c.Network.RemoteClusters = []RemoteCluster{remote("west", "10.244.0.0/16", "10.96.0.0/12", "")}
	if err := c.Validate(); err != nil {
		t.Fatal(err)
	}
	r := c.Network.Ranges()
	if err := c.ValidateRanges(r); err != nil {
		t.Fatal(err)
	}
	r.Pods, r.Cluster = CIDRs{"10.244.1.0/24"}.Prefixes(), CIDRs{"10.244.0.0/24", "10.244.1.0/24"}.Prefixes()
	r.Services = CIDRs{"10.96.0.0/16"}.Prefixes()
	err := c.ValidateRanges(r)
	want := `network.remoteClusters[west]: "10.244.0.0/16": overlaps 10.244.0.0/24 of this cluster's own pods; clusters that reach each other need ranges of their own
network.remoteClusters[west]: "10.96.0.0/12": overlaps 10.96.0.0/16 of this cluster's own services; clusters that reach each other need ranges of their own`
	if err == nil || err.Error() != want {
		t.Errorf("%v, want\n%s", err, want)
	}
}

func TestAdvertiseServices(t *testing.T) {
	for want, a := range map[string]AdvertiseServices{
		"":                   {NodeSelector: map[string]string{"node-restriction.kubernetes.io/services": "true", "plain": ""}, Only: OnlyNamed, HealthURL: "http://[::1]:10256/healthz"},
		"want a label":       {NodeSelector: map[string]string{"a/b/c": "true"}},
		`"services: not ok"`: {NodeSelector: map[string]string{"services": "not ok"}},
		"want named":         {Only: "all"},
		"want http://HOST":   {HealthURL: "https://127.0.0.1/healthz"},
		"***@":               {HealthURL: "http://user:hunter2@127.0.0.1/healthz"},
	} {
		c := Default()
		c.Network.AdvertiseServices = a
		if err := c.Validate(); (err == nil) != (want == "") || err != nil && (!strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "hunter2")) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	chosen := AdvertiseServices{NodeSelector: map[string]string{"a": "", "b": "1"}}
	for _, c := range []struct {
		labels map[string]string
		want   bool
	}{{nil, false}, {map[string]string{"b": "1"}, false}, {map[string]string{"a": "", "b": "1", "c": "2"}, true}, {map[string]string{"a": "", "b": "2"}, false}} {
		if got := chosen.Selects(c.labels); got != c.want {
			t.Errorf("%v: %v", c.labels, got)
		}
	}
	if (AdvertiseServices{}).Selects(map[string]string{"a": ""}) {
		t.Error("no labels are every Node's")
	}
	if err := chosen.WithoutKubernetes(); err == nil || Default().Network.AdvertiseServices.WithoutKubernetes() != nil {
		t.Error("outside Kubernetes")
	}
}
