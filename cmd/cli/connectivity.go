package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/headcni/headcni/internal/version"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/connectivity"
	"github.com/headcni/headcni/pkg/doctor"
	"github.com/headcni/headcni/pkg/kube"
	"github.com/headcni/headcni/pkg/kube/podexec"
)

func connectivityCmd() *cobra.Command {
	cmd := &cobra.Command{Use: "connectivity", Short: "Try what a pod network is for, with pods of its own on every node"}
	cmd.AddCommand(connectivityPerfCmd(), connectivityTestCmd())
	return cmd
}

func connectivityTestCmd() *cobra.Command {
	f := &lookFlags{}
	var only []string
	var allPairs, yes bool
	var disrupt string
	cmd := &cobra.Command{
		Use:   "test [--nodes a,b] [--all-pairs] [--disrupt[=NODE]]",
		Short: "Try pods, packet sizes, Services, names, ports, egress and NetworkPolicies on a cluster",
		Long: "Runs two pods on each node in namespace " + connectivity.Namespace + ", with HeadCNI's own image, and has them ask each other: from pod to pod on each\n" +
			"node and between nodes, in each family, seen by their own addresses, with packets as large as their link allows; Services, names, NodePorts,\n" +
			"hostPorts, nodes and the API server; NetworkPolicies that deny and allow, and how long they took to hold; and from this machine, where it is\n" +
			"in the tailnet and reaches pods by it. Beyond 16 nodes each asks 8 others, unless --all-pairs.\n\n" +
			"The namespace is removed at the end, also after Ctrl-C; where the test is killed, by the next one. The pods are as Pod Security \"restricted\"\n" +
			"wants them, but for a hostPort: where that is refused it is not tested, which is said.\n\n" +
			"With --disrupt it restarts, at the end, on one node, first the pod of headcni-daemon and then that of tailscaled, while the test pods send each\n" +
			"other datagrams, 50 a second in each family, within each node and between this node and the others. It says how many of each flow were lost and\n" +
			"how long the longest gap was. What the pods of that node send to other nodes is interrupted for seconds meanwhile: at a terminal it asks\n" +
			"before, elsewhere it needs --yes. A tailscaled of the host's own is left alone.\n\n" +
			"It needs the rights of status, and to get, create, patch and delete namespaces, and in namespace " + connectivity.Namespace + " to create and list\n" +
			"pods, to create pods/exec and services, and to create and delete networkpolicies; with --disrupt to delete pods in the namespace of\n" +
			"HeadCNI, too.\n\n" +
			"Exit code 0: right; 1: something is wrong, and was said; 2: could not look, or could not clean up.",
		DisableFlagsInUseLine: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			write, err := f.reportWriter()
			if err != nil {
				return fail(cmd, err)
			}
			if yes && disrupt == "" {
				return fail(cmd, errors.New("--yes is for --disrupt"))
			}
			defer secondEnds(cmd.Context())()
			o, err := f.testOptions(cmd, only)
			if err == nil && disrupt != "" {
				err = f.disrupt(cmd, &o, disrupt, yes)
			}
			var r connectivity.Report
			if o.AllPairs = allPairs; err == nil {
				r, err = connectivity.Run(cmd.Context(), o.Options)
			}
			if err != nil && cmd.Context().Err() != nil {
				return fail(cmd, fmt.Errorf("interrupted: %w", err))
			}
			r.Version = version.Version
			if r.Nodes > 0 { // whatever came of the cleaning up
				if bad := write(cmd.OutOrStdout(), r); bad != nil {
					return fail(cmd, bad)
				}
			}
			return reported(cmd, err, r.OK)
		},
	}
	f.addConnectivity(cmd, &only)
	cmd.Flags().BoolVar(&allPairs, "all-pairs", false, "ask from each node to each other, however many there are")
	cmd.Flags().StringVar(&disrupt, "disrupt", "", "also restart the daemon and tailscaled of this node; without a name, of the last one by name")
	cmd.Flags().Lookup("disrupt").NoOptDefVal = lastNode
	cmd.Flags().BoolVar(&yes, "yes", false, "do not ask before --disrupt")
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

// lastNode stands for no name.
const lastNode = "last"

// disrupt says what is to be restarted on which node, when the user has agreed.
func (f *lookFlags) disrupt(cmd *cobra.Command, o *testOptions, name string, yes bool) error {
	i := slices.IndexFunc(o.seen, func(n doctor.Node) bool { return n.Name == name })
	if i < 0 && name == lastNode {
		i = len(o.seen) - 1
	}
	if i < 0 {
		return fmt.Errorf("--disrupt=%s: there is no such Node with HeadCNI among those that are tested", name)
	}
	n := o.seen[i]
	switch {
	case n.Err != nil:
		return fmt.Errorf("--disrupt=%s: %w", n.Name, n.Err)
	case len(o.seen) < 2:
		return errors.New("--disrupt needs two nodes or more: there is nobody to send to")
	}
	d := &connectivity.Disrupt{Node: n.Name, Parts: []connectivity.Part{{Name: "headcni-daemon", Pod: n.Pod, Selector: doctor.DaemonLabels}}}
	what := fmt.Sprintf("It will restart headcni-daemon on node %s.", n.Name)
	if ownTailscaled(n) {
		d.Parts = append(d.Parts, connectivity.Part{Name: "tailscaled", Pod: n.Tailscaled, Selector: doctor.TailscaledLabels, Carries: true})
		what = fmt.Sprintf("It will restart headcni-daemon and tailscaled on node %s, whose pods do not reach those of other nodes for some seconds then.", n.Name)
	} else {
		o.Say("tailscaled is the host's own on %s, and is left alone: `systemctl restart tailscaled` there", n.Name)
	}
	if !yes {
		if err := agreed(cmd, what); err != nil {
			return err
		}
	}
	o.Disrupt = d
	return nil
}

// ownTailscaled reports whether the node's tailscaled is a pod of HeadCNI's.
func ownTailscaled(n doctor.Node) bool {
	return n.Status != nil && n.Status.Mode == config.ModeDaemon && n.Tailscaled.Name != ""
}

// agreed asks at a terminal, and is an error where the answer is not yes.
func agreed(cmd *cobra.Command, what string) error {
	if !isTerminal(cmd.InOrStdin()) || !isTerminal(cmd.ErrOrStderr()) {
		return errors.New("nothing was done: " + what + " Say so by --yes")
	}
	cmd.PrintErr(what + " Continue? [y/N] ")
	said := make(chan string, 1)
	go func() { // nothing can interrupt a read from a terminal
		line, _ := bufio.NewReader(cmd.InOrStdin()).ReadString('\n') // an error is no yes
		said <- line
	}()
	select {
	case <-cmd.Context().Done():
		cmd.PrintErrln()
		return errors.New("nothing was done")
	case line := <-said:
		switch strings.ToLower(strings.TrimSpace(line)) {
		case "y", "yes":
			return nil
		}
		return errors.New("nothing was done")
	}
}

// addConnectivity adds what commands that run pods have in common.
func (f *lookFlags) addConnectivity(cmd *cobra.Command, only *[]string) {
	cmd.Args = cobra.NoArgs
	f.addCluster(cmd)
	cmd.Flags().StringVarP(&f.namespace, "namespace", "n", kube.DefaultNamespace, "where HeadCNI is installed")
	f.timeout = 30 * time.Second
	cmd.Flags().StringSliceVar(only, "nodes", nil, "these nodes only")
}

// secondEnds has a second Ctrl-C end a program that still cleans up.
func secondEnds(ctx context.Context) (stop func() bool) {
	return context.AfterFunc(ctx, func() { signal.Reset(syscall.SIGINT, syscall.SIGTERM) })
}

// reported is how a command ends whose report was printed.
func reported(cmd *cobra.Command, err error, ok bool) error {
	switch {
	case err != nil:
		return fail(cmd, err)
	case !ok:
		return notRight
	}
	return nil
}

func connectivityPerfCmd() *cobra.Command {
	f := &lookFlags{}
	var only []string
	var allPairs bool
	var length time.Duration
	cmd := &cobra.Command{
		Use:   "perf [--nodes a,b] [--all-pairs] [--time T]",
		Short: "Measure throughput and latency between pods, and between their nodes",
		Long: "Measures, one after another, between pods of one node and of different nodes,\n" +
			"and as yardsticks between these nodes by the tailnet and beside it (the\n" +
			"underlay), in each family: what arrives of one TCP stream and of eight, and how\n" +
			"long a request and its answer take (half of them, and 99 of 100, at most). Each\n" +
			"node measures to the next one and to itself, with --all-pairs to all, as far\n" +
			"as --time allows. It says which path the nodes had, direct or relayed.\n\n" +
			"Of what goes through the tailnet it says how much of their CPUs the tailscaleds\n" +
			"of both nodes took for it, where they are HeadCNI's own.\n\n" +
			"It fills the network and the nodes' CPUs meanwhile. What goes between nodes\n" +
			"beside the tailnet, in clear, are zeros.\n\n" +
			fmt.Sprintf("It runs two pods on each node and one in the node's own network (port %d of\n", connectivity.PerfPort) +
			"its addresses) in namespace " + connectivity.Namespace + ", with HeadCNI's own image, and removes\n" +
			"them at the end, also after Ctrl-C. Where a pod in the node's network is\n" +
			"refused, pods alone are measured, which is said. It needs the rights of\n" +
			"connectivity test.\n\n" +
			"Exit code 0: measured; 1: pods do not reach each other, which was said; 2:\n" +
			"could not look, or could not clean up.",
		DisableFlagsInUseLine: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if f.output != "table" && f.output != "json" {
				return fail(cmd, fmt.Errorf("--output %s: want table or json", f.output))
			}
			if length < time.Second {
				return fail(cmd, fmt.Errorf("--time %s: want a second or more, such as 1m", length))
			}
			defer secondEnds(cmd.Context())()
			r, err := f.perf(cmd, only, allPairs, length)
			switch {
			case err != nil && cmd.Context().Err() != nil:
				return fail(cmd, fmt.Errorf("interrupted: %w", err))
			case err != nil && len(r.Rows) == 0:
				return fail(cmd, err)
			}
			var bad error
			if r.Version = version.Version; f.output == "json" {
				bad = printJSON(cmd.OutOrStdout(), r)
			} else {
				bad = r.Text(cmd.OutOrStdout(), textFor(cmd.OutOrStdout()).Width)
			}
			return reported(cmd, errors.Join(err, bad), r.OK)
		},
	}
	f.addConnectivity(cmd, &only)
	cmd.Flags().BoolVar(&allPairs, "all-pairs", false, "measure from each node to each other")
	cmd.Flags().DurationVar(&length, "time", time.Minute, "how long to measure in all, beside the start and the end of the pods")
	cmd.Flags().StringVarP(&f.output, "output", "o", "table", "table or json")
	return cmd
}

// perf looks for the nodes, and measures between those.
func (f *lookFlags) perf(cmd *cobra.Command, only []string, allPairs bool, length time.Duration) (r connectivity.PerfReport, err error) {
	o, err := f.testOptions(cmd, only)
	if err != nil {
		return r, err
	}
	o.AllPairs, o.Time = allPairs, length
	m, err := f.mesh(cmd.Context())
	if err != nil {
		return r, err
	}
	for i := range o.Nodes {
		o.Nodes[i].Tailnet = m.IPs(o.Nodes[i].Name)
		for _, n := range o.seen {
			if n.Name == o.Nodes[i].Name && ownTailscaled(n) {
				o.Nodes[i].Tailscaled = n.Tailscaled
			}
		}
	}
	o.Path = func(ctx context.Context) (func(from, to string) string, error) {
		m, err := f.mesh(ctx)
		return m.Path, err
	}
	return connectivity.Perf(cmd.Context(), o.Options)
}

// testOptions are those of pods on nodes, and what was seen of these.
type testOptions struct {
	connectivity.Options
	seen []doctor.Node
}

// testOptions looks for nodes.
func (f *lookFlags) testOptions(cmd *cobra.Command, only []string) (o testOptions, err error) {
	ctx := cmd.Context()
	l, err := f.looker()
	if err != nil {
		return o, err
	}
	if l.cluster == nil {
		return o, errors.New("it needs a Kubernetes: give --kubeconfig")
	}
	s, err := l.look(ctx)
	if err != nil {
		return o, err
	}
	o.Options = connectivity.Options{
		Client: l.cluster.Client, Here: connectivity.Here,
		Say: func(format string, args ...any) { cmd.PrintErrf("headcnictl: "+format+"\n", args...) },
		Exec: func(ctx context.Context, pod podexec.Pod, stdin []byte, command ...string) ([]byte, error) {
			return podexec.Feed(ctx, l.config, pod, stdin, command...)
		},
		Stream: func(ctx context.Context, pod podexec.Pod, in io.Reader, out io.Writer, command ...string) error {
			return podexec.Stream(ctx, l.config, pod, in, out, command...)
		},
	}
	var names []string
	for _, n := range s.Nodes {
		if len(only) > 0 && !slices.Contains(only, n.Name) {
			continue
		}
		names, o.seen = append(names, n.Name), append(o.seen, n)
		if n.Status != nil && n.Status.Policy == nil {
			o.NoPolicies = fmt.Sprintf("network.networkPolicy is false on %s", n.Name)
		}
	}
	for _, name := range only {
		if !slices.Contains(names, name) {
			return o, fmt.Errorf("there is no Node %q with HeadCNI", name)
		}
	}
	o.Nodes, o.Image, err = connectivity.Find(ctx, l.cluster.Client, f.namespace, doctor.Labels, names)
	return o, err
}
