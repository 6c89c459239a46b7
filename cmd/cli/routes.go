package main

import (
	"context"
	"encoding/json"
	"errors"
	"net/netip"

	"github.com/spf13/cobra"

	"github.com/headcni/headcni/internal/version"
	"github.com/headcni/headcni/pkg/doctor"
	"github.com/headcni/headcni/pkg/why"
)

func routesCmd() *cobra.Command {
	f := &lookFlags{}
	cmd := &cobra.Command{
		Use:   "routes [--node N]",
		Short: "Which pod ranges are advertised, approved, and in the other nodes' kernels",
		Long: "Which pod ranges are advertised, approved, and in the other nodes' kernels: a line for each range. Every node's daemon is asked, and every kernel\n" +
			"where it leads packets to a range.\n\n" +
			"With a kubeconfig it runs `headcni-daemon status` and `headcnictl routes part` in the pod of each node's daemon: no port is opened. Who runs it must\n" +
			"be allowed to list nodes, and to list pods and create pods/exec in the namespace of HeadCNI. Without Kubernetes, or with --local, it asks this\n" +
			"node, as root." + lookCodes,
		DisableFlagsInUseLine: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := f.check(); err != nil {
				return fail(cmd, err)
			}
			r, err := f.routes(cmd.Context())
			if err == nil && f.output == "json" {
				err = printJSON(cmd.OutOrStdout(), r)
			} else if err == nil {
				err = r.Print(cmd.OutOrStdout(), textFor(cmd.OutOrStdout()).Width)
			}
			switch {
			case err != nil:
				return fail(cmd, err)
			case !r.OK:
				return notRight
			}
			return nil
		},
	}
	f.add(cmd)
	f.addOutput(cmd, "text", textOrJSON)
	cmd.AddCommand(routesPartCmd())
	return cmd
}

// routesPartCmd is what routes runs on each node.
func routesPartCmd() *cobra.Command {
	return &cobra.Command{
		Use: "part ADDRESS...", Hidden: true, Short: "What routes asks one node's kernel, as JSON",
		RunE: func(cmd *cobra.Command, args []string) error {
			var to []netip.Addr
			for _, a := range args {
				addr, err := netip.ParseAddr(a)
				if err != nil {
					return err
				}
				to = append(to, addr)
			}
			return json.NewEncoder(cmd.OutOrStdout()).Encode(why.Lead(to))
		},
	}
}

// routes asks all nodes, then all kernels.
func (f *lookFlags) routes(ctx context.Context) (why.Routes, error) {
	l, err := f.looker()
	if err != nil {
		return why.Routes{}, err
	}
	seen, err := l.look(ctx)
	if err != nil {
		return why.Routes{}, err
	}
	kernels, errs := map[string]map[netip.Addr]why.Route{}, map[string]error{}
	if l.cluster == nil {
		kernels[seen.Nodes[0].Name] = why.Lead(why.Ask(seen))
		return why.NewRoutes(version.Version, seen, kernels, errs), nil
	}
	command := []string{"headcnictl", "routes", "part"}
	for _, a := range why.Ask(seen) {
		command = append(command, a.String())
	}
	answers, bad := make([]map[netip.Addr]why.Route, len(seen.Nodes)), make([]error, len(seen.Nodes))
	var ask []func(context.Context)
	for i, n := range seen.Nodes {
		if n.Err == nil {
			ask = append(ask, func(ctx context.Context) { bad[i] = l.cluster.Ask(ctx, n.Pod, &answers[i], command...) })
		}
	}
	l.cluster.All(ctx, ask...)
	if ctx.Err() != nil {
		return why.Routes{}, errInterrupted
	}
	for i, n := range seen.Nodes {
		kernels[n.Name], errs[n.Name] = answers[i], bad[i]
	}
	return why.NewRoutes(version.Version, seen, kernels, errs), errors.Join(l.cluster.Forbidden(bad), noneAnswered(append(bad, errsOf(seen)...)))
}

func errsOf(s doctor.Seen) (out []error) {
	for _, n := range s.Nodes {
		out = append(out, n.Err)
	}
	return out
}
