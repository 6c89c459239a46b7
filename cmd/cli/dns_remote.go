package main

import (
	"context"
	"errors"
	"io"
	"net/netip"
	"os"
	"slices"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/kube"
)

func dnsRemoteCmd(f *dnsFlags) *cobra.Command {
	var file, name string
	var services []string
	cmd := &cobra.Command{
		Use:   "remote --name NAME",
		Short: "Print this cluster as other clusters on the tailnet must have it in network.remoteClusters",
		Args:  cobra.NoArgs, DisableFlagsInUseLine: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
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
			if err := f.findServices(cmd.Context(), &h); err != nil {
				return err
			}
			client, err := f.client()
			if err != nil {
				return err
			}
			pods, err := podRanges(cmd.Context(), client, c.Network)
			if err != nil {
				return err
			}
			if c.DNS.Alias != "" {
				h.domain = c.DNS.Alias
			}
			return h.printRemote(cmd.OutOrStdout(), name, pods)
		},
	}
	cmd.Flags().StringVar(&file, "config", paths.ConfigFile, "daemon.yaml, which has network.clusterCIDRs, network.serviceCIDRs and dns.alias")
	cmd.Flags().StringVar(&name, "name", "", "what the others call this cluster")
	cmd.Flags().StringSliceVar(&services, "service-cidr", nil, "ranges of services' addresses; without them, network.serviceCIDRs, else what Kubernetes says")
	return cmd
}

// podRanges are network.clusterCIDRs, else what the Nodes have.
func podRanges(ctx context.Context, client kube.Client, n config.Network) ([]netip.Prefix, error) {
	if out := n.ClusterCIDRs.Prefixes(); len(out) > 0 {
		return out, nil
	}
	nodes, err := askNodes(ctx, client)
	if err != nil {
		return nil, err
	}
	var out []netip.Prefix
	for _, node := range nodes {
		out = append(out, node.PodCIDRs...)
	}
	if len(out) == 0 {
		return nil, errors.New("no Node has pod CIDRs: set network.clusterCIDRs")
	}
	return netset.Aggregate(out), nil
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
