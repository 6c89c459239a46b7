package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/headcni/headcni/internal/lab"
)

// kind tells clusters from other worlds that are kept.
const kind = "cluster"

// Keep lets the cluster go on without us, until Down. The Cluster must not be used any more. Scripts in Dir run kubectl,
// helm, and programs on a machine.
func (c *Cluster) Keep() error {
	path := os.Getenv("PATH")
	for _, name := range []string{"kubectl", "helm"} {
		script := fmt.Sprintf("#!/bin/sh\n# %s as an administrator, with the network of the control host.\nexec nsenter --target=%d --net --uts -- env KUBECONFIG=%s %s \"$@\"\n",
			name, c.Control.PID(), c.Kubeconfig(), c.Control.Find(name))
		if err := os.WriteFile(filepath.Join(c.Dir, name), []byte(script), 0o700); err != nil {
			return err
		}
	}
	machines := fmt.Sprintf("control) pid=%d ;; ", c.Control.PID())
	for _, n := range c.Nodes {
		machines += fmt.Sprintf("%s) pid=%d ;; ", n.Name, n.PID())
	}
	enter := "#!/bin/sh\n# ./enter MACHINE [COMMAND...]: a shell, or a command, on a machine.\n" +
		"case ${1-} in " + machines + "*) echo \"usage: $0 MACHINE [COMMAND...]\" >&2; exit 2 ;; esac\nname=$1\nshift\n[ $# -gt 0 ] || set -- bash --norc\n" +
		"exec nsenter --target=$pid --mount --uts --ipc --net --pid --wd -- env PATH=" + c.opt.Tools + ":" + path + " PS1=\"$name# \" \"$@\"\n"
	if err := os.WriteFile(filepath.Join(c.Dir, "enter"), []byte(enter), 0o700); err != nil {
		return err
	}
	_, err := c.lab.Keep(kind, "", nil)
	return err
}

// Down ends the clusters that were kept, and what is left of those that were killed. It returns how many were kept.
func Down(ctx context.Context) (int, error) {
	worlds, err := lab.Kept(kind)
	for _, w := range worlds {
		err = errors.Join(err, w.Down(ctx))
	}
	return len(worlds), errors.Join(err, lab.Sweep())
}
