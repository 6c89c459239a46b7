// Package reliability breaks one part of a small world after another and counts what pods on two nodes lose of each
// other meanwhile, and what leaves the nodes in clear: nothing may.
//
// A few faults run with the other tests. `make bench-faults` goes through all of them and prints the table of
// docs/reliability.md.
package reliability

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/pkg/config"
)

var (
	all     = flag.Bool("all", false, "all faults, and print the table")
	outage  = flag.Duration("outage", 5*time.Minute, "how long Headscale is dead")
	cutFor  = flag.Duration("cut", 30*time.Second, "how long the underlay is cut")
	repeats = flag.Int("repeats", 2, "how often each fault of tailscaled strikes each node and direction")
)

const (
	// patience is how long a flow may stay dark after a fault is over.
	patience = 2 * time.Minute
	// settled is how long flows are left alone before and after a fault.
	settled = time.Second
)

func TestMain(m *testing.M) {
	flag.Parse()
	nstest.Main(m)
}

// world is a lab with one pod on each of two nodes, the first in host mode, the second in daemon mode.
type world struct {
	*lab.Lab
	bin  string
	pods []*lab.Pod
}

// kind is what worlds differ in: whether nodes may keep maps of the tailnet, and where the relay is.
type kind struct {
	cache, relay bool
}

func (k kind) String() string {
	maps, relay := "no cached maps", "relay in Headscale"
	if k.cache {
		maps = "cached maps"
	}
	if k.relay {
		relay = "relay apart"
	}
	return maps + ", " + relay
}

// inWorld runs test in a world of its own.
func inWorld(t *testing.T, k kind, test func(*testing.T, *world)) {
	t.Run(k.String(), func(t *testing.T) { test(t, newWorld(t, k)) })
}

func newWorld(t *testing.T, k kind) *world {
	t.Helper()
	w := &world{bin: programs(t)}
	ctx := within(t)
	var err error
	w.Lab, err = lab.New(ctx, lab.Options{
		Modes: []string{config.ModeHost, config.ModeDaemon}, Bin: w.bin, Relay: k.relay, Batch: 500 * time.Millisecond,
		Policy: func(p map[string]any) {
			if k.cache {
				p["nodeAttrs"] = []map[string]any{{"target": []string{lab.Tag}, "attr": []string{"cache-network-maps"}}}
			}
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			showLogs(t, w.Logs())
		}
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	})
	for _, n := range w.Nodes {
		p, err := n.AddPod(ctx, "probe", lab.PodOptions{Idle: true})
		if err != nil {
			t.Fatal(err)
		}
		w.pods = append(w.pods, p)
	}
	return w
}

// programs makes a folder of our programs that may be replaced, from those of HEADCNI_BIN or else from the source.
func programs(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	built := os.Getenv(lab.BinEnv)
	if built == "" {
		if err := lab.Build(t.Context(), dir); err != nil {
			t.Fatal(err)
		}
	} else if err := linkAll(built, dir); err != nil {
		t.Fatal(err)
	}
	if err := (lab.Options{Bin: dir}).Check(); err != nil {
		nstest.Skip(t, err.Error())
	}
	return dir
}

func linkAll(from, to string) error {
	files, err := os.ReadDir(from)
	for _, f := range files {
		err = errors.Join(err, os.Symlink(filepath.Join(from, f.Name()), filepath.Join(to, f.Name())))
	}
	return err
}

// showLogs prints the ends of the logs, of a daemon's only what is its own: the dedicated tailscaled shares it.
func showLogs(t *testing.T, logs []string) {
	const enough = 4000
	for _, path := range logs {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Error(err)
			continue
		}
		text := string(b)
		if filepath.Base(path) == "headcni-daemon.log" {
			var ours strings.Builder
			for line := range strings.Lines(text) {
				if strings.HasPrefix(line, "time=") || strings.HasPrefix(line, "headcni-daemon:") {
					ours.WriteString(line)
				}
			}
			text = ours.String()
		}
		t.Logf("--- %s\n%s", path, text[max(0, len(text)-enough):])
	}
}

// within is a context for what takes a moment, on a machine that may be busy.
func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeoutCause(t.Context(), patience, fmt.Errorf("not within %v", patience))
	t.Cleanup(cancel)
	return ctx
}

// eventually waits until try succeeds.
func eventually(t *testing.T, what string, try func() error) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := try()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
