// Command headcni-daemon keeps a node's part of the pod network as it should be.
package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime/debug"
	"strings"

	"github.com/spf13/cobra"

	"github.com/headcni/headcni/internal/program"
	"github.com/headcni/headcni/internal/version"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/conflist"
	"github.com/headcni/headcni/pkg/daemon"
	"github.com/headcni/headcni/pkg/dns/nodedns"
	"github.com/headcni/headcni/pkg/logging"
	"github.com/headcni/headcni/pkg/tailscaled"
)

func main() {
	program.Main(root(), func(err error, out io.Writer) int {
		if err == nil {
			return 0
		}
		fmt.Fprintln(out, "headcni-daemon:", err)
		return 1
	})
}

// flags say where the configuration is.
type flags struct {
	file string
	sets []string
	// given is true where --config was on the command line.
	given func() bool
}

// load reads the configuration. Without --config the file may be missing: flags and environment can say it all.
func (f *flags) load() (config.Config, error) {
	return config.Load(f.file, !f.given(), os.Environ(), f.sets)
}

// loadAsUnit is load with the variables that the systemd units have. It returns those variables too. exposed is why their file,
// which was read all the same, is not as it should be.
func (f *flags) loadAsUnit() (_ config.Config, _ func(string) string, exposed, err error) {
	environ, exposed := config.ReadEnvFile(paths.EnvFile)
	environ = append(environ, os.Environ()...)
	c, err := config.Load(f.file, !f.given(), environ, f.sets)
	getenv := func(name string) (value string) {
		for _, e := range environ {
			if v, ok := strings.CutPrefix(e, name+"="); ok {
				value = v
			}
		}
		return value
	}
	return c, getenv, exposed, err
}

// loadAndLog is load, with the log that the configuration asks for.
func (f *flags) loadAndLog() (config.Config, *slog.Logger, error) {
	c, err := f.load()
	if err != nil {
		return c, nil, err
	}
	log, err := logging.New(os.Stderr, c.Logging.Level, c.Logging.Format)
	return c, log, err
}

func root() *cobra.Command {
	cmd := &cobra.Command{
		Use:           "headcni-daemon",
		Short:         "The node daemon of HeadCNI",
		Version:       version.Version,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	f := &flags{}
	cmd.PersistentFlags().StringVar(&f.file, "config", paths.ConfigFile, "configuration file (YAML)")
	cmd.PersistentFlags().StringArrayVar(&f.sets, "set", nil,
		"set one key, such as network.podCIDRs=10.244.1.0/24; before it come variables such as HEADCNI_NETWORK_PODCIDRS, and then the file")
	f.given = func() bool { return cmd.PersistentFlags().Changed("config") }
	cmd.AddCommand(runCmd(f), tailscaledCmd(f), installCmd(f), uninstallCmd(f), statusCmd(), healthCmd(), checkCmd(f), configCmd(f), versionCmd())
	program.Strict(cmd)
	return cmd
}

func runCmd(f *flags) *cobra.Command {
	return &cobra.Command{
		Use:   "run",
		Short: "Set the node's network up and keep it so; SIGTERM ends it and leaves the network in force",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, log, err := f.loadAndLog()
			if err != nil {
				return err
			}
			if os.Getenv("GOGC") == "" {
				// A node's memory is the pods', and what is collected more often is little.
				debug.SetGCPercent(50)
			}
			d, err := daemon.New(c, log, os.Getenv, version.Version)
			if err != nil {
				return err
			}
			return d.Run(cmd.Context())
		},
	}
}

func tailscaledCmd(f *flags) *cobra.Command {
	return &cobra.Command{
		Use:   "tailscaled",
		Short: "Become the dedicated tailscaled of daemon mode",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, log, err := f.loadAndLog()
			if err != nil {
				return err
			}
			return tailscaled.Become(cmd.Context(), c, os.Environ(), tailscaled.Node{
				Mode: func() (string, error) { mode, _, err := daemon.Settled(); return mode, err },
				Ahead: func() error {
					own := c.Network.PodCIDRs.Prefixes()
					if _, said, err := daemon.Settled(); err == nil && len(own) == 0 { // of a damaged file the daemon tells
						own = said
					}
					return nodedns.Ahead(own)
				},
			}, log)
		},
	}
}

func checkCmd(f *flags) *cobra.Command {
	return &cobra.Command{
		Use:   "check",
		Short: "Send packets in clear on purpose, in a network namespace of its own, and see the guard stop and count them; exit 0 where it does",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, _, _, err := f.loadAsUnit()
			if err != nil {
				return err
			}
			done, err := daemon.CheckGuard(cmd.Context(), c)
			for _, line := range done {
				fmt.Fprintln(cmd.OutOrStdout(), line)
			}
			return err
		},
	}
}

func uninstallCmd(f *flags) *cobra.Command {
	return &cobra.Command{
		Use:   "uninstall",
		Short: "Take everything of ours off this node and put back what was there",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, log, err := f.loadAndLog()
			if err != nil {
				return err
			}
			return daemon.Uninstall(cmd.Context(), c, log)
		},
	}
}

func configCmd(f *flags) *cobra.Command {
	cmd := &cobra.Command{Use: "config", Short: "Look at the configuration"}
	cmd.AddCommand(&cobra.Command{
		Use:   "validate",
		Short: "Check the configuration and name every fault",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, getenv, exposed, err := f.loadAsUnit()
			if err = errors.Join(err, exposed); err != nil {
				return err
			}
			note, err := daemon.CheckConfig(c, getenv, f.file)
			if err = errors.Join(conflist.Check(conflist.Path(c.CNI.ConfDir)), err); err != nil {
				return err
			}
			if note != "" {
				fmt.Fprintln(cmd.ErrOrStderr(), "note:", note)
			}
			fmt.Fprintln(cmd.OutOrStdout(), "the configuration is valid")
			return nil
		},
	}, &cobra.Command{
		Use:   "convert FILE",
		Short: "Make a .conflist of a flat configuration, in place",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			did, err := conflist.Convert(args[0])
			if err != nil {
				return err
			}
			if did {
				fmt.Fprintln(cmd.OutOrStdout(), args[0], "is a list of plugins now")
			} else {
				fmt.Fprintln(cmd.OutOrStdout(), args[0], "was a list of plugins already")
			}
			return nil
		},
	}, &cobra.Command{
		Use:   "show",
		Short: "Print the configuration in force, secrets masked",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, _, exposed, err := f.loadAsUnit()
			if err != nil {
				return errors.Join(err, exposed)
			}
			if exposed != nil {
				fmt.Fprintln(cmd.ErrOrStderr(), "warning:", exposed)
			}
			fmt.Fprint(cmd.OutOrStdout(), c)
			return nil
		},
	})
	return cmd
}

func versionCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  cobra.NoArgs,
		Run:   func(cmd *cobra.Command, _ []string) { fmt.Fprintln(cmd.OutOrStdout(), version.Version) },
	}
}
