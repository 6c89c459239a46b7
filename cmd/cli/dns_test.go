package main

import (
	"bytes"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/headcni/headcni/internal/kubetest"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/dns/corefile"
	"github.com/headcni/headcni/pkg/headscale"
	"github.com/headcni/headcni/pkg/kube"
)

// TestDNSCorefile: each text is one that its reader can read, and forwards the zone.
func TestDNSCorefile(t *testing.T) {
	c := cluster{zone: corefile.Zone{Name: "hc.internal", Upstreams: []netip.AddrPort{netip.MustParseAddrPort("100.100.100.100:53")}}, domains: []string{"k8s.test"}}
	print := func(kind string) string {
		t.Helper()
		var b bytes.Buffer
		if err := c.printFor(&b, kind, []string{"169.254.20.10"}); err != nil {
			t.Fatal(err)
		}
		return b.String()
	}
	for _, kind := range []string{forCorefile, forNodeLocal} {
		f, err := corefile.Parse(print(kind))
		if err != nil || f.Serves("hc.internal", 53) == "" {
			t.Errorf("%s: %v %+v", kind, err, f)
		}
	}
	if !strings.Contains(print(forNodeLocal), "\n    bind 169.254.20.10\n") {
		t.Error("NodeLocal DNSCache would listen everywhere")
	}
	var rke2 struct {
		Kind     string
		Metadata struct{ Name, Namespace string }
		Spec     struct{ ValuesContent string }
	}
	unmarshal(t, print(forRKE2), &rke2)
	if rke2.Kind != "HelmChartConfig" || rke2.Metadata.Name != "rke2-coredns" || rke2.Spec.ValuesContent != print(forHelm) {
		t.Errorf("%+v", rke2)
	}
	var values struct {
		Servers []struct {
			Zones   []struct{ Zone string }
			Port    int
			Plugins []struct{ Name, Parameters, ConfigBlock string }
		}
	}
	unmarshal(t, print(forHelm), &values)
	if s := values.Servers; len(s) != 2 || s[0].Zones[0].Zone != "." || s[0].Plugins[3].Parameters != "k8s.test in-addr.arpa ip6.arpa" ||
		s[1].Zones[0].Zone != "hc.internal." || s[1].Plugins[2].Parameters != ". 100.100.100.100" {
		t.Errorf("%+v", s)
	}
	var gke struct {
		Metadata struct{ Name string }
		Data     struct{ StubDomains string }
	}
	unmarshal(t, print(forGKE), &gke)
	if gke.Metadata.Name != "kube-dns" || gke.Data.StubDomains != `{"hc.internal":["100.100.100.100"]}` {
		t.Errorf("%+v", gke)
	}
	if err := c.printFor(&bytes.Buffer{}, "x", nil); err == nil {
		t.Error("a cluster that nobody knows")
	}
	if err := c.printFor(&bytes.Buffer{}, forNodeLocal, []string{"x {"}); err == nil {
		t.Error("an address that is none")
	}
}

func unmarshal(t *testing.T, text string, into any) {
	t.Helper()
	if err := yaml.Unmarshal([]byte(text), into); err != nil {
		t.Fatalf("%v in\n%s", err, text)
	}
}

func TestDNSAsksTheCluster(t *testing.T) {
	client := kubetest.New(
		&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "a", Annotations: map[string]string{kube.TailnetDomain: "hc.internal"}}, Spec: corev1.NodeSpec{PodCIDRs: []string{"10.244.1.0/24"}}},
		&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "coredns", Namespace: "kube-system"}, Data: map[string]string{"Corefile": ".:53 {\n kubernetes k8s.test\n}\n"}},
		&corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "kube-dns", Namespace: "kube-system"}, Spec: corev1.ServiceSpec{ClusterIPs: []string{"10.96.0.10", "fd00:96::a"}}},
	)
	said, err := askNodes(t.Context(), client)
	if err != nil || len(said) != 1 || said[0].Domain != "hc.internal" || len(said[0].PodCIDRs) != 1 {
		t.Errorf("%+v %v", said, err)
	}
	if domains, err := askCluster(t.Context(), client); err != nil || len(domains) != 1 || domains[0] != "k8s.test" {
		t.Errorf("%v %v", domains, err)
	}
	if dns, err := askClusterDNS(t.Context(), client); err != nil || len(dns) != 2 {
		t.Errorf("%v %v", dns, err)
	}
	if _, err := askServiceCIDRs(t.Context(), client); err == nil || !strings.Contains(err.Error(), "--service-cidr") {
		t.Error(err)
	}
	if _, err := askClusterDNS(t.Context(), kubetest.New()); err == nil || !strings.Contains(err.Error(), "--cluster-dns") {
		t.Error(err)
	}
}

// TestDNSHeadscale: the lines for config.yaml are YAML, and what the API tells is said.
func TestDNSHeadscale(t *testing.T) {
	services := []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16"), netip.MustParsePrefix("fd00:96::/112")}
	h := toHeadscale{domain: "k8s.test", dns: []netip.Addr{netip.MustParseAddr("10.96.0.10")}, services: services, tags: []string{"tag:headcni"}, records: "/r.json"}
	var b bytes.Buffer
	if err := h.print(&b); err != nil {
		t.Fatal(err)
	}
	var lines struct {
		DNS struct {
			Nameservers struct{ Split map[string][]string }
			Path        string `json:"extra_records_path"`
		}
		Node struct {
			Routes struct{ HA map[string]string }
		}
	}
	unmarshal(t, b.String(), &lines)
	if s := lines.DNS.Nameservers.Split["k8s.test"]; len(s) != 1 || s[0] != "10.96.0.10" || lines.DNS.Path != "/r.json" || lines.Node.Routes.HA["probe_interval"] != "3s" {
		t.Errorf("%+v", lines)
	}
	if want := `"autoApprovers": {"routes": {"10.96.0.0/16": ["tag:headcni"], "fd00:96::/112": ["tag:headcni"]}}`; !strings.Contains(b.String(), want) {
		t.Errorf("no %s in\n%s", want, b.String())
	}
	for policy, want := range map[string]string{
		"{\"acls\": [{\"action\": \"accept\", \"src\": [\"*\"], \"dst\": [\"10.96.0.0/16:*\"]}],} // HuJSON\n": "no rule of the policy names fd00:96::/112",
		`{"grants": [{"src": ["*"], "dst": ["10.96.0.0/16", "fd00:96::/112"], "ip": ["*"]}]}`:                  "rules to fd00:96::/112",
		`{"nodeAttrs": [{"target": ["*"], "attr": ["x"]}]}`:                                                    "nobody has the attribute magicdns-aaaa",
		`{`: "cannot be read",
	} {
		if found := strings.Join(h.checkPolicy(policy), "\n"); !strings.Contains(found, want) {
			t.Errorf("%s: no %q in\n%s", policy, want, found)
		}
	}
	found := h.checkRoutes([]headscale.Node{
		{Name: "a", Available: services, Approved: services, Primary: services[:1]}, {Name: "b", Available: services},
	})
	if len(found) != 2 || found[0] != "a leads to 10.96.0.0/16; approved for 1 nodes (a)" || !strings.HasPrefix(found[1], "nobody leads to fd00:96::/112") {
		t.Errorf("%q", found)
	}
}

func TestDNSRecords(t *testing.T) {
	wants := func(name, label string, ips ...string) *corev1.Service {
		return &corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "shop", Annotations: map[string]string{kube.TailnetName: label}}, Spec: corev1.ServiceSpec{ClusterIPs: ips},
		}
	}
	var out, log bytes.Buffer
	client := kubetest.New(wants("web", "web", "10.96.0.5"), wants("node", "a", "10.96.0.6"), wants("headless", "h", "None"), wants("none", "", "10.96.0.7"))
	if err := printRecords(t.Context(), client, "hc.internal", []headscale.Node{{Name: "a"}}, &out, &log); err != nil {
		t.Fatal(err)
	}
	var list []map[string]string
	unmarshal(t, out.String(), &list)
	if len(list) != 1 || list[0]["name"] != "web.hc.internal" || list[0]["type"] != "A" || list[0]["value"] != "10.96.0.5" {
		t.Errorf("%v", list)
	}
	if lines := strings.Count(log.String(), "\n"); lines != 2 || !strings.Contains(log.String(), "shop/headless: no name: it has no address") {
		t.Error(log.String())
	}
}

// TestDNSRemote: what is printed is an entry that another cluster's configuration takes.
func TestDNSRemote(t *testing.T) {
	h := toHeadscale{domain: "east.k8s", dns: []netip.Addr{netip.MustParseAddr("10.96.0.10")}, services: []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16")}}
	pods := []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16")}
	var b bytes.Buffer
	if err := h.printRemote(&b, "east", pods); err != nil {
		t.Fatal(err)
	}
	c := config.Default()
	unmarshal(t, b.String(), &c.Network.RemoteClusters)
	if err := c.Validate(); err != nil || len(c.Network.RemoteClusters) != 1 || c.Network.RemoteClusters[0].DNS.Servers[0] != "10.96.0.10" {
		t.Errorf("%v %+v", err, c.Network.RemoteClusters)
	}
	if err := h.printRemote(&b, "", pods); err == nil {
		t.Error("a cluster without a name")
	}
	x := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "a"}, Spec: corev1.NodeSpec{PodCIDRs: []string{"10.244.0.0/24"}}}
	y := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "b"}, Spec: corev1.NodeSpec{PodCIDRs: []string{"10.244.1.0/24"}}}
	nodes := kubetest.New(x, y)
	for _, c := range []struct{ kubeadm, want string }{
		{"", "[10.244.0.0/23] false"}, {"10.244.0.0/16", "[10.244.0.0/16] true"}, {"10.99.0.0/16", "[10.244.0.0/23] false"}, // not the one that made these
	} {
		if c.kubeadm != "" {
			nodes = kubetest.New(x, y, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "kubeadm-config", Namespace: "kube-system"},
				Data: map[string]string{"ClusterConfiguration": "networking: {podSubnet: " + c.kubeadm + "}"}})
		}
		got, whole, err := podRanges(t.Context(), nodes)
		if s := fmt.Sprint(got, whole); err != nil || s != c.want {
			t.Errorf("kubeadm was told %q: %s, %v; want %s", c.kubeadm, s, err, c.want)
		}
	}
}

// TestDNSBadInput: what is wrong is said in one line, before anybody is asked and without a line of output.
func TestDNSBadInput(t *testing.T) {
	for args, want := range map[string]string{
		"corefile --domain hc_internal":                                                                                               `--domain: "hc_internal" is no domain`,
		"corefile --domain a..b":                                                                                                      `--domain: "a..b" is no domain`,
		"corefile --domain . --cluster-domain cluster.local":                                                                          `--domain: "" is no domain`,
		"corefile --domain hc.internal --cluster-domain a{b":                                                                          `--cluster-domain: "a{b" is no domain`,
		"corefile --domain x.Cluster.Local. --cluster-domain cluster.local":                                                           "x.cluster.local is inside the cluster's domain cluster.local",
		"headscale --cluster-domain a_b --cluster-dns 10.96.0.10 --service-cidr 10.96.0.0/16":                                         `--cluster-domain: "a_b" is no domain`,
		"headscale --cluster-domain k8s.test --cluster-dns 10.98.0.10 --service-cidr 10.96.0.0/16":                                    "DNS 10.98.0.10 is in none of the ranges of services [10.96.0.0/16]",
		"remote --cluster-dns 10.96.0.10 --service-cidr 10.96.0.0/16 --pod-cidr 10.244.0.0/16":                                        "give --name",
		"remote --name west --cluster-domain k8s.test --cluster-dns 10.96.0.10 --service-cidr 10.96.0.0/16":                           "or give --pod-cidr",
		"remote --name We_st --cluster-domain k8s.test --cluster-dns 10.96.0.10 --service-cidr 10.96.0.0/16 --pod-cidr 10.244.0.0/16": `network.remoteClusters.name: "We_st"`,
	} {
		cmd := dnsCmd()
		var out bytes.Buffer
		cmd.SetArgs(strings.Fields(args))
		cmd.SetOut(&out)
		cmd.SilenceUsage, cmd.SilenceErrors = true, true
		err := cmd.ExecuteContext(t.Context())
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") || out.Len() > 0 {
			t.Errorf("%s: %v, want %s, and nothing printed: %s", args, err, want, &out)
		}
	}
}
