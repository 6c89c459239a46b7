package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os/signal"
	"slices"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/headcni/headcni/internal/version"
	"github.com/headcni/headcni/pkg/connectivity"
	"github.com/headcni/headcni/pkg/doctor"
	"github.com/headcni/headcni/pkg/kube"
	"github.com/headcni/headcni/pkg/kube/podexec"
)

func connectivityCmd() *cobra.Command {
	cmd := &cobra.Command{Use: "connectivity", Short: "Try what a pod network is for, with pods of its own on every node"}
	cmd.AddCommand(connectivityTestCmd())
	return cmd
}

func connectivityTestCmd() *cobra.Command {
	f := &lookFlags{}
	var only []string
	var allPairs bool
	cmd := &cobra.Command{
		Use:   "test [--nodes a,b] [--all-pairs]",
		Short: "Try pods, packet sizes, Services, names, ports, egress and NetworkPolicies on a cluster",
		Long: "Runs two pods on each node in namespace " + connectivity.Namespace + ", with HeadCNI's own image, and has them ask each other: from pod to pod on each\n" +
			"node and between nodes, in each family, seen by their own addresses, with packets as large as their link allows; Services, names, NodePorts,\n" +
			"hostPorts, nodes and the API server; NetworkPolicies that deny and allow, and how long they took to hold; and from this machine, where it is\n" +
			"in the tailnet and reaches pods by it. Beyond 16 nodes each asks 8 others, unless --all-pairs.\n\n" +
			"The namespace is removed at the end, also after Ctrl-C; where the test is killed, by the next one. The pods are as Pod Security \"restricted\"\n" +
			"wants them, but for a hostPort: where that is refused it is not tested, which is said.\n\n" +
			"It needs the rights of status, and to get, create, patch and delete namespaces, and in namespace " + connectivity.Namespace + " to create and list\n" +
			"pods, to create pods/exec and services, and to create and delete networkpolicies.\n\n" +
			"Exit code 0: right; 1: something is wrong, and was said; 2: could not look, or could not clean up.",
		DisableFlagsInUseLine: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			write, err := f.reportWriter()
			if err != nil {
				return fail(cmd, err)
			}
			// A second Ctrl-C ends it at once.
			stop := context.AfterFunc(cmd.Context(), func() { signal.Reset(syscall.SIGINT, syscall.SIGTERM) })
			defer stop()
			r, err := f.connectivity(cmd, only, allPairs)
			if err != nil && cmd.Context().Err() != nil {
				return fail(cmd, fmt.Errorf("interrupted: %w", err))
			}
			r.Version = version.Version
			if r.Nodes > 0 { // whatever came of the cleaning up
				if bad := write(cmd.OutOrStdout(), r); bad != nil {
					return fail(cmd, bad)
				}
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
	usage(cmd, cobra.NoArgs)
	f.addCluster(cmd)
	cmd.Flags().StringVarP(&f.namespace, "namespace", "n", kube.DefaultNamespace, "where HeadCNI is installed")
	f.timeout = 30 * time.Second
	cmd.Flags().StringSliceVar(&only, "nodes", nil, "test these nodes only")
	cmd.Flags().BoolVar(&allPairs, "all-pairs", false, "ask from each node to each other, however many there are")
	cmd.Flags().StringVarP(&f.output, "output", "o", "text", "text, json or junit")
	return cmd
}

func (f *lookFlags) reportWriter() (func(io.Writer, connectivity.Report) error, error) {
	switch f.output {
	case "text":
		return func(w io.Writer, r connectivity.Report) error { return r.Text(w) }, nil
	case "json":
		return func(w io.Writer, r connectivity.Report) error { return printJSON(w, r) }, nil
	case "junit":
		return func(w io.Writer, r connectivity.Report) error { return r.JUnit(w) }, nil
	}
	return nil, fmt.Errorf("--output %s: want text, json or junit", f.output)
}

// connectivity looks for the nodes, and tests those.
func (f *lookFlags) connectivity(cmd *cobra.Command, only []string, allPairs bool) (r connectivity.Report, err error) {
	ctx := cmd.Context()
	l, err := f.looker()
	if err != nil {
		return r, err
	}
	if l.cluster == nil {
		return r, errors.New("it needs a Kubernetes: give --kubeconfig")
	}
	s, err := l.look(ctx)
	if err != nil {
		return r, err
	}
	o := connectivity.Options{
		Client: l.cluster.Client, AllPairs: allPairs, Here: connectivity.Here,
		Say: func(format string, args ...any) { cmd.PrintErrf("headcnictl: "+format+"\n", args...) },
		Exec: func(ctx context.Context, pod podexec.Pod, stdin []byte, command ...string) ([]byte, error) {
			return podexec.Feed(ctx, l.config, pod, stdin, command...)
		},
	}
	var names []string
	for _, n := range s.Nodes {
		if len(only) > 0 && !slices.Contains(only, n.Name) {
			continue
		}
		names = append(names, n.Name)
		if n.Status != nil && n.Status.Policy == nil {
			o.NoPolicies = fmt.Sprintf("network.networkPolicy is false on %s", n.Name)
		}
	}
	for _, name := range only {
		if !slices.Contains(names, name) {
			return r, fmt.Errorf("there is no Node %q with HeadCNI", name)
		}
	}
	if o.Nodes, o.Image, err = connectivity.Find(ctx, l.cluster.Client, f.namespace, doctor.Labels, names); err != nil {
		return r, err
	}
	return connectivity.Run(ctx, o)
}
