package conflist

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/headcni/headcni/pkg/config"
)

func TestUsualFolders(t *testing.T) {
	put := func(root, name, text string) {
		t.Helper()
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	all := strings.Join(usualFolders(t.TempDir()), "; ")
	for _, want := range []string{
		"K3s with its own flannel: /var/lib/rancher/k3s/agent/etc/cni/net.d and /var/lib/rancher/k3s/data/cni", "RKE2",
		"MicroK8s: /var/snap/microk8s/current/args/cni-network and /var/snap/microk8s/current/opt/cni/bin",
	} {
		if !strings.Contains(all, want) {
			t.Errorf("%q; want %q in it", all, want)
		}
	}
	const head = "Num       RefCount Protocol Flags    Type St Inode Path\n" +
		"0000000000000000: 00000002 00000000 00010000 0001 01 20433 "
	pod := t.TempDir() // a pod on the host's network
	put(pod, "proc/net/unix", head+"/var/snap/microk8s/common/run/containerd.sock\n")
	if got := usualFolders(pod); len(got) != 1 || !strings.HasPrefix(got[0], "MicroK8s: ") {
		t.Errorf("by the socket: %q", got)
	}
	put(pod, "proc/net/unix", head+"/run/k3s/containerd/containerd.sock.ttrpc\n")
	if got := usualFolders(pod); len(got) != 4 {
		t.Errorf("by a longer name: %q", got)
	}
	host := t.TempDir()
	put(host, "var/lib/rancher/rke2/agent/etc/containerd/config.toml", "")
	if got := usualFolders(host); len(got) != 1 || !strings.HasPrefix(got[0], "RKE2") {
		t.Errorf("by the file: %q", got)
	}
}

// What lasts is said in the same words: else each pass would log it and write an event.
func TestRuntimeUseRepeatsItself(t *testing.T) {
	written := time.Now()
	var said []string
	for _, waited := range []time.Duration{2 * RuntimePatience, 3*RuntimePatience + time.Second} {
		if err := RuntimeUse("cni plugin not initialized", written, written.Add(waited), config.Default().CNI, "/"); err != nil {
			said = append(said, err.Error())
		}
	}
	if len(said) != 2 || said[0] != said[1] {
		t.Errorf("%q", said)
	}
}
