package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/headcni/headcni/internal/atomicfile"
	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/internal/trusted"
	"github.com/headcni/headcni/pkg/cmdlog"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/conflist"
	"github.com/headcni/headcni/pkg/install"
	"github.com/headcni/headcni/pkg/networking/podlink"
)

// uninstallEnv turns the test binary into a process that uninstalls, with the conflist in this folder.
const uninstallEnv = "HEADCNI_TEST_UNINSTALL"

func TestMain(m *testing.M) {
	if dir := os.Getenv(uninstallEnv); dir != "" {
		if err := uninstallOnce(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	nstest.Main(m)
}

func uninstallOnce(confDir string) error {
	c := config.Default()
	c.Tailscale.Mode, c.CNI.ConfDir = config.ModeDaemon, confDir
	fmt.Println("started")
	return Uninstall(context.Background(), c, slog.New(slog.NewTextHandler(os.Stderr, nil)))
}

const ownersConflist = `{"name":"mine","cniVersion":"1.0.0","plugins":[{"type":"bridge"}]}`

// inhabit makes the node one on which HeadCNI has lived in daemon mode, and was killed a few times.
func inhabit(t *testing.T, c config.Config, binDir string) {
	t.Helper()
	files := map[string]string{
		filepath.Join(c.CNI.ConfDir, paths.ConflistName):                      ownersConflist,
		filepath.Join(c.CNI.ConfDir, "."+paths.ConflistName+".17"):            "half",
		filepath.Join(paths.StateDir, ".daemon.json.17"):                      "half",
		filepath.Join(paths.StateDir, ".conflist.orig.17"):                    "half",
		filepath.Join(paths.TailscaleStateDir, "tailscaled.state"):            `{"_machinekey":"x"}`,
		filepath.Join(paths.TailscaleStateDir, "profile-data/1/x"):            "x",
		filepath.Join(paths.IPAMDir, conflist.NetworkName, "boot/10.244.1.2"): "x",
		filepath.Join(cmdlog.Spool(paths.DaemonSocket), "1-1"):                "{}",
		totalsPath(): "{}",
		filepath.Join(paths.RunDir, ".metrics.json.1"): "{",
		paths.DaemonTailscaleSocket:                    "",
		paths.DaemonSocket:                             "",
		paths.APISocket:                                "",
	}
	for path, text := range files {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	from := t.TempDir()
	for _, name := range []string{"headcni", "headcni-ipam"} {
		if err := os.WriteFile(filepath.Join(from, name), []byte(name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := install.Plugins(t.Context(), from, binDir); err != nil {
		t.Fatal(err)
	}
	d := newDaemon(t, c)
	d.pass(t.Context())
	if got := partErrors(d); got[partRoutes] != "" || got[partFirewall] != "" {
		t.Fatal(got)
	}
	ours := `{"plugins":[{"type":"headcni","gate":{}}]}`
	if _, err := conflist.Write(c.CNI.ConfDir, []byte(ours), func(m os.FileMode) error {
		return d.remember(func(s *state) { s.ConflistMode = m })
	}); err != nil {
		t.Fatal(err)
	}
}

// wantNothing fails where anything of ours is left, or the owner's conflist is not as it was.
func wantNothing(t *testing.T, before string, c config.Config, binDir string) {
	t.Helper()
	nstest.WantFiles(t, binDir)
	nstest.WantFiles(t, c.CNI.ConfDir, paths.ConflistName)
	for _, dir := range []string{paths.StateDir, paths.RunDir} {
		if entries, err := os.ReadDir(dir); err != nil && !errors.Is(err, fs.ErrNotExist) || len(entries) != 0 {
			t.Errorf("%s: %v, %v", dir, entries, err)
		}
	}
	path := filepath.Join(c.CNI.ConfDir, paths.ConflistName)
	if b, err := os.ReadFile(path); err != nil || string(b) != ownersConflist {
		t.Errorf("the owner's conflist is %q, %v", b, err)
	}
	if info, err := os.Stat(path); err == nil && info.Mode() != 0o640 {
		t.Errorf("the owner's conflist has mode %v", info.Mode())
	}
	if diff := cmp.Diff(before, hostState(t)); diff != "" {
		t.Errorf("after uninstall (-want +got):\n%s", diff)
	}
}

func inhabitable(t *testing.T) (c config.Config, binDir, before string) {
	t.Helper()
	c = testConfig(t)
	nstest.FreshState(t)
	c.CNI.ConfDir = t.TempDir()
	return c, t.TempDir(), hostState(t)
}

// fakeTailscaled answers the LocalAPI at socket with status, 200 with an empty object, and notes what it is asked.
func fakeTailscaled(t *testing.T, socket string, status int) (asked func() []string) {
	t.Helper()
	if err := atomicfile.Remove(socket); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	calls := make(chan string, 16)
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		calls <- r.Method + " " + r.URL.Path
		w.WriteHeader(status)
		if status == http.StatusOK {
			_, _ = w.Write([]byte("{}"))
		}
	})}
	ended := make(chan struct{})
	go func() { _ = srv.Serve(l); close(ended) }()
	t.Cleanup(func() { srv.Close(); <-ended })
	return func() (list []string) {
		srv.Close() // as when its pod goes
		for len(calls) > 0 {
			list = append(list, <-calls)
		}
		return list
	}
}

// The dedicated tailscaled leaves the tailnet, or cannot; what it had on disk goes in either case, and all else of ours.
func TestUninstallLeavesNothing(t *testing.T) {
	for _, status := range []int{http.StatusNoContent, http.StatusInternalServerError} {
		c, binDir, before := inhabitable(t)
		inhabit(t, c, binDir)
		asked := fakeTailscaled(t, paths.DaemonTailscaleSocket, status)
		var log bytes.Buffer
		if err := Uninstall(t.Context(), c, slog.New(slog.NewTextHandler(&log, nil))); err != nil {
			t.Fatal(err)
		}
		if got := asked(); !slices.Equal(got, []string{"POST /localapi/v0/logout"}) {
			t.Errorf("asked tailscaled %q", got)
		}
		if said := strings.Contains(log.String(), "headscale nodes delete"); said != (status >= 300) {
			t.Errorf("logged %q", log.String())
		}
		wantNothing(t, before, c, binDir)
	}
}

// A host's own tailscaled is not ours to log out, whatever tailscale.socket says.
func TestUninstallLogsNoHostOut(t *testing.T) {
	c, binDir, _ := inhabitable(t)
	inhabit(t, c, binDir)
	socket := filepath.Join(t.TempDir(), "host.sock")
	host := fakeTailscaled(t, socket, http.StatusNoContent)
	for _, mode := range []string{config.ModeAuto, config.ModeHost} {
		c.Tailscale.Mode, c.Tailscale.Socket = mode, socket
		if err := Uninstall(t.Context(), c, quiet); err != nil {
			t.Fatal(err)
		}
	}
	if got := host(); len(got) != 0 {
		t.Errorf("asked the host's tailscaled %q", got)
	}
}

// A folder for leases that others lead elsewhere is left to the owner.
func TestUninstallFollowsNobody(t *testing.T) {
	nstest.FreshState(t)
	confDir, dir := t.TempDir(), t.TempDir()
	victim := filepath.Join(dir, "victim", conflist.NetworkName, "theirs")
	if err := os.MkdirAll(victim, 0o755); err != nil {
		t.Fatal(err)
	}
	dataDir := filepath.Join(dir, "all", "link")
	err := os.Mkdir(filepath.Dir(dataDir), 0o755)
	if err == nil {
		err = os.Chmod(filepath.Dir(dataDir), 0o777)
	}
	if err == nil {
		err = os.Symlink(filepath.Join(dir, "victim"), dataDir)
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(confDir, paths.ConflistName),
			fmt.Appendf(nil, `{"name":"mine","plugins":[{"type":"headcni","ipam":{"type":"headcni-ipam","dataDir":%q,"subnet":"10.244.1.0/24"}}]}`, dataDir), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := removeLeases(confDir); !errors.Is(err, trusted.ErrOthers) {
		t.Errorf("got %v", err)
	}
	if _, err := os.Stat(victim); err != nil {
		t.Errorf("removed by a link of others: %v", err)
	}
}

// Leases are where the owner's conflist has them, and so is what is not ours.
func TestUninstallRemovesLeasesElsewhere(t *testing.T) {
	nstest.FreshState(t)
	confDir, dataDir := t.TempDir(), t.TempDir()
	for path, text := range map[string]string{
		filepath.Join(confDir, paths.ConflistName):                          fmt.Sprintf(`{"name":"mine","plugins":[{"type":"headcni","ipam":{"type":"headcni-ipam","dataDir":%q,"subnet":"10.244.1.0/24"}}]}`, dataDir),
		filepath.Join(dataDir, conflist.NetworkName, "boot", "10.244.1.2"):  "x",
		filepath.Join(dataDir, "other", "boot", "192.0.2.1"):                "x",
		filepath.Join(paths.IPAMDir, conflist.NetworkName, "boot/10.1.1.1"): "x",
	} {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := removeLeases(confDir); err != nil {
		t.Fatal(err)
	}
	nstest.WantFiles(t, dataDir, "other")
	if _, err := os.Stat(paths.IPAMDir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s: %v", paths.IPAMDir, err)
	}
}

// Killed at any moment, an uninstall is finished by the next one.
func TestUninstallKilled(t *testing.T) {
	c, binDir, before := inhabitable(t)
	env := uninstallEnv + "=" + c.CNI.ConfDir
	inhabit(t, c, binDir)
	cmd := nstest.StartSelf(t, env)
	began := time.Now()
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	took := time.Since(began)
	wantNothing(t, before, c, binDir)
	half := 0
	for range 10 {
		inhabit(t, c, binDir)
		cmd := nstest.StartSelf(t, env)
		time.Sleep(rand.N(took))
		_ = cmd.Process.Kill() // it may have ended
		if cmd.Wait() != nil {
			half++
		}
		if err := Uninstall(t.Context(), c, quiet); err != nil {
			t.Fatal(err)
		}
		wantNothing(t, before, c, binDir)
		if t.Failed() {
			return
		}
	}
	if half == 0 {
		t.Error("every uninstall had ended before it was killed")
	}
	t.Logf("%d of 10 were killed half-way", half)
}

// Pods that run while the node is taken down are held apart by NetworkPolicies until nothing is forwarded any more.
func TestUninstallOpensNoPod(t *testing.T) {
	c := testConfig(t)
	nstest.FreshState(t)
	c.CNI.ConfDir = t.TempDir()
	d := newDaemon(t, c)
	pods := map[string]*nstest.NS{}
	for addr, link := range map[string]string{"10.244.1.10": podlink.Name("c1", "eth0"), "10.244.1.11": podlink.Name("c2", "eth0")} {
		pods[addr] = nstest.New(t)
		run(t, "ip", "link", "add", link, "type", "veth", "peer", "eth0", "netns", pods[addr].Name)
		t.Cleanup(func() { run(t, "ip", "link", "del", link) })
		run(t, "ip", "addr", "add", "169.254.1.1/32", "dev", link)
		run(t, "ip", "link", "set", link, "up")
		run(t, "ip", "route", "add", addr, "dev", link)
		pods[addr].Run(t, "ip", "link", "set", "eth0", "up")
		pods[addr].Run(t, "ip", "addr", "add", addr+"/32", "dev", "eth0")
		pods[addr].Run(t, "ip", "route", "add", "default", "dev", "eth0", "onlink", "via", "169.254.1.1")
	}
	from, to := new(net.UDPConn), new(net.UDPConn)
	pods["10.244.1.11"].Do(t, func() (err error) {
		to, err = net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(10, 244, 1, 11), Port: 9})
		return err
	})
	pods["10.244.1.10"].Do(t, func() (err error) {
		from, err = net.DialUDP("udp4", nil, &net.UDPAddr{IP: net.IPv4(10, 244, 1, 11), Port: 9})
		return err
	})
	defer from.Close()
	defer to.Close()
	hears := func(within time.Duration) bool {
		_ = to.SetReadDeadline(time.Now().Add(within))
		_, err := to.Read(make([]byte, 16))
		return err == nil
	}
	for range 6 { // the moment between two steps is short
		d.pass(t.Context())
		waitUntil(t, func() bool { _, _ = from.Write([]byte("x")); return hears(50 * time.Millisecond) })
		run(t, "nft", "add table inet headcni-policy; add chain inet headcni-policy ingress { type filter hook forward priority 11; policy drop; }")
		for hears(50 * time.Millisecond) {
		}
		stop, stopped := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(stopped)
			for {
				select {
				case <-stop:
					return
				default:
					_, _ = from.Write([]byte("x"))
				}
			}
		}()
		err := removeNetwork(t.Context(), d.saved)
		close(stop)
		<-stopped
		if err != nil {
			t.Error(err)
		}
		if hears(50 * time.Millisecond) {
			t.Error("a pod that policies isolate was reached")
		}
	}
}
