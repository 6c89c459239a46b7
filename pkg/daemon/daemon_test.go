package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/pkg/cmdlog"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/config/secret"
	"github.com/headcni/headcni/pkg/nodestatus"
	"github.com/headcni/headcni/pkg/reconcile"
)

// The daemon works in the namespaces of its process: these tests have those of the test binary for themselves, one
// after the other.

var quiet = slog.New(slog.DiscardHandler)

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// hostState is everything of the host that the daemon may change, as text.
func hostState(t *testing.T) string {
	t.Helper()
	var b strings.Builder
	for _, cmd := range []string{
		"ip rule", "ip -6 rule", "ip route show table all", "ip -6 route show table all", "nft list ruleset",
		"sysctl net.ipv4.ip_forward net.ipv6.conf.all.forwarding net.ipv4.conf.all.forwarding net.ipv4.conf.default.forwarding",
		"find /etc/cni $(ls -d /var/lib/headcni 2>/dev/null) -type f -exec stat -c '%n %a' {} + -exec cat {} +",
	} {
		b.WriteString("# " + cmd + "\n" + run(t, "sh", "-c", cmd))
	}
	return b.String()
}

func testConfig(t *testing.T) config.Config {
	nstest.Require(t)
	if _, err := exec.LookPath("nft"); err != nil {
		nstest.Skip(t, "no nft program: apt-get install nftables")
	}
	c := config.Default()
	c.Tailscale.Mode = config.ModeDaemon
	c.Network.PodCIDRs = config.CIDRs{"10.244.1.0/24", "fd00:244:1::/64"}
	c.Network.ClusterCIDRs = config.CIDRs{"10.244.0.0/16", "fd00:244::/32"}
	c.CNI.BinDir = t.TempDir()
	c.CNI.ConfDir = "/etc/cni/net.d"
	c.Monitoring.Listen = ""
	return c
}

func newDaemon(t *testing.T, c config.Config) *Daemon {
	t.Helper()
	d, err := New(c, slog.New(slog.DiscardHandler), func(string) string { return "" }, "test")
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func partErrors(d *Daemon) map[string]string {
	_, parts := d.board.Ready()
	m := map[string]string{}
	for _, p := range parts {
		m[p.Name] = p.Error
	}
	return m
}

// Beside a host's own tailscaled the dedicated one would not start: the node says what to choose, not to start it.
func TestNoAdviceToStartBesideAHosts(t *testing.T) {
	c := testConfig(t)
	if err := os.MkdirAll(filepath.Dir(paths.HostTailscaleSocket), 0o755); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", paths.HostTailscaleSocket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	d := newDaemon(t, c)
	d.member.Use(paths.DaemonTailscaleSocket)
	_, err = d.member.Status(t.Context(), config.ModeDaemon)
	if got := fmt.Sprint(err); !strings.Contains(got, "tailscale.mode: host, or stop it first") || strings.Contains(got, "systemctl start") {
		t.Errorf("got %q", got)
	}
}

func TestNodeIsSafeBeforeTailscaledAnswers(t *testing.T) {
	c := testConfig(t)
	before := hostState(t)
	d := newDaemon(t, c)
	if d.pass(t.Context()) == fullCheck {
		t.Error("all right without tailscaled")
	}
	got := partErrors(d)
	for _, part := range []string{partConfig, partFirewall, partRoutes} {
		if got[part] != "" {
			t.Errorf("%s: %s", part, got[part])
		}
	}
	if !strings.Contains(got[partTailnet], paths.DaemonTailscaleSocket) {
		t.Errorf("tailnet: %q does not name the socket", got[partTailnet])
	}
	if got[partConflist] != "waits for "+partPrefs {
		t.Errorf("conflist: %q", got[partConflist])
	}
	if _, err := os.Stat(filepath.Join(c.CNI.ConfDir, paths.ConflistName)); err == nil {
		t.Error("the conflist was written before the node was in the tailnet")
	}
	if rules := run(t, "ip", "rule"); !strings.Contains(rules, "5192:") {
		t.Errorf("no rules:\n%s", rules)
	}
	programmed := hostState(t)

	// A second daemon over the first one's work has nothing to change; a flush is repaired.
	d = newDaemon(t, c)
	d.pass(t.Context())
	run(t, "nft", "flush", "ruleset")
	run(t, "ip", "rule", "del", "pref", "5191")
	d.pass(t.Context())
	if diff := cmp.Diff(programmed, hostState(t)); diff != "" {
		t.Errorf("after damage and repair (-want +got):\n%s", diff)
	}

	for range 2 { // twice is fine
		if err := Uninstall(t.Context(), c, quiet); err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff(before, hostState(t)); diff != "" {
		t.Errorf("after uninstall (-want +got):\n%s", diff)
	}
}

func TestRefusedConfigurationTouchesNothing(t *testing.T) {
	c := testConfig(t)
	run(t, "ip", "link", "add", "lan0", "type", "veth", "peer", "name", "lan1")
	t.Cleanup(func() { run(t, "ip", "link", "del", "lan0") })
	run(t, "ip", "addr", "add", "10.244.7.1/24", "dev", "lan0")
	before := hostState(t)
	d := newDaemon(t, c)
	d.pass(t.Context())
	got := partErrors(d)
	if !strings.Contains(got[partConfig], "overlaps 10.244.7.0/24") {
		t.Errorf("config: %q", got[partConfig])
	}
	if diff := cmp.Diff(before, hostState(t)); diff != "" {
		t.Errorf("changed all the same:\n%s", diff)
	}
}

func TestRunOnceAndStop(t *testing.T) {
	c := testConfig(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c.Monitoring.Listen = l.Addr().String()
	if err := newDaemon(t, c).Run(t.Context()); err == nil || !strings.Contains(err.Error(), "monitoring.listen") {
		t.Errorf("address in use: %v", err)
	}
	l.Close()

	ctx, cancel := context.WithCancel(t.Context())
	first := newDaemon(t, c)
	ended := make(chan error, 1)
	go func() { ended <- first.Run(ctx) }()
	waitUntil(t, func() bool { return partErrors(first)[partRoutes] == "" })
	if err := newDaemon(t, c).Run(t.Context()); err == nil || !strings.Contains(err.Error(), "another headcni-daemon runs") {
		t.Errorf("second daemon: %v", err)
	}
	if err := Uninstall(t.Context(), c, quiet); err == nil || !strings.Contains(err.Error(), "stop it first") {
		t.Errorf("uninstall under a running daemon: %v", err)
	}
	// The daemon watches: what is deleted by hand comes back without a full check.
	run(t, "ip", "-6", "rule", "del", "pref", "5189")
	waitUntil(t, func() bool { return strings.Contains(run(t, "ip", "-6", "rule"), "5189:") })
	run(t, "nft", "delete", "table", "ip6", "headcni")
	waitUntil(t, func() bool { return exec.Command("nft", "list", "table", "ip6", "headcni").Run() == nil })

	// And so does what it made in /run: somebody wipes it, and the plugin and people find the daemon again.
	if err := os.RemoveAll(paths.RunDir); err != nil {
		t.Fatal(err)
	}
	waitUntil(t, func() bool {
		_, err := nodestatus.Ask(t.Context(), paths.APISocket)
		return err == nil && cmdlog.Send(paths.DaemonSocket, cmdlog.Record{Command: "ADD"}) == nil
	})
	waitUntil(t, func() bool { l, err := os.ReadFile(lockPath()); return err == nil && len(l) > 0 })
	if err := newDaemon(t, c).Run(t.Context()); err == nil || !strings.Contains(err.Error(), "another headcni-daemon runs") {
		t.Errorf("second daemon after a wipe: %v", err)
	}

	programmed := hostState(t)
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("stopped with %v", err)
	}
	if diff := cmp.Diff(programmed, hostState(t)); diff != "" {
		t.Errorf("the network did not outlive the daemon:\n%s", diff)
	}
	if err := Uninstall(t.Context(), c, quiet); err != nil {
		t.Error(err)
	}
}

func waitUntil(t *testing.T, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(15 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatal("did not come to pass in 15 s")
}

func TestStateIsWrittenBeforeAndReadBack(t *testing.T) {
	testConfig(t)
	if err := os.MkdirAll(paths.StateDir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(statePath()) })
	d := &Daemon{}
	if err := d.remember(func(s *state) { s.TunName, s.Advertised = "tun9", prefixes("10.244.1.0/24") }); err != nil {
		t.Fatal(err)
	}
	got, err := loadState()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(d.saved, got, comparePrefixes); diff != "" {
		t.Error(diff)
	}
	if err := os.WriteFile(statePath(), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := loadState(); err == nil || !strings.Contains(err.Error(), "move the file away") {
		t.Errorf("corrupt: %v", err)
	}
}

// What a daemon goes by is what stands on disk when it has the lock: the one before it may have written after this one was made, and what
// uninstall puts back would be lost.
func TestStateOfTheOneBefore(t *testing.T) {
	c := testConfig(t)
	nstest.FreshState(t)
	d := newDaemon(t, c)
	before := newDaemon(t, c)
	if err := before.remember(func(s *state) { s.ConflistMode = 0o640 }); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- d.Run(ctx) }()
	waitUntil(t, func() bool { return partErrors(d)[partRoutes] == "" })
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if s, err := loadState(); err != nil || s.ConflistMode != 0o640 || s.Host.Set == nil {
		t.Errorf("kept %+v, %v", s, err)
	}
	if err := Uninstall(t.Context(), c, quiet); err != nil {
		t.Error(err)
	}
}

// TestCheckConfig: what stands in the way of a daemon with a valid configuration is named, and nothing else.
func TestCheckConfig(t *testing.T) {
	file := func(mode os.FileMode) string {
		path := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(path, []byte("s3cret\n"), mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	private, public := file(0o600), file(0o644)
	for name, tt := range map[string]struct {
		change func(*config.Config)
		env    map[string]string
		want   []string // all in the error, none: valid
		note   bool
	}{
		"a key file":         {func(c *config.Config) { c.Headscale.APIKeyFile = private }, nil, nil, false},
		"a variable":         {func(*config.Config) {}, map[string]string{"HEADSCALE_API_KEY": "s3cret"}, nil, false},
		"no key":             {func(*config.Config) {}, nil, []string{"no Headscale key"}, false},
		"no key, host mode":  {func(c *config.Config) { c.Tailscale.Mode = config.ModeHost }, nil, nil, true},
		"no key, Kubernetes": {func(c *config.Config) { c.Network.PodCIDRs, c.Kubernetes.Enable = nil, "true" }, nil, nil, false},
		"no such file":       {func(c *config.Config) { c.Headscale.APIKeyFile = "/no/such" }, nil, []string{"headscale.apiKeyFile", "/no/such", "0600"}, false},
		"public file":        {func(c *config.Config) { c.Headscale.APIKeyFile = public }, nil, []string{"chmod 0600 " + public}, false},
		"key in a public configuration": {func(c *config.Config) { c.Headscale.AuthKey = secret.New("s3cret") }, nil,
			[]string{"everybody can read " + public, "headscale.authKeyFile"}, false},
		"a URL to which tailscaled does not come back": {func(c *config.Config) { c.Headscale.APIKeyFile, c.Headscale.URL = private, "http://headscale.lan:8080" }, nil,
			[]string{`headscale.url: "http://headscale.lan:8080"`, "port 443", "https://"}, false},
		"a private address": {func(c *config.Config) { c.Headscale.APIKeyFile, c.Headscale.URL = private, "http://10.1.2.3:8080" }, nil, nil, false},
		"nothing at all": {func(c *config.Config) { *c = config.Default(); c.CNI.ConfDir = "/no/such" }, nil,
			[]string{"network.podCIDRs", "headscale.url", "no Headscale key"}, false},
	} {
		c := config.Default()
		c.Tailscale.Mode = config.ModeDaemon
		c.Headscale.URL, c.CNI.ConfDir, c.Network.PodCIDRs = "https://headscale.example", t.TempDir(), config.CIDRs{"10.244.1.0/24"}
		tt.change(&c)
		note, err := CheckConfig(c, func(name string) string { return tt.env[name] }, public)
		if len(tt.want) == 0 && err != nil || len(tt.want) > 0 && err == nil || tt.note != (note != "") {
			t.Errorf("%s: note %q, %v", name, note, err)
			continue
		}
		for _, w := range tt.want {
			if !strings.Contains(err.Error(), w) || strings.Contains(err.Error(), "s3cret") {
				t.Errorf("%s: want %q in %v", name, w, err)
			}
		}
	}
}

// A node that is in the tailnet by a URL to which tailscaled does not come back goes on, and says so.
func TestLosesHeadscale(t *testing.T) {
	for name, tt := range map[string]struct {
		configured, tailscaled string
		want                   bool
	}{
		"configured":           {"http://headscale.lan:8080", "", true},
		"tailscaled's own":     {"", "http://203.0.113.1:8080", true},
		"a private address":    {"http://10.0.0.1:8080", "http://10.0.0.1:8080", false},
		"https":                {"", "https://headscale.lan", false},
		"no tailscaled so far": {"", "", false},
	} {
		err := losesHeadscale(tt.configured, observation{controlURL: tt.tailscaled})
		if (err != nil) != tt.want || tt.want && (!errors.As(err, new(reconcile.Warning)) || !strings.Contains(err.Error(), "https://")) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
