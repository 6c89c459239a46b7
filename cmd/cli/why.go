package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/headcni/headcni/internal/version"
	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/kube/podexec"
	"github.com/headcni/headcni/pkg/why"
)

// reachFlags are those of commands about two ends.
type reachFlags struct {
	lookFlags
	pods, via string
}

func (f *reachFlags) add(cmd *cobra.Command) {
	cmd.Args = cobra.ExactArgs(2)
	f.addForPods(cmd, &f.pods)
}

const reachEnds = `A and B are pods (NAMESPACE/NAME, or NAME), node/NAME, an address, or B a
device of the tailnet by its name.`

const reachHow = `With a kubeconfig it runs ` + "`headcnictl`" + ` in the pods of both nodes' daemons: no
port is opened. Who runs it must be allowed to list nodes, to get pods that
are named, and in the namespace of HeadCNI to list pods and create pods/exec.
Without Kubernetes, or with --local, it runs on the node that A is on, as
root, and asks the other node by --via.`

func whyCmd() *cobra.Command {
	f := &reachFlags{}
	var q why.Question
	var port string
	cmd := &cobra.Command{
		Use:     "why A B [--port P] [--proto tcp|udp|icmp] [--live]",
		Aliases: []string{"trace"},
		Short:   "Why can A reach B, or why not? Step by step, as both nodes' kernels say",
		Long: `Why can A reach B, or why not? Both nodes are asked, step by step: the pod's
link and lease, NetworkPolicies, rules and routes, the guard, tailscaled and
its path, what Headscale approved and lets through, and whether somebody
listens on the port. It is the kernels and tailscaleds that answer, not a
model; where the two differ, that is a finding of its own. Nothing is sent
from A: the port is tried from B's own node, and tailscaled pings its peer.

With --live a packet is sent too: an ICMP echo, a TCP SYN, or a UDP datagram
of 4 bytes, up to three times. Both nodes say which links it passed, and what
their rules counted and denied meanwhile, so that the place where it is lost is
known. It is sent from inside pod A where this program may enter its network
namespace, as root on a node; in Kubernetes it is made to come in by A's link
on the node, so that all but A's own end is tried.

` + reachEnds + ` Without --port it asks for ICMP.

  headcnictl why shop/web cart/redis-0 --port 6379
  headcnictl why shop/web cart/redis-0 --port 6379 --live
  headcnictl why 10.244.1.7 node/worker-2 --port 10250
  sudo headcnictl why lab/web 10.244.2.3 --port 53/udp --via 'ssh root@{}'

` + reachHow + `

Exit code 0: yes; 1: no, and at which step, why and what to do was said; 2:
could not look at something that decides.`,
		DisableFlagsInUseLine: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			err := f.check()
			if err == nil {
				err = parsePort(&q, port)
			}
			var c why.Case
			if err == nil {
				c, err = f.look(cmd.Context(), args[0], args[1], q)
			}
			if err != nil {
				return fail(cmd, err)
			}
			r := why.Judge(version.Version, c)
			if f.output == "json" {
				err = printJSON(cmd.OutOrStdout(), r)
			} else {
				err = r.Print(cmd.OutOrStdout(), textFor(cmd.OutOrStdout()).Width)
			}
			if err != nil {
				return fail(cmd, err)
			}
			return map[why.Verdict]error{why.NoWay: notRight, why.Unsure: couldNotLook}[r.Verdict]
		},
	}
	f.add(cmd)
	cmd.Flags().StringVar(&f.via, "via", "", "without Kubernetes: what runs a command on another node, such as 'ssh root@{}'")
	cmd.Flags().StringVar(&port, "port", "", "port of B: a number, with /udp where it is not TCP")
	cmd.Flags().StringVar(&q.Protocol, "proto", "", "tcp, udp or icmp")
	cmd.Flags().BoolVar(&q.Live, "live", false, "send a packet too, and say where it passed and where it was lost")
	cmd.AddCommand(whyPartCmd(), whyHeadscaleCmd(), whyLiveCmd("send"), whyLiveCmd("watch"))
	return cmd
}

// parsePort reads --port and --proto into a question.
func parsePort(q *why.Question, port string) error {
	number, protocol, _ := strings.Cut(port, "/")
	if protocol != "" && q.Protocol != "" && protocol != q.Protocol {
		return fmt.Errorf("--port %s and --proto %s contradict each other", port, q.Protocol)
	}
	if protocol != "" {
		q.Protocol = protocol
	}
	switch {
	case q.Protocol == "" && port == "":
		q.Protocol = "icmp"
	case q.Protocol == "":
		q.Protocol = "tcp"
	}
	if q.Protocol != "tcp" && q.Protocol != "udp" && q.Protocol != "icmp" {
		return fmt.Errorf("protocol %s: want tcp, udp or icmp", q.Protocol)
	}
	if (q.Protocol == "icmp") != (port == "") {
		return fmt.Errorf("--proto %s: tcp and udp need --port, and icmp has none", q.Protocol)
	}
	if port == "" {
		return nil
	}
	if _, err := fmt.Sscanf(number+" end", "%d end", &q.Port); err != nil || q.Port == 0 {
		return fmt.Errorf("--port %s: want a number from 1 to 65535", port)
	}
	return nil
}

// look asks both ends, by the API server or from this node.
func (f *reachFlags) look(ctx context.Context, a, b string, q why.Question) (c why.Case, err error) {
	l, err := f.looker()
	if err != nil {
		return c, err
	}
	if l.cluster != nil {
		if f.via != "" {
			return c, errors.New("--via is for nodes without Kubernetes: leave it out, or add --local")
		}
		stream := func(ctx context.Context, pod podexec.Pod, in io.Reader, out io.Writer, command ...string) error {
			return podexec.Stream(ctx, l.config, pod, in, out, command...)
		}
		c, err = why.Cluster{Cluster: *l.cluster, Pods: f.pods, Stream: stream}.Look(ctx, a, b, q)
	} else {
		p := place(f.socket)
		cfg, getenv, _ := localConfig()
		c, err = why.Node{Place: p, Via: f.via, Config: cfg.Headscale, Getenv: getenv, Timeout: f.timeout}.Look(ctx, a, b, q)
	}
	if ctx.Err() != nil {
		err = errInterrupted
	}
	return c, err
}

// place is this node.
func place(socket string) why.Place {
	cfg, _, _ := localConfig() // without it: where things mostly are
	p := why.Place{Socket: socket, ConfDir: cfg.CNI.ConfDir}
	p.Tailscaled, p.TailscaledError = localTailscaled()
	return p
}

// whyPartCmd is what why runs on each node.
func whyPartCmd() *cobra.Command {
	var q why.Question
	socket := ""
	cmd := &cobra.Command{
		Use: "part near|far SRC DST", Args: cobra.ExactArgs(3), Hidden: true, Short: "What why asks one node, as JSON",
		RunE: func(cmd *cobra.Command, args []string) error {
			q.Far, q.Src, q.Dst = args[0] == "far", args[1], args[2]
			s, err := place(socket).Look(cmd.Context(), q)
			if err != nil {
				return err
			}
			return json.NewEncoder(cmd.OutOrStdout()).Encode(s)
		},
	}
	askOne(cmd, &q, &socket)
	return cmd
}

// askOne adds what says what one node is asked, and by which socket.
func askOne(cmd *cobra.Command, q *why.Question, socket *string) {
	cmd.Flags().StringVar(socket, "socket", paths.APISocket, "where the daemon answers")
	cmd.Flags().StringVar(&q.Protocol, "proto", "icmp", "tcp, udp or icmp")
	cmd.Flags().Uint16Var(&q.Port, "port", 0, "port")
}

// whyLiveCmd is what why --live runs on each node: the near one sends, and the far one looks on until its standard input ends.
func whyLiveCmd(what string) *cobra.Command {
	var q why.Question
	var mark uint32
	socket := ""
	cmd := &cobra.Command{
		Use: what + " SRC DST", Args: cobra.ExactArgs(2), Hidden: true, Short: "What why --live has one node do, as JSON",
		RunE: func(cmd *cobra.Command, args []string) error {
			q.Far, q.Src, q.Dst = what == "watch", args[0], args[1]
			p, closed, err := why.Place{Socket: socket}.Probe(q, mark)
			if err != nil {
				return err
			}
			defer closed()
			if q.Far {
				return p.Watch(cmd.Context(), cmd.InOrStdin(), cmd.OutOrStdout())
			}
			s, err := p.Send(cmd.Context())
			if err != nil {
				return err
			}
			return json.NewEncoder(cmd.OutOrStdout()).Encode(s)
		},
	}
	askOne(cmd, &q, &socket)
	cmd.Flags().Uint32Var(&mark, "mark", 0, "what the packet is recognised by")
	return cmd
}

// whyHeadscaleCmd is what why runs in the controller's pod, which has the key.
func whyHeadscaleCmd() *cobra.Command {
	return &cobra.Command{
		Use: "headscale", Args: cobra.NoArgs, Hidden: true, Short: "What why asks Headscale, as JSON",
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, getenv, err := localConfig()
			if err != nil {
				return err
			}
			h, err := why.AskHeadscale(cmd.Context(), cfg.Headscale, getenv)
			if err != nil {
				return err
			}
			return json.NewEncoder(cmd.OutOrStdout()).Encode(h)
		},
	}
}
