package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/headcni/headcni/pkg/policy/report"
)

// couldNotLook is the exit code where there is no answer, and differs the one where the kernel does otherwise than policies say.
const (
	differs      exitCode = 1
	couldNotLook exitCode = 2
)

// policyFlags are the flags of all commands about policies.
type policyFlags struct {
	lookFlags
	pods string
}

func (f *policyFlags) add(cmd *cobra.Command) { f.addForPods(cmd, &f.pods) }

// run has the exit codes of all commands that ask daemons: what is printed is the answer, and an error that there is none. here asks this
// node, there a cluster, where a kubeconfig leads to one.
func (f *policyFlags) run(cmd *cobra.Command, here func(ctx context.Context, out io.Writer) error, there func(ctx context.Context, l looker, out io.Writer) error) error {
	err := f.check()
	f.local = f.local || cmd.Flags().Changed("socket")
	var l looker
	if err == nil {
		l, err = f.looker()
	}
	switch {
	case err != nil:
	case l.cluster != nil:
		err = there(cmd.Context(), l, cmd.OutOrStdout())
	default:
		err = here(cmd.Context(), cmd.OutOrStdout())
	}
	if err == nil || errors.Is(err, differs) {
		return err
	}
	if errors.Is(err, os.ErrNotExist) && l.cluster == nil && f.kubeconfig == "" {
		err = fmt.Errorf("%w; nodes of a cluster are asked with --kubeconfig", err)
	}
	return fail(cmd, err)
}

const policyHow = `With a kubeconfig it runs ` + "`headcnictl`" + ` in the pods of the nodes' daemons: no
port is opened. Who runs it must be allowed to list nodes, to get pods that
are named, and in the namespace of HeadCNI to list pods and create pods/exec.
Without Kubernetes, or with --local, it asks the daemon of this node, as root.`

func policyCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "policy",
		Short: "Look at the NetworkPolicies that nodes enforce",
	}
	cmd.AddCommand(policyListCmd(), policyExplainCmd())
	return cmd
}

func policyListCmd() *cobra.Command {
	f := &policyFlags{}
	cmd := &cobra.Command{
		Use:   "list [--node N]",
		Short: "List nodes' pods, by which policies each is isolated, and how many packets were denied",
		Long: "List nodes' pods, by which policies each is isolated, and how many packets\nwere denied.\n\n" + policyHow + "\n\n" +
			"JSON is an object, of a cluster a list of one for each node. Exit code 0: answered; 2: no answer, of a node at least.",
		Args: cobra.NoArgs, DisableFlagsInUseLine: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return f.run(cmd, func(ctx context.Context, out io.Writer) error {
				l, err := report.AskList(ctx, f.socket)
				if err != nil {
					return err
				}
				if f.output == "json" {
					return printJSON(out, l)
				}
				return l.Print(out, time.Now())
			}, func(ctx context.Context, l looker, out io.Writer) error {
				answers, err := askDaemons[report.List](ctx, l, nil, "policy", "list")
				return errors.Join(printAll(f, out, answers, func(a report.List) error { return a.Print(out, time.Now()) }), err)
			})
		},
	}
	f.add(cmd)
	cmd.Flags().StringVar(&f.node, "node", "", "look at this node only")
	return cmd
}

func policyExplainCmd() *cobra.Command {
	f := &policyFlags{}
	var q report.Question
	cmd := &cobra.Command{
		Use:   "explain POD [--from X | --to X] [--port 80/tcp]",
		Short: "Say what policies mean for a pod, or which of them let a connection through, and whether the kernel does the same",
		Long: "Say what policies mean for a pod, or whether they allow what X sends to it (--from) or what it sends to X (--to), by which policy,\n" +
			"rule, peer and port, each counted from 1. X is another pod (NAMESPACE/NAME, or NAME), an address, or a node (its name, or node/NAME).\n" +
			"Without --port it says which ports are allowed.\n\n" +
			"The pod's node is asked, its kernel by its own look-ups, which must do the same. Policies of both ends count, and each node\n" +
			"enforces those of its own pods: in a cluster the node of X is asked too, without one it is said where to ask.\n\n" +
			"  headcnictl policy explain shop/web\n" +
			"  headcnictl policy explain -n shop web --from edge/gateway --port http\n" +
			"  headcnictl policy explain shop/web --to 203.0.113.7 --port 53/udp\n\n" + policyHow + "\n\n" +
			"Exit code 0: answered; 1: a kernel does otherwise than policies say; 2: no answer.",
		Args: cobra.ExactArgs(1), DisableFlagsInUseLine: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			return f.run(cmd, func(ctx context.Context, out io.Writer) error {
				q.Pod, q.Namespace = args[0], f.pods
				e, err := report.AskExplain(ctx, f.socket, q)
				if err != nil {
					return err
				}
				return f.printExplanation(out, e)
			}, func(ctx context.Context, l looker, out io.Writer) error {
				nodes, err := f.nodesOf(ctx, l, args[0], q.From+q.To)
				if err != nil {
					return err
				}
				command := []string{"policy", "explain", args[0], "-n", f.pods}
				for flag, value := range map[string]string{"--from": q.From, "--to": q.To, "--port": q.Port} {
					if value != "" {
						command = append(command, flag, value)
					}
				}
				said, lacking := askDaemons[report.Explanation](ctx, l, nodes, command...)
				if len(said) == 0 {
					return lacking
				}
				if err := f.printExplanation(out, bothSides(said)); lacking == nil {
					return err
				}
				return lacking
			})
		},
	}
	f.add(cmd)
	cmd.Flags().StringVar(&q.From, "from", "", "who sends to the pod: a pod, an address or a node")
	cmd.Flags().StringVar(&q.To, "to", "", "whom the pod sends to: a pod, an address or a node")
	cmd.Flags().StringVar(&q.Port, "port", "", "port of who is sent to: a number or a port's name, with /udp or /sctp where it is not TCP; or icmp")
	cmd.MarkFlagsMutuallyExclusive("from", "to")
	return cmd
}

func (f *policyFlags) printExplanation(out io.Writer, e report.Explanation) (err error) {
	if f.output == "json" {
		err = printJSON(out, e)
	} else {
		err = e.Print(out)
	}
	if err == nil && e.Wrong() {
		return differs
	}
	return err
}
