package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"

	"github.com/spf13/cobra"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/headcni/headcni/internal/version"
	"github.com/headcni/headcni/pkg/dns/corefile"
	"github.com/headcni/headcni/pkg/dns/tailnet"
	"github.com/headcni/headcni/pkg/kube"
)

func dnsCmd() *cobra.Command {
	f := &dnsFlags{}
	cmd := &cobra.Command{
		Use:   "dns",
		Short: "Print what resolves names across the tailnet, for whom HeadCNI does not write it",
		Long: "Print what resolves names across the tailnet, for whom HeadCNI does not write it. It asks the cluster for what is not given. In the\n" +
			"controller's pod it needs nothing more (`kubectl -n kube-system exec deploy/headcni-controller -- headcnictl dns corefile --for rke2`);\n" +
			"elsewhere give it --kubeconfig.",
	}
	cmd.PersistentFlags().StringVar(&f.kubeconfig, "kubeconfig", os.Getenv("KUBECONFIG"), "how to reach the API server; without it, as a pod")
	cmd.PersistentFlags().StringVar(&f.domain, "domain", "", "the tailnet's domain; without it, what the nodes say")
	cmd.PersistentFlags().StringVar(&f.clusterDomain, "cluster-domain", "", "the cluster's domain; without it, what CoreDNS' ConfigMap says, else cluster.local")
	cmd.AddCommand(dnsCorefileCmd(f), dnsHeadscaleCmd(f), dnsRecordsCmd(f), dnsRemoteCmd(f))
	unanswered(cmd.Commands()...)
	return cmd
}

// dnsFlags are the flags of all commands about names.
type dnsFlags struct {
	kubeconfig, domain, clusterDomain string
}

func (f *dnsFlags) client() (kube.Client, error) {
	c, err := kube.Config(f.kubeconfig, "headcnictl/"+version.Version)
	if err != nil {
		return nil, err
	}
	return kube.NewClient(c)
}

// cluster is what a command needs to know of the cluster.
type cluster struct {
	zone    corefile.Zone
	domains []string // the cluster's own
}

// check refuses what is no domain, and makes the rest as CoreDNS has it.
func (f *dnsFlags) check() error {
	for flag, d := range map[string]*string{"--domain": &f.domain, "--cluster-domain": &f.clusterDomain} {
		if *d == "" {
			continue
		}
		*d = strings.ToLower(strings.TrimSuffix(*d, "."))
		if err := corefile.CheckDomain(*d); err != nil {
			return fmt.Errorf("%s: %w", flag, err)
		}
	}
	return nil
}

// find completes the flags with what the cluster says. With both domains given nobody is asked.
func (f *dnsFlags) find(ctx context.Context) (c cluster, err error) {
	if err := f.check(); err != nil {
		return c, err
	}
	var said []tailnet.Node
	if f.domain != "" {
		said = []tailnet.Node{{Name: "--domain", Domain: f.domain, PodCIDRs: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}}}
	}
	if f.clusterDomain != "" {
		c.domains = []string{f.clusterDomain}
	}
	if said == nil || c.domains == nil {
		client, err := f.client()
		if err != nil {
			return c, fmt.Errorf("%w; or give --domain and --cluster-domain", err)
		}
		if said == nil {
			said, err = askNodes(ctx, client)
		}
		if err == nil && c.domains == nil {
			c.domains, err = askCluster(ctx, client)
		}
		if err != nil {
			return c, err
		}
	}
	z, ok, err := tailnet.Zone(said)
	if err == nil && !ok {
		err = errors.New("no node says the tailnet's domain yet (annotation " + kube.TailnetDomain + "): give --domain")
	}
	if err == nil {
		err = corefile.Apart(z.Name, c.domains)
	}
	c.zone = z
	return c, err
}

func askNodes(ctx context.Context, client kube.Client) (said []tailnet.Node, err error) {
	nodes, err := client.Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("list the Nodes: %w", err)
	}
	for _, n := range nodes.Items {
		cidrs, _ := kube.PodCIDRs(&n) // a malformed one is the controller's to report
		said = append(said, tailnet.Node{Name: n.Name, Domain: n.Annotations[kube.TailnetDomain], PodCIDRs: cidrs})
	}
	return said, nil
}

// askCluster is the cluster's domain as CoreDNS has it. A cluster with another DNS mostly has the usual one.
func askCluster(ctx context.Context, client kube.Client) ([]string, error) {
	m, err := client.ConfigMaps(corefile.Namespace).Get(ctx, corefile.ConfigMap, metav1.GetOptions{})
	if err == nil {
		file, err := corefile.Parse(m.Data[corefile.Key])
		if err != nil {
			return nil, fmt.Errorf("ConfigMap %s/%s cannot be read: %w; give --cluster-domain", corefile.Namespace, corefile.ConfigMap, err)
		}
		if domains, _, err := file.Cluster(); err == nil || errors.Is(err, corefile.ErrBind) {
			return domains, nil
		}
	}
	return []string{corefile.ClusterDomain}, nil
}

// Clusters that the DNS text can be for.
const (
	forCorefile  = "corefile"
	forRKE2      = "rke2"
	forHelm      = "helm"
	forGKE       = "gke"
	forNodeLocal = "nodelocal"
)

func dnsCorefileCmd(f *dnsFlags) *cobra.Command {
	var kind string
	listen := []string{"169.254.20.10"}
	cmd := &cobra.Command{
		Use:   "corefile",
		Short: "Print what has the cluster's DNS answer for the tailnet's names",
		Long: "Print what has the cluster's DNS answer for the tailnet's names, where headcni-controller does not write it:\n\n" +
			"  corefile    server blocks for a Corefile, or for a key that ends in .server of the ConfigMap coredns-custom\n" +
			"  rke2        a HelmChartConfig: kubectl apply -f -\n" +
			"  helm        values for CoreDNS' Helm chart\n" +
			"  gke         the ConfigMap kube-dns, whose other keys must be kept: merge it with what is there\n" +
			"  nodelocal   server blocks for the Corefile of NodeLocal DNSCache (ConfigMap kube-system/node-local-dns)",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := f.find(cmd.Context())
			if err != nil {
				return err
			}
			return c.printFor(cmd.OutOrStdout(), kind, listen)
		},
	}
	cmd.Flags().StringVar(&kind, "for", forCorefile, strings.Join([]string{forCorefile, forRKE2, forHelm, forGKE, forNodeLocal}, ", "))
	cmd.Flags().StringSliceVar(&listen, "listen", listen, "addresses that NodeLocal DNSCache listens on, as its other server blocks have them after bind")
	return cmd
}

func (c cluster) printFor(out io.Writer, kind string, listen []string) (err error) {
	zones := []corefile.Zone{c.zone}
	text := ""
	switch kind {
	case forCorefile:
		text = corefile.Render(zones, 53)
	case forRKE2:
		text, err = corefile.HelmChartConfig(zones, c.domains[0])
	case forHelm:
		text, err = corefile.HelmValues(zones, c.domains[0])
	case forGKE:
		text, err = corefile.StubDomains(zones)
	case forNodeLocal:
		var addrs []netip.Addr
		for _, s := range listen {
			a, err := netip.ParseAddr(s)
			if err != nil {
				return fmt.Errorf("--listen %s: want an address such as 169.254.20.10", s)
			}
			addrs = append(addrs, a)
		}
		text = corefile.NodeLocal(zones, addrs)
	default:
		return fmt.Errorf("--for %s: want one of %s, %s, %s, %s, %s", kind, forCorefile, forRKE2, forHelm, forGKE, forNodeLocal)
	}
	if err == nil {
		_, err = io.WriteString(out, text)
	}
	return err
}
