package corefile

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"

	"sigs.k8s.io/yaml"
)

// helmServer is an entry of `servers` of CoreDNS' Helm chart, which RKE2 uses too.
type helmServer struct {
	Zones   []helmZone   `json:"zones"`
	Port    int          `json:"port"`
	Plugins []helmPlugin `json:"plugins"`
}

type helmZone struct {
	Zone string `json:"zone"`
}

type helmPlugin struct {
	Name        string `json:"name"`
	Parameters  string `json:"parameters,omitempty"`
	ConfigBlock string `json:"configBlock,omitempty"`
}

// HelmValues makes the values of CoreDNS' Helm chart that have these zones beside the chart's own server block: Helm replaces lists,
// so that one is repeated.
func HelmValues(zones []Zone, clusterDomain string) (string, error) {
	servers := []helmServer{{Zones: []helmZone{{"."}}, Port: defaultPort, Plugins: []helmPlugin{
		{Name: "errors"},
		{Name: "health", ConfigBlock: "lameduck 10s"},
		{Name: "ready"},
		{Name: "kubernetes", Parameters: clusterDomain + " in-addr.arpa ip6.arpa", ConfigBlock: "pods insecure\nfallthrough in-addr.arpa ip6.arpa\nttl 30"},
		{Name: "prometheus", Parameters: "0.0.0.0:9153"},
		{Name: "forward", Parameters: ". /etc/resolv.conf"},
		{Name: "cache", Parameters: "30"},
		{Name: "loop"}, {Name: "reload"}, {Name: "loadbalance"},
	}}}
	for _, z := range zones {
		servers = append(servers, helmServer{Zones: []helmZone{{z.Name + "."}}, Port: defaultPort, Plugins: []helmPlugin{
			{Name: "errors"},
			{Name: "cache", Parameters: "30", ConfigBlock: cacheLines},
			{Name: "forward", Parameters: ". " + addresses(z.Upstreams), ConfigBlock: forwardLines(z)},
		}})
	}
	b, err := yaml.Marshal(map[string]any{"servers": servers})
	return string(b), err
}

// HelmChartConfig makes the object that gives RKE2's CoreDNS these values.
func HelmChartConfig(zones []Zone, clusterDomain string) (string, error) {
	values, err := HelmValues(zones, clusterDomain)
	if err != nil {
		return "", err
	}
	b, err := yaml.Marshal(map[string]any{
		"apiVersion": "helm.cattle.io/v1", "kind": "HelmChartConfig",
		"metadata": map[string]string{"name": "rke2-coredns", "namespace": "kube-system"},
		"spec":     map[string]string{"valuesContent": values},
	})
	return string(b), err
}

// StubDomains makes the ConfigMap that has kube-dns ask for these zones.
func StubDomains(zones []Zone) (string, error) {
	stubs := map[string][]string{}
	for _, z := range zones {
		for _, u := range z.Upstreams {
			stubs[z.Name] = append(stubs[z.Name], u.Addr().String())
		}
	}
	text, err := json.Marshal(stubs)
	if err != nil {
		return "", err
	}
	b, err := yaml.Marshal(map[string]any{
		"apiVersion": "v1", "kind": "ConfigMap", "metadata": map[string]string{"name": "kube-dns", "namespace": "kube-system"},
		"data": map[string]string{"stubDomains": string(text)},
	})
	return string(b), err
}

// NodeLocal makes the server blocks for NodeLocal DNSCache, which listens on these addresses only.
func NodeLocal(zones []Zone, listen []netip.Addr) string {
	var bind []string
	for _, a := range listen {
		bind = append(bind, a.String())
	}
	return strings.ReplaceAll(Render(zones, defaultPort), "    errors\n", fmt.Sprintf("    errors\n    bind %s\n", strings.Join(bind, " ")))
}
