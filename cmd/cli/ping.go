package main

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/headcni/headcni/pkg/why"
)

const pingSize = 84 // bytes, as ping(8) sends

func pingCmd() *cobra.Command {
	f := &reachFlags{}
	var q why.Pings
	cmd := &cobra.Command{
		Use:   "ping A B [-c N] [--size S]",
		Short: "Round trip from A to B, and the path through the tailnet",
		Long: `Round trip from A to B by ICMP, which nobody on the way may fragment, and the
path through the tailnet. It is sent from pod A itself where this program may
enter its network namespace, as root on a node; in Kubernetes it is sent from
the node of A, and says so.

` + reachEnds + `

` + pingHow + `

Exit code 0: all were answered; 1: some were lost; 2: could not send.`,
		DisableFlagsInUseLine: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			err := f.check()
			if err == nil {
				err = checkPings(q)
			}
			var p why.Pinged
			if err == nil {
				p, err = f.ping(cmd.Context(), args[0], args[1], q)
			}
			if err == nil && f.output == "json" {
				err = printJSON(cmd.OutOrStdout(), p)
			} else if err == nil {
				err = p.Print(cmd.OutOrStdout(), args[1])
			}
			switch {
			case err != nil:
				return fail(cmd, err)
			case !p.OK():
				return notRight
			}
			return nil
		},
	}
	f.add(cmd)
	addPings(cmd, &q)
	part := &cobra.Command{
		Use: "part SRC DST", Args: cobra.ExactArgs(2), Hidden: true, Short: "What ping asks one node, as JSON",
	}
	var node why.Pings
	addPings(part, &node)
	part.RunE = func(cmd *cobra.Command, args []string) error {
		node.Src, node.Dst = args[0], args[1]
		p, err := place(f.socket).Ping(cmd.Context(), node)
		if err != nil {
			return err
		}
		return json.NewEncoder(cmd.OutOrStdout()).Encode(p)
	}
	cmd.AddCommand(part)
	return cmd
}

const pingHow = `With a kubeconfig it runs ` + "`headcnictl`" + ` in the pod of the daemon on A's node,
with the rights that ` + "`headcnictl why`" + ` needs. Without Kubernetes, or with
--local, it runs on the node that A is on, as root.`

func addPings(cmd *cobra.Command, q *why.Pings) {
	cmd.Flags().IntVarP(&q.Count, "count", "c", 3, "how many packets")
	cmd.Flags().IntVar(&q.Size, "size", pingSize, "bytes of a packet, IP header and all")
}

func checkPings(q why.Pings) error {
	switch {
	case q.Count < 1 || q.Count > 1000:
		return fmt.Errorf("--count %d: want 1 to 1000", q.Count)
	case q.Size < why.MinPing || q.Size > why.MaxPing:
		return fmt.Errorf("--size %d: want %d to %d bytes", q.Size, why.MinPing, why.MaxPing)
	}
	return nil
}

func (f *reachFlags) ping(ctx context.Context, a, b string, q why.Pings) (p why.Pinged, err error) {
	l, err := f.looker()
	if err != nil {
		return p, err
	}
	if l.cluster != nil {
		p, err = why.Cluster{Cluster: *l.cluster, Pods: f.pods}.Ping(ctx, a, b, q)
	} else {
		q.Src, q.Dst = a, b
		p, err = place(f.socket).Ping(ctx, q)
	}
	if ctx.Err() != nil {
		err = errInterrupted
	}
	return p, err
}
