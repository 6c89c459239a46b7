// Command headcnictl is what people use to look at HeadCNI and to try it out.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/version"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	err := root().ExecuteContext(ctx)
	stop()
	var code exitCode
	switch {
	case errors.As(err, &code):
		os.Exit(int(code))
	case err != nil:
		fmt.Fprintln(os.Stderr, "headcnictl:", err)
		os.Exit(1)
	}
}

func root() *cobra.Command {
	cmd := &cobra.Command{
		Use:           "headcnictl",
		Short:         "Look at HeadCNI and try it out",
		Version:       version.Version,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	// Children have it too: flags in 80 columns.
	cmd.SetUsageTemplate(strings.ReplaceAll(cmd.UsageTemplate(), "Flags.FlagUsages |", "Flags.FlagUsagesWrapped 80 |"))
	if strings.HasPrefix(filepath.Base(os.Args[0]), "kubectl-") { // a link of that name makes it a plug-in of kubectl
		cmd.Annotations = map[string]string{cobra.CommandDisplayNameAnnotation: "kubectl headcni"}
	}
	cmd.AddCommand(connectivityCmd(), demoCmd(), dnsCmd(), doctorCmd(), dropsCmd(), installCmd(), ipamCmd(), keyCmd(), peersCmd(), pingCmd(), policyCmd(), probeCmd(), routesCmd(), statusCmd(), sysdumpCmd(), uninstallCmd(), upgradeCmd(), versionCmd(), whyCmd())
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

// binDir is where our other programs are: beside this one, unless told otherwise.
func binDir() string {
	if dir := os.Getenv(lab.BinEnv); dir != "" {
		return dir
	}
	self, err := os.Executable()
	if err != nil {
		return "" // the lab says what is missing
	}
	return filepath.Dir(self)
}
