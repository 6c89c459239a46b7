// Command headcnictl is what people use to look at HeadCNI and to try it out.
package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/program"
	"github.com/headcni/headcni/internal/version"
)

func main() { program.Main(root(), codeOf) }

// codeOf is the exit code for how a command ended. What was not said yet it says.
func codeOf(err error, out io.Writer) int {
	var code exitCode
	switch {
	case err == nil:
		return 0
	case errors.As(err, &code):
		return int(code)
	}
	fmt.Fprintln(out, "headcnictl:", err)
	if errors.As(err, new(noAnswer)) || errors.As(err, new(program.Usage)) {
		return int(couldNotLook)
	}
	return 1
}

func root() *cobra.Command {
	cmd := &cobra.Command{
		Use:           "headcnictl",
		Short:         "Look at HeadCNI and try it out",
		Version:       version.Version,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	if strings.HasPrefix(filepath.Base(os.Args[0]), "kubectl-") { // a link of that name makes it a plug-in of kubectl
		cmd.Annotations = map[string]string{cobra.CommandDisplayNameAnnotation: "kubectl headcni"}
	}
	cmd.AddCommand(connectivityCmd(), demoCmd(), dnsCmd(), doctorCmd(), dropsCmd(), installCmd(), ipamCmd(), keyCmd(), peersCmd(), pingCmd(), policyCmd(), probeCmd(), routesCmd(), statusCmd(), sysdumpCmd(), uninstallCmd(), upgradeCmd(), versionCmd(), whyCmd())
	program.Strict(cmd)
	return cmd
}

// noAnswer is an error for which the program ends as what could not look does: nobody could be asked.
type noAnswer struct{ error }

func (e noAnswer) Unwrap() error { return e.error }

// unanswered makes what goes wrong in commands that only look a noAnswer.
func unanswered(cmds ...*cobra.Command) {
	for _, cmd := range cmds {
		run := cmd.RunE
		cmd.RunE = func(cmd *cobra.Command, args []string) error {
			if err := run(cmd, args); err != nil {
				return noAnswer{err}
			}
			return nil
		}
	}
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
