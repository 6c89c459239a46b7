package main

import (
	"fmt"
	"log/slog"
	"os"

	"github.com/spf13/cobra"

	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/install"
)

// installCmd is what the init container runs, and `make install`.
func installCmd(f *flags) *cobra.Command {
	var from, to string
	var remove bool
	cmd := &cobra.Command{
		Use:   "install",
		Short: "Put the CNI plugins where the container runtime looks for them; a host-local or portmap of somebody else stays",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if remove {
				return install.Remove(cmd.Context(), slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), nil)), "")
			}
			source, err := install.Source()
			if err != nil {
				return err
			}
			if to == "" {
				c, err := f.load()
				if err != nil {
					return err
				}
				to = c.CNI.BinDir
				if from == "" && to == source {
					fmt.Fprintln(cmd.OutOrStdout(), to+": the plugins are where the container runtime looks")
					return nil
				}
				// On a host; in a pod the folder is the host's, or nobody would see the plugins.
				if source != paths.ImageCNIDir {
					if err := os.MkdirAll(to, 0o755); err != nil {
						return err
					}
				}
			}
			if from == "" {
				from = source
			}
			lines, err := install.Plugins(cmd.Context(), from, to)
			for _, line := range lines {
				fmt.Fprintln(cmd.OutOrStdout(), line)
			}
			return err
		},
	}
	cmd.Flags().StringVar(&from, "from", "", "folder to take the plugins from (default "+paths.ImageCNIDir+", else the folder of this program)")
	cmd.Flags().StringVar(&to, "to", "", "folder to put them into (default cni.binDir)")
	cmd.Flags().BoolVar(&remove, "remove", false, "take away what was installed, and nothing else; headcni-daemon uninstall does that too")
	cmd.MarkFlagsMutuallyExclusive("remove", "from")
	cmd.MarkFlagsMutuallyExclusive("remove", "to")
	return cmd
}
