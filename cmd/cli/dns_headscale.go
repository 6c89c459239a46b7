package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/tailscale/hujson"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/headscale"
	"github.com/headcni/headcni/pkg/kube"
)

// toHeadscale is what Headscale must be told so that the tailnet resolves and reaches a cluster's services.
type toHeadscale struct {
	domain   string         // the cluster's
	dns      []netip.Addr   // of the cluster's DNS
	services []netip.Prefix // the ranges of services' addresses
	tags     []string       // of the nodes
	records  string         // path of extra records on Headscale's host, "" = none
}

func dnsHeadscaleCmd(f *dnsFlags) *cobra.Command {
	var file string
	var dns, services []string
	h := toHeadscale{}
	cmd := &cobra.Command{
		Use:   "headscale",
		Short: "Print the lines for Headscale with which the tailnet resolves and reaches the cluster's services, and check what can be",
		Long: "Print the lines for Headscale's configuration and policy with which devices of the tailnet resolve names of the cluster and reach its\n" +
			"services, and say which of them are in force, where Headscale's API tells.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := config.Load(file, file == paths.ConfigFile, os.Environ(), nil)
			if err != nil {
				return err
			}
			h.tags = c.Tailscale.Tags
			if h.dns, err = addressesOf("--cluster-dns", dns); err != nil {
				return err
			}
			if h.services, err = prefixesOf("--service-cidr", services); err != nil {
				return err
			}
			if len(h.services) == 0 {
				h.services = c.Network.ServiceCIDRs.Prefixes()
			}
			if err := f.findServices(cmd.Context(), &h); err != nil {
				return err
			}
			if err := h.print(cmd.OutOrStdout()); err != nil {
				return err
			}
			return h.check(cmd.Context(), cmd.OutOrStdout(), file)
		},
	}
	cmd.Flags().StringVar(&file, "config", paths.ConfigFile, "daemon.yaml, which says where Headscale is, and the nodes' tags")
	cmd.Flags().StringSliceVar(&dns, "cluster-dns", nil, "addresses of the cluster's DNS; without them, those of Service kube-system/kube-dns")
	cmd.Flags().StringSliceVar(&services, "service-cidr", nil, "ranges of services' addresses; without them, network.serviceCIDRs, else what Kubernetes says")
	cmd.Flags().StringVar(&h.records, "records", "", "path of a JSON file with extra records on Headscale's host")
	return cmd
}

func addressesOf(flag string, texts []string) (out []netip.Addr, err error) {
	for _, s := range texts {
		a, err := netip.ParseAddr(s)
		if err != nil {
			return nil, fmt.Errorf("%s %s: want an address such as 10.96.0.10", flag, s)
		}
		out = append(out, a)
	}
	return out, nil
}

func prefixesOf(flag string, texts []string) (out []netip.Prefix, err error) {
	for _, s := range texts {
		p, err := netip.ParsePrefix(s)
		if err != nil || p != p.Masked() {
			return nil, fmt.Errorf("%s %s: want a range such as 10.96.0.0/16", flag, s)
		}
		out = append(out, p)
	}
	return out, nil
}

// findServices completes what was not given by what the cluster says. The cluster's DNS must be where the tailnet is led to.
func (f *dnsFlags) findServices(ctx context.Context, h *toHeadscale) error {
	err := f.check()
	if err == nil {
		err = f.askServices(ctx, h)
	}
	if err != nil {
		return err
	}
	for _, a := range h.dns {
		if !slices.ContainsFunc(h.services, func(p netip.Prefix) bool { return p.Contains(a) }) {
			return fmt.Errorf("the cluster's DNS %s is in none of the ranges of services %v, so that nobody in the tailnet would reach it: give --cluster-dns or --service-cidr", a, h.services)
		}
	}
	return nil
}

func (f *dnsFlags) askServices(ctx context.Context, h *toHeadscale) error {
	h.domain = f.clusterDomain
	if h.domain != "" && len(h.dns) > 0 && len(h.services) > 0 {
		return nil
	}
	client, err := f.client()
	if err != nil {
		return fmt.Errorf("%w; or give --cluster-domain, --cluster-dns and --service-cidr", err)
	}
	if h.domain == "" {
		domains, err := askCluster(ctx, client)
		if err != nil {
			return err
		}
		h.domain = domains[0]
	}
	if len(h.dns) == 0 {
		if h.dns, err = askClusterDNS(ctx, client); err != nil {
			return err
		}
	}
	if len(h.services) == 0 {
		h.services, err = askServiceCIDRs(ctx, client)
	}
	return err
}

func askClusterDNS(ctx context.Context, client kube.Client) ([]netip.Addr, error) {
	s, err := client.Services("kube-system").Get(ctx, "kube-dns", metav1.GetOptions{})
	if err != nil {
		return nil, fmt.Errorf("find the cluster's DNS: %w; give --cluster-dns", err)
	}
	out, err := addressesOf("Service kube-system/kube-dns", s.Spec.ClusterIPs)
	if err == nil && len(out) == 0 {
		err = errors.New("the Service kube-system/kube-dns has no address: give --cluster-dns")
	}
	return out, err
}

func askServiceCIDRs(ctx context.Context, client kube.Client) ([]netip.Prefix, error) {
	out, err := kube.ServiceRanges(ctx, client)
	if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsForbidden(err) {
		return nil, fmt.Errorf("ask for the ranges of services: %w; give --service-cidr", err)
	}
	if len(out) == 0 {
		return nil, errors.New("the ranges of services are not known: give --service-cidr")
	}
	return out, nil
}

// print writes the lines for config.yaml and for the policy.
func (h toHeadscale) print(out io.Writer) error {
	dns := map[string]any{"nameservers": map[string]any{"split": map[string]any{h.domain: h.dns}}}
	if h.records != "" {
		dns["extra_records_path"] = h.records
	}
	lines, err := yaml.Marshal(map[string]any{
		"dns":  dns,
		"node": map[string]any{"routes": map[string]any{"ha": map[string]string{"probe_interval": "3s", "probe_timeout": "1s"}}},
	})
	if err != nil {
		return err
	}
	policy, err := json.MarshalIndent(h.policy(), "# ", "  ")
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(out, `# In Headscale's config.yaml, merged with what is there. Headscale reads these lines at its start only: restart it once. Meanwhile
# nobody joins and no route changes its way; connections that there are, between pods too, go on.
# node.routes.ha (Headscale 0.29): where one of several nodes with the same route dies, another has it after 2 to 7 s instead of 8 to 15.
# Two clusters with the same domain cannot both be split: give one of them another domain.
%s
# In Headscale's policy, merged with what is there; no restart (headscale policy set; SIGHUP where it is a file).
# acls: let in whom you like instead of "*", which means devices of the tailnet. nodeAttrs (0.29): tailscaled has IPv6
# addresses of tailnet names too, where it answers in place of a daemon that is restarted.
# %s
# The tailnet reaches services, the cluster's DNS among them, by the Nodes that network.advertiseServices chooses. headcni-controller approves their
# routes. Only where it has a pre-auth key in place of an API key they need autoApprovers; then every node with the tag may lead there.
#   "autoApprovers": {"routes": {%s}}
`, lines, policy, h.approvers())
	return err
}

func (h toHeadscale) policy() any {
	var dst []string
	for _, p := range h.services {
		dst = append(dst, p.String()+":*")
	}
	return map[string]any{
		"acls":      []any{map[string]any{"action": "accept", "src": []string{"*"}, "dst": dst}},
		"nodeAttrs": []any{map[string]any{"target": h.tags, "attr": []string{"magicdns-aaaa"}}},
	}
}

func (h toHeadscale) approvers() string {
	var out []string
	for _, p := range h.services {
		out = append(out, fmt.Sprintf(`"%s": ["%s"]`, p, strings.Join(h.tags, `", "`)))
	}
	return strings.Join(out, ", ")
}

// check says of what Headscale's API tells whether it is in force.
func (h toHeadscale) check(ctx context.Context, out io.Writer, file string) error {
	api, err := connectAPI(ctx, file)
	if err != nil {
		_, err = fmt.Fprintf(out, "\n# Not checked: %s\n", strings.ReplaceAll(err.Error(), "\n", "; "))
		return err
	}
	var found []string
	if health, err := api.Health(ctx); err != nil {
		found = append(found, err.Error())
	} else if headscale.StarCoversRoutes(health.Version) {
		found = append(found, fmt.Sprintf("Headscale is %s: node.routes.ha and nodeAttrs need 0.29", health.Version))
	}
	text, err := api.Policy(ctx)
	switch {
	case errors.Is(err, headscale.ErrNotFound):
		found = append(found, "Headscale has no policy: everybody reaches services already")
	case err != nil:
		found = append(found, err.Error())
	default:
		found = append(found, h.checkPolicy(text)...)
	}
	nodes, err := api.Nodes(ctx)
	if err != nil {
		found = append(found, err.Error())
	} else {
		found = append(found, h.checkRoutes(nodes)...)
	}
	for _, f := range append(found, "the lines of config.yaml cannot be seen by Headscale's API: see on a device `tailscale dns status`") {
		if _, err := fmt.Fprintf(out, "\n# Checked: %s\n", strings.ReplaceAll(f, "\n", "; ")); err != nil {
			return err
		}
	}
	return nil
}

// policyRule and policyAttr are what is looked at of Headscale's policy.
type (
	policyRule struct{ Dst []string }
	policyAttr struct{ Attr []string }
)

// checkPolicy says which ranges of services no rule names. It looks for the ranges as they are written: that is how Headscale has them.
func (h toHeadscale) checkPolicy(text string) (found []string) {
	std, err := hujson.Standardize([]byte(text))
	if err != nil {
		return []string{"the policy cannot be read: " + err.Error()}
	}
	var p struct {
		ACLs, Grants []policyRule
		NodeAttrs    []policyAttr
	}
	if err := json.Unmarshal(std, &p); err != nil {
		return []string{"the policy cannot be read: " + err.Error()}
	}
	for _, r := range h.services {
		named := slices.ContainsFunc(slices.Concat(p.ACLs, p.Grants), func(rule policyRule) bool {
			return slices.ContainsFunc(rule.Dst, func(d string) bool { return strings.Contains(d, r.String()) })
		})
		if named {
			found = append(found, fmt.Sprintf("the policy has rules to %s", r))
		} else {
			found = append(found, fmt.Sprintf("no rule of the policy names %s as dst", r))
		}
	}
	if !slices.ContainsFunc(p.NodeAttrs, func(a policyAttr) bool { return slices.Contains(a.Attr, "magicdns-aaaa") }) {
		found = append(found, "nobody has the attribute magicdns-aaaa: tailscaled has no IPv6 addresses of names where it answers in place of a daemon")
	}
	return found
}

// checkRoutes says who leads to services now.
func (h toHeadscale) checkRoutes(nodes []headscale.Node) (found []string) {
	for _, r := range h.services {
		var advertise []string
		primary := "nobody"
		for _, n := range nodes {
			if slices.Contains(n.Available, r) && slices.Contains(n.Approved, r) {
				advertise = append(advertise, n.Name)
			}
			if slices.Contains(n.Primary, r) {
				primary = n.Name
			}
		}
		found = append(found, fmt.Sprintf("%s leads to %s; approved for %d nodes (%s)", primary, r, len(advertise), strings.Join(advertise, ", ")))
	}
	return found
}
