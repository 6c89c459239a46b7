package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/headcni/headcni/internal/lab"
)

// demoKind tells demos from other worlds that are kept, such as those of `make e2e-up`.
const demoKind = "demo"

// exitCode is an error that has been told already.
type exitCode int

func (e exitCode) Error() string { return fmt.Sprintf("exit code %d", int(e)) }

func demoCmd() *cobra.Command {
	var keep, noColor bool
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Show HeadCNI at work: two nodes and four pods on this machine, with real Headscale and tailscaled",
		Long: `Builds two nodes and four pods in namespaces on this machine, with a real Headscale and real tailscaleds, shows that
the pods reach each other and how fast, kills one part after the other, and cleans up. Nothing outside those namespaces
is touched. Exits with 1 where something that it shows did not hold.

It needs root, or a host that lets ordinary users make user namespaces and open /dev/net/tun.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if os.Geteuid() != 0 {
				return asRoot()
			}
			return runDemo(cmd.Context(), newScreen(os.Stdout, noColor), keep)
		},
	}
	cmd.Flags().BoolVar(&keep, "keep", false, "leave the world running and say how to look around in it")
	cmd.Flags().BoolVar(&noColor, "no-color", false, "no colours, also on a terminal")
	cmd.AddCommand(demoDownCmd(), demoShellCmd())
	return cmd
}

// asRoot runs the demo in a user namespace.
func asRoot() error {
	code, err := lab.RunAsRoot()
	if errors.Is(err, lab.ErrNeedsRoot) {
		return fmt.Errorf("the demo %w; run `sudo make demo`", err)
	}
	if err == nil && code != 0 {
		return exitCode(code)
	}
	return err
}

func demoDownCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "down",
		Short: "End what `demo --keep` left running",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			worlds, err := lab.Kept(demoKind)
			if err != nil {
				return err
			}
			if len(worlds) == 0 {
				fmt.Fprintln(cmd.OutOrStdout(), "nothing to end: no demo of yours is running"+othersHint())
			}
			ctx, cancel := context.WithTimeoutCause(cmd.Context(), 10*time.Second, errors.New("it did not end within 10 s"))
			defer cancel()
			for _, w := range worlds {
				if err := w.Down(ctx); err != nil {
					return fmt.Errorf("end the demo in %s: %w", w.Dir, err)
				}
				fmt.Fprintf(cmd.OutOrStdout(), "ended the demo of %s\n", w.Made.Format(time.TimeOnly))
			}
			return lab.Sweep()
		},
	}
}

func demoShellCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "shell POD|NODE|control [COMMAND...]",
		Short: "A shell, or a command, in a pod or on a node of a demo that was kept",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			w, err := newestWorld()
			if err != nil {
				return err
			}
			return w.Enter(args[0], args[1:])
		},
		ValidArgsFunction: func(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			w, err := newestWorld()
			if err != nil || len(args) > 0 {
				return nil, cobra.ShellCompDirectiveDefault
			}
			return w.Names(), cobra.ShellCompDirectiveNoFileComp
		},
	}
	cmd.Flags().SetInterspersed(false) // flags behind the name are the command's
	return cmd
}

// othersHint reminds of a demo that root keeps: its folder cannot be looked into.
func othersHint() string {
	if os.Geteuid() == 0 {
		return ""
	}
	return " (one that was started with sudo needs sudo here too)"
}

func newestWorld() (lab.World, error) {
	worlds, err := lab.Kept(demoKind)
	if err != nil {
		return lab.World{}, err
	}
	if len(worlds) == 0 {
		return lab.World{}, fmt.Errorf("no demo of yours is running%s; start one with `make demo ARGS=--keep`", othersHint())
	}
	return worlds[len(worlds)-1], nil
}

// runDemo shows everything. What does not hold is counted and the show goes on; an error ends it.
func runDemo(ctx context.Context, s *screen, keep bool) error {
	began := time.Now()
	d := &demo{screen: s}
	s.println("")
	s.println("  " + s.paint(bold, "HeadCNI") + "  two nodes, four pods, IPv4 and IPv6, on real Headscale and tailscaled")
	var err error
	for _, part := range []func(context.Context) error{d.setUp, d.matrix, d.throughput, d.names, d.faults} {
		if err = part(ctx); err != nil {
			break
		}
	}
	s.clear()
	if err == nil && keep {
		if err = d.lab.Keep(demoKind, d.pods); err == nil {
			d.lookAround()
			return d.verdict(time.Since(began))
		}
	}
	if d.lab != nil {
		err = errors.Join(err, d.cleanUp())
	}
	if ctx.Err() != nil {
		return errors.New("interrupted")
	}
	if err != nil {
		return err
	}
	return d.verdict(time.Since(began))
}

// verdict is the last line, and the exit code.
func (d *demo) verdict(took time.Duration) error {
	d.println("")
	if d.failed > 0 {
		d.println("  " + d.paint(red, fmt.Sprintf("%d of the above did not hold.", d.failed)) + d.paint(faint, "  "+short(took)))
		return exitCode(1)
	}
	d.println("  " + d.paint(green, "All of it held.") + d.paint(faint, "  "+short(took)))
	return nil
}

// lookAround says what can be done in a world that stays.
func (d *demo) lookAround() {
	self := filepath.Clean(os.Args[0])
	if os.Getenv("SUDO_USER") != "" && os.Getenv(lab.DirEnv) == "" {
		self = "sudo " + self
	}
	remote := d.pods[2]
	d.heading("It stays. Look around:")
	for _, l := range [][2]string{
		{"a shell in a pod", "shell " + d.pods[0].Name},
		{"one pod asks another", fmt.Sprintf("shell %s headcnictl probe ask %s", d.pods[0].Name, remote.Addrs[0])},
		{"the tailnet, seen by node-1", "shell node-1 tailscale status"},
		{"what Headscale knows", "shell control headscale nodes list-routes"},
		{"what the daemon wrote", "shell node-1 cat /etc/cni/net.d/10-headcni.conflist"},
		{"how packets are routed", "shell node-2 ip rule"},
		{"what guards them", "shell node-2 nft list ruleset"},
		{"end it", "down"},
	} {
		d.detail("%s %s demo %s", d.paint(faint, fmt.Sprintf("%-28s", l[0])), self, l[1])
	}
	d.detail("%s %s", d.paint(faint, fmt.Sprintf("%-28s", "logs")), filepath.Join(d.lab.Dir, "*", "*.log"))
}
