package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/headcni/headcni/internal/version"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/tailscale"
	"github.com/headcni/headcni/pkg/tailscaled"
	"github.com/headcni/headcni/pkg/why"
)

func peersCmd() *cobra.Command {
	f := &lookFlags{}
	var watch time.Duration
	cmd := &cobra.Command{
		Use:   "peers [--node N] [-w[=5s]] [-o table|json|dot|mermaid]",
		Short: "Who reaches whom: direct or by a relay, and in which time",
		Long: `Who reaches whom: direct or by a relay, and in which time. Every node's
tailscaled is asked to ping the others, and what it finds is a table: a row
is who asks. An exclamation mark is for what goes by a relay, or not at all.
dot is for Graphviz, mermaid for Markdown.

With a kubeconfig it runs ` + "`headcnictl peers part`" + ` in the pod of each node's
daemon: no port is opened. Who runs it must be allowed to list nodes, and to
list pods and create pods/exec in the namespace of HeadCNI. Without
Kubernetes, or with --local, it asks the tailscaled of this node, as root.` + peersCodes,
		DisableFlagsInUseLine: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			print, ok := map[string]func(why.Mesh) error{
				"table":   func(m why.Mesh) error { return m.Table(cmd.OutOrStdout(), textFor(cmd.OutOrStdout()).Width) },
				"json":    func(m why.Mesh) error { return printJSON(cmd.OutOrStdout(), m) },
				"dot":     func(m why.Mesh) error { return m.Dot(cmd.OutOrStdout()) },
				"mermaid": func(m why.Mesh) error { return m.Mermaid(cmd.OutOrStdout()) },
			}[f.output]
			if !ok {
				return fail(cmd, fmt.Errorf("--output %s: want table, json, dot or mermaid", f.output))
			}
			if err := f.checkWhere(); err != nil {
				return fail(cmd, err)
			}
			switch {
			case watch != 0 && watch < time.Second:
				return fail(cmd, fmt.Errorf("--watch %s: want a second or more", watch))
			case watch > 0 && f.output != "table":
				return fail(cmd, fmt.Errorf("--watch shows a table: leave --output %s out", f.output))
			}
			for shown := false; ; shown = true {
				m, err := f.mesh(cmd.Context())
				if shown && cmd.Context().Err() != nil {
					return nil // the last one stands there
				}
				if err == nil {
					again(cmd.OutOrStdout(), watch > 0, time.Now())
					err = print(m)
				}
				switch {
				case err != nil:
					return fail(cmd, err)
				case watch > 0:
					select {
					case <-cmd.Context().Done():
						return nil
					case <-time.After(watch):
						continue
					}
				case !m.OK:
					return notRight
				case f.strict && m.Warnings() > 0:
					return onlyWarnings
				}
				return nil
			}
		},
	}
	f.addNodes(cmd)
	f.addOutput(cmd, "table", "table, json, dot or mermaid")
	cmd.Flags().DurationVarP(&watch, "watch", "w", 0, "ask again and again, after so long each time, until Ctrl-C; -w alone: 5s")
	cmd.Flags().Lookup("watch").NoOptDefVal = "5s"
	cmd.AddCommand(peersPartCmd())
	return cmd
}

const peersCodes = `

Exit code 0: every node reaches every other; 1: one does not, or could not be
asked, and was named; 2: could not look; 3: nothing but warnings (a relay, a
node that is offline), with --strict. With -w: 0 where it was ended by Ctrl-C.`

// again clears a terminal for what is shown anew, and elsewhere says when it was. Once it does nothing.
func again(out io.Writer, watching bool, now time.Time) {
	switch screen := newScreen(out, true); {
	case watching && screen.terminal:
		fmt.Fprint(out, "\x1b[H\x1b[2J") // ECMA-48: CUP, ED
	case watching:
		fmt.Fprintln(out, now.Format(time.RFC3339))
	}
}

// peersPartCmd is what peers runs on each node.
func peersPartCmd() *cobra.Command {
	return &cobra.Command{
		Use: "part", Args: cobra.NoArgs, Hidden: true, Short: "What peers asks one node, as JSON",
		RunE: func(cmd *cobra.Command, _ []string) error {
			t, err := localTailscaled()
			if err != nil {
				return err
			}
			p, err := why.AskPeers(cmd.Context(), t)
			if err != nil {
				return err
			}
			return json.NewEncoder(cmd.OutOrStdout()).Encode(p)
		},
	}
}

// localConfig is daemon.yaml with the environment that the daemon has, also where a unit gives it. Where it cannot be read it is what
// things mostly are, with the error.
func localConfig() (config.Config, func(string) string, error) {
	environ, _ := config.ReadEnvFile(paths.EnvFile) // whoever else may read it is not our matter here
	environ = append(environ, os.Environ()...)
	c, err := config.Load(paths.ConfigFile, true, environ, nil)
	if err != nil {
		c = config.Default()
	}
	return c, func(name string) (value string) {
		for _, e := range environ {
			if v, ok := strings.CutPrefix(e, name+"="); ok {
				value = v
			}
		}
		return value
	}, err
}

// localTailscaled is the tailscaled of this node that carries pods.
func localTailscaled() (*tailscale.Client, error) {
	c, _, err := localConfig()
	mode := c.Tailscale.Mode
	if mode == config.ModeAuto {
		mode = tailscaled.Mode(c.Tailscale, "")
	}
	socket := tailscaled.Socket(c.Tailscale, mode)
	if socket == "" {
		return nil, errors.Join(tailscaled.ErrNone(c.Tailscale), err)
	}
	return tailscale.New(socket), nil
}

// mesh asks all nodes at once, or this one.
func (f *lookFlags) mesh(ctx context.Context) (why.Mesh, error) {
	l, err := f.looker()
	if err != nil {
		return why.Mesh{}, err
	}
	if l.cluster == nil {
		t, err := localTailscaled()
		if err != nil {
			return why.Mesh{}, err
		}
		ctx, cancel := context.WithTimeout(ctx, f.timeout)
		defer cancel()
		p, err := why.AskPeers(ctx, t)
		if err != nil {
			return why.Mesh{}, err
		}
		return why.NewMesh(version.Version, []why.Row{{Node: p.Name, Peers: p}}), nil
	}
	seen, err := l.cluster.Find(ctx)
	if err != nil {
		return why.Mesh{}, err
	}
	rows, errs := make([]why.Row, len(seen.Nodes)), make([]error, len(seen.Nodes))
	var ask []func(context.Context)
	for i, n := range seen.Nodes {
		rows[i].Node, errs[i] = n.Name, n.Err
		if n.Err == nil {
			ask = append(ask, func(ctx context.Context) {
				errs[i] = l.cluster.Ask(ctx, n.Pod, &rows[i].Peers, "headcnictl", "peers", "part")
			})
		}
	}
	l.cluster.All(ctx, ask...)
	if ctx.Err() != nil {
		return why.Mesh{}, errInterrupted
	}
	for i, err := range errs {
		if err != nil {
			rows[i] = why.Row{Node: rows[i].Node, Error: err.Error()}
		}
	}
	return why.NewMesh(version.Version, rows), errors.Join(l.cluster.Forbidden(errs), noneAnswered(errs))
}

var errInterrupted = errors.New("interrupted")

// noneAnswered is an error where nobody did.
func noneAnswered(errs []error) error {
	if len(errs) == 0 || slices.Contains(errs, nil) {
		return nil
	}
	return fmt.Errorf("no node answers: %w", errs[0])
}
