package conformance

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"

	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/pkg/install"
)

// TestDelFromCacheAfterUninstall: a runtime that deletes by the configuration that libcni kept, as CRI-O does, can do so when HeadCNI
// has been taken off the node. With the last such pod the plugins can go.
func TestDelFromCacheAfterUninstall(t *testing.T) {
	n, pod := newNode(t), nstest.New(t)
	nstest.FreshState(t)
	n.cache = libcni.CacheDir
	freshDir(t, n.cache)
	to, log := t.TempDir(), slog.New(slog.DiscardHandler)
	if _, err := install.Plugins(t.Context(), n.path[0], to); err != nil {
		t.Fatal(err)
	}
	n.path = []string{to}
	l, r := n.list("", n.headcni("")), rt("c1", pod, nil)
	got := n.add(l, r)
	ping(t, n.host, got.addrs()...)

	if err := install.Remove(t.Context(), log, "cri-o://1.34.0"); err != nil {
		t.Fatal(err)
	}
	remove(t, filepath.Join(n.dataDir, "net")) // as uninstall does with leases
	kept, r, err := n.cni().GetNetworkListCachedConfig(l, r)
	if err != nil {
		t.Fatal(err)
	}
	if l, err = libcni.NetworkConfFromBytes(kept); err != nil {
		t.Fatal(err)
	}
	n.del(l, r)
	n.empty()
	if out := pod.Run(t, "ip", "-o", "link"); strings.Contains(out, "eth0") {
		t.Errorf("the pod keeps its interface: %s", out)
	}

	if err := install.Remove(t.Context(), log, "cri-o://1.34.0"); err != nil {
		t.Fatal(err)
	}
	nstest.WantFiles(t, to)
}

// freshDir hides a folder behind an empty one until the test ends.
func freshDir(t *testing.T, dir string) {
	t.Helper()
	if os.Mkdir(dir, 0o755) == nil {
		t.Cleanup(func() { _ = os.Remove(dir) }) // only where it was not there
	}
	nstest.Mount(t, "tmpfs", dir, "tmpfs", 0, "mode=0755")
}
