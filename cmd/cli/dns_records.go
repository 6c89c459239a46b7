package main

import (
	"context"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/dns/records"
	"github.com/headcni/headcni/pkg/headscale"
	"github.com/headcni/headcni/pkg/kube"
)

func dnsRecordsCmd(f *dnsFlags) *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   "records",
		Short: "Print the names of Services in the tailnet, for Headscale's dns.extra_records_path",
		Long: "Print the names in the tailnet of the Services with the annotation " + kube.TailnetName + ", as JSON for Headscale's\n" +
			"dns.extra_records_path. On standard error it says which Services have no name, and why. Headscale sees a changed file by itself.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := f.client()
			if err != nil {
				return err
			}
			c, err := f.find(cmd.Context())
			if err != nil {
				return err
			}
			api, err := connectAPI(cmd.Context(), file)
			if err != nil {
				return fmt.Errorf("which names nodes have: %w", err)
			}
			nodes, err := api.Nodes(cmd.Context())
			if err != nil {
				return err
			}
			return printRecords(cmd.Context(), client, c.zone.Name, nodes, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	cmd.Flags().StringVar(&file, "config", paths.ConfigFile, "daemon.yaml, which says where Headscale is")
	return cmd
}

func printRecords(ctx context.Context, client kube.Client, domain string, nodes []headscale.Node, out, log io.Writer) error {
	list, err := client.Services(metav1.NamespaceAll).List(ctx, metav1.ListOptions{})
	if err != nil {
		return fmt.Errorf("list the Services: %w", err)
	}
	var services []records.Service
	for _, s := range list.Items {
		label := s.Annotations[kube.TailnetName]
		if label == "" {
			continue
		}
		services = append(services, records.Service{Namespace: s.Namespace, Name: s.Name, Label: label, IPs: kube.ClusterIPs(&s), Created: s.CreationTimestamp.Time})
	}
	var taken []string
	for _, n := range nodes {
		taken = append(taken, n.Name)
	}
	// What headcni-controller has given stays; where there is no such ConfigMap, age decides.
	now, err := client.ConfigMaps(kube.Namespace(os.Getenv)).Get(ctx, kube.Records, metav1.GetOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("which names are given: %w", err)
	}
	var had []records.Record
	if err == nil {
		had = records.FromJSON(now.Data[kube.RecordsKey])
	}
	all, refused := records.Plan(domain, services, taken, had)
	for _, r := range refused {
		if _, err := fmt.Fprintf(log, "%s/%s: no name: %s\n", r.Service.Namespace, r.Service.Name, r.Reason); err != nil {
			return err
		}
	}
	text, err := records.JSON(all)
	if err == nil {
		_, err = io.WriteString(out, text)
	}
	return err
}
