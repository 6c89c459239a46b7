package install

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/pkg/config/paths"
)

// Whose DEL is awaited decides whether plugins go.
func TestRemoveWaitsForDel(t *testing.T) {
	const ours, others = `{"plugins":[{"type":"headcni"},{"type":"tuning"}]}`, `{"plugins":[{"type":"bridge","ipam":{"type":"host-local"}}]}`
	for name, tt := range map[string]struct {
		folder, conf string
		containerd   bool // runs the sandbox
		stays        bool
		runtime      string // as the Node says
	}{
		"CRI-O":                    {"results", ours, false, true, ""},
		"one plugin":               {"results", `{"type":"headcni"}`, false, true, ""},
		"another's link, our IPAM": {"results", `{"plugins":[{"type":"bridge","ipam":{"type":"headcni-ipam"}}]}`, false, true, ""},
		"containerd":               {"results", ours, true, false, ""},
		"multus on containerd":     {"multus/results", ours, true, true, ""},
		"another CNI":              {"results", others, false, false, ""},
		"no configuration":         {"results", "junk", false, false, ""},
		// In the chart's container nobody sees containerd's tasks.
		"CRI-O, by its Node":                {"results", ours, false, true, "cri-o://1.34.0"},
		"containerd, by its Node":           {"results", ours, false, false, "containerd://2.1.0-k3s1"},
		"multus on containerd, by its Node": {"multus/results", ours, false, true, "containerd://2.1.0"},
		"a folder that nobody caches in":    {"other", ours, false, false, ""},
	} {
		t.Run(name, func(t *testing.T) {
			nstest.FreshState(t)
			if os.Mkdir("/var/lib/cni", 0o755) == nil {
				t.Cleanup(func() { _ = os.Remove("/var/lib/cni") }) // only where it was not there
			}
			nstest.Mount(t, "tmpfs", "/var/lib/cni", "tmpfs", 0, "mode=0755")
			to := t.TempDir()
			install(t, plugins(t, "1", 0), to)
			cache := filepath.Join("/var/lib/cni", tt.folder, "net-c1-eth0")
			entry, err := json.Marshal(cachedAttachment{"c1", "eth0", []byte(tt.conf)})
			if err != nil {
				t.Fatal(err)
			}
			put(t, cache, entry)
			if tt.containerd {
				task := filepath.Join(containerdTasks[0], "k8s.io/c1")
				put(t, filepath.Join(task, "config.json"), nil)
				t.Cleanup(func() { _ = os.RemoveAll(task) })
			}
			var log bytes.Buffer
			if err := Remove(t.Context(), slog.New(slog.NewTextHandler(&log, nil)), tt.runtime); err != nil {
				t.Fatal(err)
			}
			want := allPlugins
			if !tt.stays {
				want = nil
			}
			nstest.WantFiles(t, to, want...)
			if strings.Contains(log.String(), "c1/eth0") != tt.stays {
				t.Errorf("logged %q", log.String())
			}
			if err := os.Remove(cache); err != nil {
				t.Fatal(err)
			}
			if err := Remove(t.Context(), quiet, ""); err != nil {
				t.Fatal(err)
			}
			nstest.WantFiles(t, to)
			nstest.WantFiles(t, paths.StateDir)
		})
	}
}

func put(t *testing.T, path string, b []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}
