// Package labtest is what tests on the lab share: where their programs come from, a lab that ends with its test and
// shows what it logged when the test failed, and waiting on a machine that may be busy.
package labtest

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/nstest"
)

// Soon bounds what takes a moment on an idle machine. No test measures speed by it.
const Soon = 60 * time.Second

// Programs is a folder with our programs, each a link or a file that the test may replace: those of HEADCNI_BIN, else
// built ones. Under the race detector the daemon has it too: it is the one with goroutines that share memory.
func Programs(t *testing.T) string {
	t.Helper()
	nstest.Require(t)
	dir := t.TempDir()
	if built := os.Getenv(lab.BinEnv); built != "" {
		files, err := os.ReadDir(built)
		if err != nil {
			t.Fatalf("%s: %v", lab.BinEnv, err)
		}
		for _, f := range files {
			if err := os.Symlink(filepath.Join(built, f.Name()), filepath.Join(dir, f.Name())); err != nil {
				t.Fatal(err)
			}
		}
	} else if err := lab.Build(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	if err := (lab.Options{Bin: dir}).Check(); err != nil {
		nstest.Skip(t, err.Error())
	}
	if raceDetector {
		raced := filepath.Join(t.TempDir(), "headcni-daemon")
		cmd := exec.CommandContext(t.Context(), "go", "build", "-race", "-o", raced, "github.com/headcni/headcni/cmd/headcni-daemon")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=1")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("build headcni-daemon: %v\n%s", err, out)
		}
		if err := os.Rename(raced, filepath.Join(dir, "headcni-daemon")); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// New makes a lab that ends with the test. A data race in a log fails the test; a test that failed shows the ends of the
// logs and keeps them whole with `go test -artifacts`.
func New(t *testing.T, opt lab.Options) *lab.Lab {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*Soon)
	defer cancel()
	l, err := lab.New(ctx, opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, path := range l.Logs() {
			showLog(t, path)
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

// ours are the lines of a log that our daemon wrote; the dedicated tailscaled, which is talkative, shares it.
var ours = regexp.MustCompile(`(?m)^(time=|headcni-daemon:).*\n`)

func showLog(t *testing.T, path string) {
	text, err := os.ReadFile(path)
	if err != nil {
		t.Error(err)
		return
	}
	raced := strings.Contains(string(text), "DATA RACE")
	if raced {
		t.Errorf("%s: a data race", path)
	}
	if !t.Failed() {
		return
	}
	end, enough := string(text), 500
	if lines := ours.FindAllString(end, -1); len(lines) > 0 && !raced {
		end, enough = strings.Join(lines, ""), 5000
	}
	if raced {
		enough = len(end)
	}
	t.Logf("--- %s\n%s", path, end[max(0, len(end)-enough):])
	name := filepath.Base(filepath.Dir(path)) + "-" + filepath.Base(path)
	if err := os.WriteFile(filepath.Join(t.ArtifactDir(), name), text, 0o644); err != nil {
		t.Error(err)
	}
}

// Within is a context for what takes a moment, also while the test cleans up.
func Within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeoutCause(context.WithoutCancel(t.Context()), Soon, fmt.Errorf("not within %v", Soon))
	t.Cleanup(cancel)
	return ctx
}

// Eventually waits until try succeeds.
func Eventually(t *testing.T, what string, try func() error) {
	t.Helper()
	deadline := time.Now().Add(Soon)
	for {
		err := try()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// Start configures a node that was left alone and starts tailscaled and the daemon. It does not wait for readiness.
func Start(t *testing.T, n *lab.Node, change func(*lab.Node, map[string]any)) {
	t.Helper()
	if err := n.ConfigureDaemon(change); err != nil {
		t.Fatal(err)
	}
	StartTailscaled(t, n)
	if err := n.StartDaemon(); err != nil {
		t.Fatal(err)
	}
}

// StartTailscaled starts a node's tailscaled and waits until it answers.
func StartTailscaled(t *testing.T, n *lab.Node) {
	t.Helper()
	if err := n.StartTailscaled(); err != nil {
		t.Fatal(err)
	}
	if err := n.WaitSocket(Within(t)); err != nil {
		t.Fatal(err)
	}
}

// Ready waits until a node's daemon says that all is right.
func Ready(t *testing.T, n *lab.Node) {
	t.Helper()
	if err := n.WaitReady(Within(t)); err != nil {
		t.Fatal(err)
	}
}

// Listen opens a TCP socket that is closed when the test ends. Port 0 is any.
func Listen(t *testing.T, at lab.Place, addr netip.AddrPort) (l net.Listener) {
	t.Helper()
	err := at.Do(func() (err error) {
		l, err = net.Listen("tcp", addr.String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// Service tells whoever connects which address it comes from (lab.Ask), until the test ends. Port 0 is any.
func Service(t *testing.T, at lab.Place, addr netip.AddrPort) netip.AddrPort {
	t.Helper()
	l := Listen(t, at, addr)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return // closed
			}
			fmt.Fprintln(c, netip.MustParseAddrPort(c.RemoteAddr().String()).Addr().Unmap())
			c.Close()
		}
	}()
	return netip.MustParseAddrPort(l.Addr().String())
}
