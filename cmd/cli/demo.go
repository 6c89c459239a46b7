package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/pkg/config/names"
)

// demoKind tells demos from other worlds that are kept, such as those of `make e2e-up`.
const demoKind = "demo"

// exitCode is an error that has been told already.
type exitCode int

func (e exitCode) Error() string { return fmt.Sprintf("exit code %d", int(e)) }

func demoCmd() *cobra.Command {
	var o demoOptions
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Show HeadCNI at work: two nodes and four pods on this machine, with real Headscale and tailscaled",
		Long: `Builds two nodes and four pods in namespaces on this machine, with a real Headscale and real tailscaleds, shows that
the pods reach each other and how fast, kills one part after the other, and cleans up. Nothing outside those namespaces
is touched. Exits with 1 where something that it shows did not hold.

It needs root, or a host that lets ordinary users make user namespaces and open /dev/net/tun.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := o.check(); err != nil {
				return err
			}
			if os.Geteuid() != 0 {
				return asRoot()
			}
			return runDemo(cmd.Context(), newScreen(cmd.OutOrStdout(), o.noColor), o)
		},
	}
	cmd.Flags().BoolVar(&o.keep, "keep", false, "leave the world running and say how to look around in it")
	cmd.Flags().StringVar(&o.name, "name", "", "with --keep: what to call it; empty: demo-1, or the next number that is free")
	cmd.Flags().BoolVar(&o.noColor, "no-color", false, "no colours, also on a terminal")
	cmd.AddCommand(demoListCmd(), demoShellCmd(), demoDownCmd())
	return cmd
}

type demoOptions struct {
	keep, noColor bool
	name          string
}

// check tells what is wrong before a demo has been built.
func (o demoOptions) check() error {
	switch {
	case o.name == "":
		return nil
	case !o.keep:
		return errors.New("--name names a demo that stays: want --keep too")
	case !names.Valid(o.name):
		return fmt.Errorf("--name %q: want a letter or digit and then letters, digits, underscore, dot and dash", o.name)
	}
	worlds, err := lab.Kept(demoKind)
	if err == nil && slices.Contains(worldNames(worlds), o.name) {
		err = fmt.Errorf("--name %s: a demo of that name is running; end it with `headcnictl demo down %s`", o.name, o.name)
	}
	return err
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

func worldNames(worlds []lab.World) (list []string) {
	for _, w := range worlds {
		list = append(list, w.Name)
	}
	return list
}

func demoListCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List the demos of yours that were kept",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			worlds, err := lab.Kept(demoKind)
			if err != nil {
				return err
			}
			if len(worlds) == 0 {
				_, err := fmt.Fprintln(cmd.OutOrStdout(), "no demo of yours is running"+othersHint())
				return err
			}
			w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
			fmt.Fprintln(w, "NAME\tSINCE\tPODS AND MACHINES\tFOLDER")
			for _, world := range worlds {
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", world.Name, world.Made.Format(time.DateTime), strings.Join(world.Names(), " "), world.Dir)
			}
			return w.Flush()
		},
	}
}

// downWait is how long the end of one demo may take.
const downWait = 10 * time.Second

func demoDownCmd() *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:   "down [NAME...]",
		Short: "End what `demo --keep` left running; the name may be left out where there is one",
		RunE: func(cmd *cobra.Command, args []string) error {
			worlds, err := lab.Kept(demoKind)
			if err != nil {
				return err
			}
			if len(worlds) == 0 && len(args) == 0 {
				fmt.Fprintln(cmd.OutOrStdout(), "nothing to end: no demo of yours is running"+othersHint())
				return lab.Sweep()
			}
			if worlds, err = selectWorlds(worlds, args, all); err != nil {
				return err
			}
			var errs []error
			for _, w := range worlds {
				errs = append(errs, end(cmd, w))
			}
			return errors.Join(append(errs, lab.Sweep())...)
		},
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			worlds, _ := lab.Kept(demoKind) // none to offer, then
			return worldNames(worlds), cobra.ShellCompDirectiveNoFileComp
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "end all of yours")
	return cmd
}

// selectWorlds chooses among the demos that run.
func selectWorlds(worlds []lab.World, wanted []string, all bool) (chosen []lab.World, err error) {
	switch {
	case all && len(wanted) > 0:
		return nil, errors.New("want names or --all, not both")
	case all:
		return worlds, nil
	case len(wanted) == 0:
		w, err := selectWorld(worlds, "", "name those to end, or say --all")
		return []lab.World{w}, err
	}
	for _, name := range slices.Compact(slices.Sorted(slices.Values(wanted))) {
		w, err := selectWorld(worlds, name, "")
		if err != nil {
			return nil, err
		}
		chosen = append(chosen, w)
	}
	return chosen, nil
}

func end(cmd *cobra.Command, w lab.World) error {
	ctx, cancel := context.WithTimeoutCause(cmd.Context(), downWait, fmt.Errorf("it did not end within %s", downWait))
	defer cancel()
	if err := w.Down(ctx); err != nil {
		return fmt.Errorf("end %s in %s: %w", w.Name, w.Dir, err)
	}
	_, err := fmt.Fprintf(cmd.OutOrStdout(), "ended %s, kept since %s\n", w.Name, w.Made.Format(time.DateTime))
	return err
}

func demoShellCmd() *cobra.Command {
	var name string
	cmd := &cobra.Command{
		Use:   "shell POD|NODE|control [COMMAND...]",
		Short: "A shell, or a command, in a pod or on a node of a demo that was kept",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			w, err := find(name)
			if err != nil {
				return err
			}
			return w.Enter(args[0], args[1:])
		},
		ValidArgsFunction: func(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			w, err := find(name)
			if err != nil || len(args) > 0 {
				return nil, cobra.ShellCompDirectiveDefault
			}
			return w.Names(), cobra.ShellCompDirectiveNoFileComp
		},
	}
	cmd.Flags().StringVar(&name, "name", "", "of which demo, where several are running (see headcnictl demo list)")
	cmd.Flags().SetInterspersed(false) // flags behind the name are the command's
	return cmd
}

func find(name string) (lab.World, error) {
	worlds, err := lab.Kept(demoKind)
	if err != nil {
		return lab.World{}, err
	}
	return selectWorld(worlds, name, "say which by --name")
}

// selectWorld returns the world of a name, or the only one; help is what to do where there are several.
func selectWorld(worlds []lab.World, name, help string) (lab.World, error) {
	list := strings.Join(worldNames(worlds), ", ")
	switch i := slices.Index(worldNames(worlds), name); {
	case len(worlds) == 0:
		return lab.World{}, fmt.Errorf("no demo of yours is running%s; start one with `make demo ARGS=--keep`", othersHint())
	case i >= 0:
		return worlds[i], nil
	case name != "":
		return lab.World{}, fmt.Errorf("no demo of yours is called %s; there are %s", name, list)
	case len(worlds) > 1:
		return lab.World{}, fmt.Errorf("several demos of yours are running: %s; %s", list, help)
	}
	return worlds[0], nil
}

// othersHint reminds of the demos of other users. An ordinary user cannot look into the folder of root's.
func othersHint() string {
	if os.Geteuid() != 0 {
		return " (one that was started with sudo needs sudo here too)"
	}
	if users := lab.KeptByOthers(demoKind); len(users) > 0 {
		return " (there are some of " + strings.Join(users, ", ") + ", who can end them)"
	}
	return ""
}

// runDemo shows everything. What does not hold is counted and the show goes on; an error ends it.
func runDemo(ctx context.Context, s *screen, o demoOptions) error {
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
	if err == nil && o.keep {
		var w lab.World
		if w, err = d.lab.Keep(demoKind, o.name, d.pods); err == nil {
			d.lookAround(w)
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
func (d *demo) lookAround(w lab.World) {
	self := filepath.Clean(os.Args[0])
	if os.Getenv("SUDO_USER") != "" && os.Getenv(lab.DirEnv) == "" {
		self = "sudo " + self
	}
	shell, down := "shell ", "down"
	if worlds, err := lab.Kept(demoKind); err != nil || len(worlds) > 1 {
		shell, down = "shell --name "+w.Name+" ", "down "+w.Name
	}
	remote := d.pods[2]
	d.heading("It stays, as " + w.Name + ". Look around:")
	for _, l := range [][2]string{
		{"a shell in a pod", shell + d.pods[0].Name},
		{"one pod asks another", fmt.Sprintf("%s%s headcnictl probe ask %s", shell, d.pods[0].Name, remote.Addrs[0])},
		{"the tailnet, seen by node-1", shell + "node-1 tailscale status"},
		{"what Headscale knows", shell + "control headscale nodes list-routes"},
		{"what the daemon wrote", shell + "node-1 cat /etc/cni/net.d/10-headcni.conflist"},
		{"how packets are routed", shell + "node-2 ip rule"},
		{"what guards them", shell + "node-2 nft list ruleset"},
		{"end it", down},
	} {
		d.detail("%s %s demo %s", d.paint(faint, fmt.Sprintf("%-28s", l[0])), self, l[1])
	}
	d.detail("%s %s", d.paint(faint, fmt.Sprintf("%-28s", "logs")), filepath.Join(d.lab.Dir, "*", "*.log"))
}
