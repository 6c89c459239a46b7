package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/doctor"
	"github.com/headcni/headcni/pkg/policy/report"
)

// couldNotLook is the exit code where there is no answer, and differs the one where the kernel does otherwise than policies say.
const (
	differs      exitCode = 1
	couldNotLook exitCode = 2
)

// policyFlags are the flags of all commands about policies.
type policyFlags struct {
	namespace, output, socket string
}

func (f *policyFlags) add(cmd *cobra.Command) {
	cmd.PersistentFlags().StringVarP(&f.namespace, "namespace", "n", "default", "namespace of pods that are named without one")
	cmd.PersistentFlags().StringVarP(&f.output, "output", "o", "text", "text or json")
	cmd.PersistentFlags().StringVar(&f.socket, "socket", paths.APISocket, "where the daemon answers")
}

// run has the exit codes of all commands that ask the daemon: what ask prints is the answer, and an error that there is none.
func (f *policyFlags) run(cmd *cobra.Command, ask func(ctx context.Context, out io.Writer) error) error {
	err := fmt.Errorf("--output %s: want text or json", f.output)
	if f.output == "text" || f.output == "json" {
		err = ask(cmd.Context(), cmd.OutOrStdout())
	}
	if err == nil || errors.Is(err, differs) {
		return err
	}
	if errors.Is(err, os.ErrNotExist) {
		err = fmt.Errorf("%w; of a node in Kubernetes ask in its pod: `kubectl -n kube-system exec -it POD -- %s`, with POD from `kubectl -n kube-system get pods -o wide -l %s`",
			err, cmd.CommandPath(), doctor.DaemonLabels)
	}
	cmd.PrintErrln("headcnictl:", err)
	return couldNotLook
}

const exitCodes = "\n\nIt asks the daemon of this node, as root. Exit code 0: answered; 1: the kernel does otherwise than policies say; 2: no answer."

func policyCmd() *cobra.Command {
	f := &policyFlags{}
	cmd := &cobra.Command{
		Use:   "policy",
		Short: "Look at the NetworkPolicies that this node enforces",
		Long: "Look at the NetworkPolicies that this node enforces. In Kubernetes:\n\n" +
			"  kubectl -n kube-system exec POD -- headcnictl policy list\n\n" +
			"where POD is the node's pod of the DaemonSet (kubectl -n kube-system get pods -o wide)." + exitCodes,
	}
	f.add(cmd)
	cmd.AddCommand(policyListCmd(f), policyExplainCmd(f))
	return cmd
}

func policyListCmd(f *policyFlags) *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List this node's pods, by which policies each is isolated, and how many packets were denied",
		Args:  cobra.NoArgs,
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
			})
		},
	}
}

func policyExplainCmd(f *policyFlags) *cobra.Command {
	var q report.Question
	cmd := &cobra.Command{
		Use:   "explain POD [--from X | --to X] [--port 80/tcp]",
		Short: "Say what policies mean for a pod, or which of them let a connection through, and whether the kernel does the same",
		Long: "Say what policies mean for a pod, or whether they allow what X sends to it (--from) or what it sends to X (--to), by which policy,\n" +
			"rule, peer and port, each counted from 1. X is another pod (NAMESPACE/NAME, or NAME), an address, or a node (its name, or node/NAME).\n" +
			"Without --port it says which ports are allowed.\n\n" +
			"The kernel of this node is asked by its own look-ups, and must do the same. Policies of both ends count, and each node\n" +
			"enforces those of its own pods: of the other node's kernel it is said where to ask.\n\n" +
			"  headcnictl policy explain shop/web\n" +
			"  headcnictl policy explain -n shop web --from edge/gateway --port http\n" +
			"  headcnictl policy explain shop/web --to 203.0.113.7 --port 53/udp" + exitCodes,
		Args: cobra.ExactArgs(1), DisableFlagsInUseLine: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			return f.run(cmd, func(ctx context.Context, out io.Writer) error {
				q.Pod, q.Namespace = args[0], f.namespace
				e, err := report.AskExplain(ctx, f.socket, q)
				if err != nil {
					return err
				}
				if f.output == "json" {
					err = printJSON(out, e)
				} else {
					err = e.Print(out)
				}
				if err == nil && e.Wrong() {
					return differs
				}
				return err
			})
		},
	}
	cmd.Flags().StringVar(&q.From, "from", "", "who sends to the pod: a pod, an address or a node")
	cmd.Flags().StringVar(&q.To, "to", "", "whom the pod sends to: a pod, an address or a node")
	cmd.Flags().StringVar(&q.Port, "port", "", "port of who is sent to: a number or a port's name, with /udp or /sctp where it is not TCP; or icmp")
	cmd.MarkFlagsMutuallyExclusive("from", "to")
	return cmd
}
