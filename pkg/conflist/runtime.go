package conflist

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/reconcile"
)

// RuntimePatience is how long after our conflist the runtime and kubelet may still say that there is no network: they look
// every 5 and 10 s.
const RuntimePatience = time.Minute

// RuntimeUse judges whether the container runtime uses the conflist that stands since written, the zero Time where it does
// not stand. notReady is what kubelet says of a missing network plugin, "" = nothing. root is where the host's files are. With the wrong
// folders everything of ours is right and no pod starts.
func RuntimeUse(notReady string, written, now time.Time, cni config.CNI, root string) error {
	if notReady == "" || written.IsZero() {
		return nil
	}
	if now.Sub(written) < RuntimePatience {
		return reconcile.Unseen{Err: reconcile.Waiting("kubelet has not seen the node's network yet")}
	}
	return reconcile.Warning{Err: fmt.Errorf("kubelet says that there is no network plugin although %s stands since %s (%q): the container runtime "+
		"seems to look in other folders than cni.confDir %s and cni.binDir %s; set both to its own: %s",
		filepath.Join(cni.ConfDir, paths.ConflistName), written.UTC().Format(time.RFC3339), notReady, cni.ConfDir, cni.BinDir,
		strings.Join(usualFolders(root), "; "))}
}

// usualFolders tells the values of cni.confDir and cni.binDir for what seems to run here: by its files, which a pod does
// not see, or by the socket of its containerd, which a pod on the host's network does. Where neither tells, for all.
func usualFolders(root string) []string {
	sockets, _ := os.ReadFile(filepath.Join(root, "proc/net/unix")) // without it the files must do
	var here, all []string
	for _, d := range paths.Distributions {
		text := fmt.Sprintf("%s: %s and %s", d.Name, d.ConfDir, d.BinDir)
		all = append(all, text)
		if _, err := os.Stat(filepath.Join(root, d.RuntimeConfig)); err == nil || strings.Contains(string(sockets), " "+d.Socket+"\n") {
			here = append(here, text)
		}
	}
	if here != nil {
		return here
	}
	return all
}
