package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/dns/corefile"
	"github.com/headcni/headcni/pkg/kube"
)

func dnsRemoteCmd(f *dnsFlags) *cobra.Command {
	var file, name string
	var dns, services, podCIDRs []string
	cmd := &cobra.Command{
		Use:   "remote --name NAME",
		Short: "Print this cluster as other clusters on the tailnet must have it in network.remoteClusters",
		Args:  cobra.NoArgs, DisableFlagsInUseLine: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if name == "" {
				return errors.New("give --name, what the others call this cluster, such as west")
			}
			c, err := config.Load(file, file == paths.ConfigFile, os.Environ(), nil)
			if err != nil {
				return err
			}
			h := toHeadscale{services: c.Network.ServiceCIDRs.Prefixes()}
			if len(services) > 0 {
				if h.services, err = prefixesOf("--service-cidr", services); err != nil {
					return err
				}
			}
			if h.dns, err = addressesOf("--cluster-dns", dns); err != nil {
				return err
			}
			pods, err := prefixesOf("--pod-cidr", podCIDRs)
			if err != nil {
				return err
			}
			if err := f.findServices(cmd.Context(), &h); err != nil {
				return err
			}
			note := ""
			if len(pods) == 0 {
				if pods, note, err = f.podRanges(cmd.Context(), c.Network); err != nil {
					return err
				}
			}
			if c.DNS.Alias != "" {
				h.domain = c.DNS.Alias
			} else if h.domain == corefile.ClusterDomain {
				note += noAlias
			}
			if _, err := io.WriteString(cmd.OutOrStdout(), note); err != nil {
				return err
			}
			return h.printRemote(cmd.OutOrStdout(), name, pods)
		},
	}
	cmd.Flags().StringVar(&file, "config", paths.ConfigFile, "daemon.yaml, which has network.clusterCIDRs, network.serviceCIDRs and dns.alias")
	cmd.Flags().StringVar(&name, "name", "", "what the others call this cluster")
	cmd.Flags().StringSliceVar(&dns, "cluster-dns", nil, "addresses of the cluster's DNS; without them, those of Service kube-system/kube-dns")
	cmd.Flags().StringSliceVar(&podCIDRs, "pod-cidr", nil, "ranges of pods' addresses; without them, network.clusterCIDRs, else what kubeadm was told, else what the Nodes have")
	cmd.Flags().StringSliceVar(&services, "service-cidr", nil, "ranges of services' addresses; without them, network.serviceCIDRs, else what Kubernetes says")
	return cmd
}

// What is said before the entry must be comments.
const (
	// nodesRanges is where only the Nodes' own ranges are known.
	nodesRanges = "# podCIDRs are those of the Nodes that there are now: the pods of one that comes later are not in them. Give --pod-cidr what\n" +
		"# kube-controller-manager has as --cluster-cidr, or set network.clusterCIDRs.\n"
	noAlias = "# No other cluster whose own domain is " + corefile.ClusterDomain + " can ask for this one's names: set dns.alias here.\n"
)

// podRanges are the ranges of pods, and what is to be said of them.
func (f *dnsFlags) podRanges(ctx context.Context, n config.Network) (out []netip.Prefix, note string, err error) {
	if out = n.ClusterCIDRs.Prefixes(); len(out) > 0 {
		return out, "", nil
	}
	client, err := f.client()
	if err != nil {
		return nil, "", fmt.Errorf("%w; or give --pod-cidr", err)
	}
	out, whole, err := podRanges(ctx, client)
	if err == nil && !whole {
		note = nodesRanges
	}
	return out, note, err
}

// podRanges are what kubeadm was told, else what the Nodes have, which is not the whole.
func podRanges(ctx context.Context, client kube.Client) (out []netip.Prefix, whole bool, err error) {
	nodes, err := askNodes(ctx, client)
	if err != nil {
		return nil, false, err
	}
	for _, node := range nodes {
		out = append(out, node.PodCIDRs...)
	}
	pool := kube.KubeadmPods(ctx, client)
	if len(pool) > 0 && !slices.ContainsFunc(out, func(p netip.Prefix) bool { return !netset.Covers(pool, p) }) {
		return pool, true, nil
	}
	if len(out) == 0 {
		return nil, false, errors.New("no Node has pod CIDRs: give --pod-cidr, or set network.clusterCIDRs")
	}
	return netset.Aggregate(out), false, nil
}

// printRemote prints the entry, which must be valid where it is put.
func (h toHeadscale) printRemote(out io.Writer, name string, pods []netip.Prefix) error {
	entry := config.RemoteCluster{Name: name, DNS: config.RemoteDNS{Domain: h.domain}}
	for _, p := range pods {
		entry.PodCIDRs = append(entry.PodCIDRs, p.String())
	}
	for _, p := range h.services {
		entry.ServiceCIDRs = append(entry.ServiceCIDRs, p.String())
	}
	for _, a := range h.dns {
		entry.DNS.Servers = append(entry.DNS.Servers, a.String())
	}
	c := config.Default()
	c.Network.RemoteClusters = []config.RemoteCluster{entry}
	if err := c.Validate(); err != nil {
		return err
	}
	b, err := yaml.Marshal([]config.RemoteCluster{entry})
	if err != nil {
		return err
	}
	_, err = out.Write(slices.Concat([]byte("# In the other clusters' network.remoteClusters (Helm: config.network.remoteClusters).\n"), b))
	return err
}
