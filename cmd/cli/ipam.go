package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/ipam"
	"github.com/headcni/headcni/pkg/kube"
	"github.com/headcni/headcni/pkg/networking/podlink"
)

// gcGrace is how old a lease without a link must be for gc: an ADD has the lease before the link.
const gcGrace = time.Minute

// ipamFlags are the flags that all ipam commands have.
type ipamFlags struct {
	lookFlags
	dataDir string
}

// elsewhere is where to ask. Its cluster is nil where that is this node.
func (f *ipamFlags) elsewhere(cmd *cobra.Command) (looker, error) {
	f.local = f.local || cmd.Flags().Changed("data-dir")
	if err := f.checkWhere(); err != nil {
		return looker{}, err
	}
	return f.looker()
}

func ipamCmd() *cobra.Command {
	f := &ipamFlags{}
	cmd := &cobra.Command{
		Use:   "ipam",
		Short: "Look at the addresses that nodes have given to pods",
		Long: "Look at the addresses that nodes have given to pods. It reads the files that the plugins write, as root, and\n" +
			"needs neither headcni-daemon nor Kubernetes. With a kubeconfig `list` and `check` do so in the pods of the\n" +
			"nodes' daemons: no port is opened.",
		PersistentPreRunE: func(*cobra.Command, []string) error {
			if f.output != "table" && f.output != "json" {
				return noAnswer{fmt.Errorf("--output %s: want table or json", f.output)}
			}
			return nil
		},
	}
	cmd.PersistentFlags().StringVar(&f.dataDir, "data-dir", paths.IPAMDir, "where the leases are")
	cmd.PersistentFlags().StringVarP(&f.output, "output", "o", "table", "table or json")
	list, gc := ipamListCmd(f), ipamGCCmd(f)
	unanswered(list, gc)
	cmd.AddCommand(list, ipamCheckCmd(f), gc)
	return cmd
}

// networkLease is a lease with the network that it belongs to.
type networkLease struct {
	// Node is "" for this one.
	Node    string `json:"node,omitempty"`
	Network string `json:"network"`
	ipam.Lease
}

// each calls fn for the pool of every network and joins the errors.
func (f *ipamFlags) each(fn func(network string, p *ipam.Pool) error) error {
	if _, err := os.Stat(f.dataDir); errors.Is(err, os.ErrNotExist) && f.dataDir != paths.IPAMDir {
		return fmt.Errorf("--data-dir %s: there is no such folder", f.dataDir)
	}
	if _, err := os.Stat(filepath.Dir(f.dataDir)); errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("this machine is no node of HeadCNI, %s is not there: run it on a node, as root", filepath.Dir(f.dataDir))
	}
	networks, err := ipam.Networks(f.dataDir)
	if err != nil {
		return withAdvice(err)
	}
	var errs []error
	for _, n := range networks {
		p, err := ipam.Open(ipam.Config{Network: n, DataDir: f.dataDir})
		if err == nil {
			err = fn(n, p)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("network %s: %w", n, withAdvice(err)))
		}
	}
	return errors.Join(errs...)
}

// advised says what to do about an error.
func withAdvice(err error) error {
	for _, known := range []struct {
		is     error
		advice string
	}{
		{os.ErrPermission, "run as root"},
		{ipam.ErrCorrupt, "headcni rebuilds it from the pods that run when it starts the next one; under another plugin, stop its containers and remove the folder"},
		{ipam.ErrLocked, "end that process if it hangs"},
	} {
		if errors.Is(err, known.is) {
			return fmt.Errorf("%w; %s", err, known.advice)
		}
	}
	return err
}

func ipamListCmd(f *ipamFlags) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "list [--node N]",
		Short: "List the leases",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			leases := []networkLease{}
			there, err := f.elsewhere(cmd)
			switch {
			case err != nil:
				return err
			case there.cluster != nil:
				nodes, err := askDaemons[[]networkLease](cmd.Context(), there, nil, "ipam", "list")
				for _, n := range nodes {
					for _, l := range n.Answer {
						l.Node = n.Node
						leases = append(leases, l)
					}
				}
				return printLeases(cmd.OutOrStdout(), f.output, "no leases", leases, err)
			}
			err = f.each(func(n string, p *ipam.Pool) error {
				list, err := p.List(cmd.Context())
				for _, l := range list {
					leases = append(leases, networkLease{Network: n, Lease: l})
				}
				return err
			})
			return printLeases(cmd.OutOrStdout(), f.output, "no leases", leases, err)
		},
	}
	f.addNode(cmd)
	return cmd
}

// addNode adds what says which nodes to ask.
func (f *ipamFlags) addNode(cmd *cobra.Command) {
	f.addWhere(cmd)
	cmd.Flags().StringVar(&f.namespace, "headcni-namespace", kube.DefaultNamespace, "where HeadCNI is installed")
	cmd.Flags().StringVar(&f.node, "node", "", "look at this node only")
}

// printLeases prints the leases, or in a table's place the word for none, and passes err on, which says that there may be more.
func printLeases(out io.Writer, format, none string, leases []networkLease, err error) error {
	if err != nil && len(leases) == 0 {
		return err
	}
	return errors.Join(renderLeases(out, format, none, leases), err)
}

func renderLeases(out io.Writer, format, none string, leases []networkLease) error {
	if format == "json" {
		return printJSON(out, leases)
	}
	if len(leases) == 0 {
		_, err := fmt.Fprintln(out, none)
		return err
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	node := ""
	if leases[0].Node != "" {
		node = "NODE\t"
	}
	fmt.Fprintln(w, node+"NETWORK\tADDRESSES\tPOD\tCONTAINER\tINTERFACE\tSINCE\tWRITER")
	for _, l := range leases {
		var addrs []string
		for _, a := range l.Addrs {
			addrs = append(addrs, a.Addr.Addr().String())
		}
		if node != "" {
			node = l.Node + "\t"
		}
		fmt.Fprintf(w, "%s%s\t%s\t%s\t%s\t%s\t%s\t%s\n", node, l.Network, strings.Join(addrs, " "), podName(l.Owner), l.ContainerID, l.IfName,
			l.Time.Format(time.RFC3339), l.Writer)
	}
	return w.Flush()
}

func podName(o ipam.Owner) string {
	switch {
	case o.PodName == "":
		return "-"
	case o.PodNamespace == "":
		return o.PodName
	}
	return o.PodNamespace + "/" + o.PodName
}

func ipamCheckCmd(f *ipamFlags) *cobra.Command {
	var repair bool
	cmd := &cobra.Command{
		Use:   "check [--node N] [--repair]",
		Short: "Look for what is wrong on disk",
		Long: "Look for what is wrong on disk. Leftovers of killed processes are harmless: they go with their pod, or with garbage collection.\n\n" +
			"Exit code 0: all is well, or put right; 1: something is left; 2: could not look.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			type networkProblem struct {
				Node    string `json:"node,omitempty"` // "" for this one
				Network string `json:"network"`
				ipam.Problem
			}
			found, left := []networkProblem{}, 0
			there, err := f.elsewhere(cmd)
			switch {
			case err != nil:
			case there.cluster != nil && repair:
				err = errors.New("--repair is for the node that it runs on: run it there, with --local")
			case there.cluster != nil:
				var nodes []said[[]networkProblem]
				nodes, err = askDaemons[[]networkProblem](cmd.Context(), there, nil, "ipam", "check")
				for _, n := range nodes {
					for _, p := range n.Answer {
						p.Node = n.Node
						found, left = append(found, p), left+1
					}
				}
			default:
				err = f.each(func(n string, p *ipam.Pool) error {
					problems, err := p.Check(cmd.Context(), repair)
					for _, pr := range problems {
						found = append(found, networkProblem{Network: n, Problem: pr})
						if !pr.Repaired {
							left++
						}
					}
					return err
				})
			}
			out := cmd.OutOrStdout()
			if f.output == "json" {
				err = errors.Join(printJSON(out, found), err)
			} else {
				for _, p := range found {
					state := "found"
					if p.Repaired {
						state = "repaired"
					}
					if p.Node != "" {
						fmt.Fprintf(out, "%s: ", p.Node)
					}
					fmt.Fprintf(out, "%s: %s: %s: %s\n", p.Network, p.Path, p.Text, state)
				}
			}
			switch {
			case err != nil:
				cmd.PrintErrln("headcnictl:", err)
				return exitCode(2)
			case left > 0 && repair:
				return fmt.Errorf("%d problems are left: see what is said of each", left)
			case left > 0:
				return fmt.Errorf("%d problems: run `headcnictl ipam check --repair`", left)
			case f.output != "json" && len(found) == 0:
				fmt.Fprintln(out, "all well")
			}
			return nil
		},
	}
	f.addNode(cmd)
	cmd.Flags().BoolVar(&repair, "repair", false, "put right what is wrong; what might be in use stays taken")
	return cmd
}

func ipamGCCmd(f *ipamFlags) *cobra.Command {
	var dryRun bool
	cmd := &cobra.Command{
		Use:   "gc",
		Short: "Free the leases of pods that are gone: those of the headcni plugin that have had no link for a minute",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			links, err := linkNames()
			if err != nil {
				return err
			}
			now := time.Now()
			gone := []networkLease{}
			err = f.each(func(n string, p *ipam.Pool) error {
				freed, err := p.GC(cmd.Context(), func(l ipam.Lease) bool {
					stale := leaked(l, links, now)
					if stale && dryRun {
						gone = append(gone, networkLease{Network: n, Lease: l})
					}
					return !stale || dryRun
				})
				for _, l := range freed {
					gone = append(gone, networkLease{Network: n, Lease: l})
				}
				return err
			})
			return printLeases(cmd.OutOrStdout(), f.output, "nothing to free", gone, err)
		},
	}
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "only list them")
	return cmd
}

// leaked tells a lease without a pod: it is the headcni plugin's, whose pods all have a link, and has none.
func leaked(l ipam.Lease, links map[string]bool, now time.Time) bool {
	return l.Writer == ipam.InProcess && !links[podlink.Name(l.ContainerID, l.IfName)] && now.Sub(l.Time) >= gcGrace
}

// linkNames are the host's; a lease without its link has no pod.
func linkNames() (map[string]bool, error) {
	ifaces, err := net.Interfaces()
	if err != nil {
		return nil, fmt.Errorf("list the links: %w", err)
	}
	names := make(map[string]bool, len(ifaces))
	for _, i := range ifaces {
		names[i.Name] = true
	}
	return names, nil
}

func printJSON(out io.Writer, v any) error {
	e := json.NewEncoder(out)
	e.SetIndent("", "  ")
	return e.Encode(v)
}
