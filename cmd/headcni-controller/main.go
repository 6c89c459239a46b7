// Command headcni-controller does the cluster-wide work: it is the only one that holds the Headscale API key.
package main

import (
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/headcni/headcni/internal/program"
	"github.com/headcni/headcni/internal/version"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/controller"
	"github.com/headcni/headcni/pkg/logging"
)

// defaultListen is another port than the daemon's: both are on the host's network.
const defaultListen = ":9670"

func main() {
	program.Main(root(), func(err error, out io.Writer) int {
		if err == nil {
			return 0
		}
		fmt.Fprintln(out, "headcni-controller:", err)
		return 1
	})
}

// flags say where the configuration is.
type flags struct {
	file   string
	listen string
	sets   []string
}

func root() *cobra.Command {
	cmd := &cobra.Command{
		Use:           "headcni-controller",
		Short:         "The cluster-wide controller of HeadCNI",
		Version:       version.Version,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	f := &flags{}
	cmd.PersistentFlags().StringVar(&f.file, "config", paths.ConfigFile, "configuration file (YAML), the daemon's")
	cmd.PersistentFlags().StringArrayVar(&f.sets, "set", nil, "set one key, such as headscale.url=https://headscale.example.com")
	run := &cobra.Command{
		Use:   "run",
		Short: "Approve routes, keep the join key fresh, remove stale nodes; several may run, one leads",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := f.controller()
			if err != nil {
				return err
			}
			return c.Run(cmd.Context(), f.listen)
		},
	}
	run.Flags().StringVar(&f.listen, "listen", defaultListen, "address of /healthz, /readyz and /metrics; empty: none")
	cmd.AddCommand(run, healthCmd(), &cobra.Command{
		Use:   "uninstall",
		Short: "Have every node's daemon take HeadCNI off its node, and remove what the controllers made",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := f.controller()
			if err != nil {
				return err
			}
			return c.Uninstall(cmd.Context())
		},
	}, &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  cobra.NoArgs,
		Run:   func(cmd *cobra.Command, _ []string) { fmt.Fprintln(cmd.OutOrStdout(), version.Version) },
	})
	program.Strict(cmd)
	return cmd
}

func (f *flags) controller() (*controller.Controller, error) {
	c, err := config.Load(f.file, false, os.Environ(), f.sets)
	if err != nil {
		return nil, err
	}
	log, err := logging.New(os.Stderr, c.Logging.Level, c.Logging.Format)
	if err != nil {
		return nil, err
	}
	return controller.New(c, log, os.Getenv, version.Version)
}
