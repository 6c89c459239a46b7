package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/headcni/headcni/pkg/policy/report"
)

func dropsCmd() *cobra.Command {
	f := &policyFlags{}
	var follow bool
	var pod string
	cmd := &cobra.Command{
		Use:   "drops [-f] [--pod P] [--node N]",
		Short: "Show the packets that NetworkPolicies deny, with both pods and the policies that isolate",
		Long: "Show the packets that NetworkPolicies deny: when, in which direction, both ends by name, protocol and port, and which\n" +
			"policies isolate the pod.\n\n" +
			"With -f the kernel logs them while the command runs, at most ten a second of each kind: the counters count all.\n" +
			"Without it: those that were logged last, and the counters.\n\n" +
			policyHow + "\n\n" +
			"JSON is an object, of a cluster a list of one for each node; with -f one for each packet. Exit code 0: answered; 2: no answer, of a node at least.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return f.run(cmd, func(ctx context.Context, out io.Writer) error {
				if follow {
					ctx, stop, err := untilGone(ctx, cmd.InOrStdin(), os.Getenv("KUBERNETES_SERVICE_HOST") != "")
					if err != nil {
						return err
					}
					defer stop()
					return f.followDrops(ctx, out, cmd.ErrOrStderr(), pod)
				}
				d, err := report.AskDrops(ctx, f.socket, f.pods, pod)
				if err != nil {
					return err
				}
				if f.output == "json" {
					return printJSON(out, d)
				}
				return d.Print(out)
			}, func(ctx context.Context, l looker, out io.Writer) error {
				if follow {
					return f.followAll(ctx, l, out, cmd.ErrOrStderr(), pod)
				}
				command := []string{"drops", "-n", f.pods}
				if pod != "" {
					command = append(command, "--pod", pod)
				}
				answers, err := askDaemons[report.Drops](ctx, l, nil, command...)
				return errors.Join(printAll(f, out, answers, func(a report.Drops) error { return a.Print(out) }), err)
			})
		},
	}
	f.add(cmd)
	cmd.Flags().StringVar(&f.node, "node", "", "look at this node only")
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "have the kernel log, and show each packet as it is denied, until Ctrl-C")
	cmd.Flags().StringVar(&pod, "pod", "", "only packets from or to this pod (NAMESPACE/NAME, or NAME)")
	return cmd
}

// untilGone ends with whoever follows. In a pod nothing tells that `kubectl exec` has ended but a terminal, or the end of standard input: without both
// the kernel would log on for as long as the pod lives.
func untilGone(ctx context.Context, in io.Reader, pod bool) (context.Context, context.CancelFunc, error) {
	ctx, stop := context.WithCancel(ctx)
	f, ok := in.(*os.File)
	if !pod || !ok || isTerminal(f) {
		return ctx, stop, nil
	}
	if st, err := f.Stat(); err == nil && st.Mode()&os.ModeCharDevice != 0 { // /dev/null
		stop()
		return ctx, stop, errors.New("with -f run it by `kubectl exec -it`, or -i: without, it would go on in the pod when you have left")
	}
	go func() { // nothing can interrupt the read
		_, _ = io.Copy(io.Discard, f) // an error is an end
		stop()
	}()
	return ctx, stop, nil
}

// followDrops prints a line for each packet; JSON is one object a line.
func (f *policyFlags) followDrops(ctx context.Context, out, notes io.Writer, pod string) error {
	lines := json.NewEncoder(out)
	return report.Follow(ctx, f.socket, f.pods, pod, func(e report.Event) error {
		switch {
		case e.Started != nil:
			if e.Started.Note != "" {
				fmt.Fprintln(notes, e.Started.Note)
			}
			fmt.Fprintf(notes, "node %s logs what policies deny, at most ten packets a second of each kind; Ctrl-C ends it\n", e.Started.Node)
		case e.Lost > 0:
			fmt.Fprintf(notes, "%d packets are not shown: there were too many\n", e.Lost)
		case e.Drop != nil && f.output == "json":
			return lines.Encode(e.Drop)
		case e.Drop != nil:
			_, err := fmt.Fprintln(out, e.Drop.Text())
			return err
		}
		return nil
	})
}
