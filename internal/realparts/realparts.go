// Package realparts starts the real Headscale and tailscaled inside a test's namespaces, for the packages that talk to
// them. Whole nodes with pods are internal/lab's business.
//
// The test's binary must run under nstest.Main: everything here lives in its private namespaces and ends with it.
package realparts

import (
	"bytes"
	"context"
	"debug/buildinfo"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nstest"
)

// ToolsEnv holds the folders that test/tools/ensure prints.
const ToolsEnv = "HEADCNI_TOOLS"

// startTimeout bounds the start of a process. It is seconds on a busy machine.
const startTimeout = 60 * time.Second

var (
	worlds atomic.Int32
	dialer net.Dialer
)

// World is an underlay with Headscale on it. The control side lives in the namespace of the test's own process, so
// that a client in the test reaches it.
type World struct {
	*Headscale
	t      testing.TB
	number int
	nodes  int
}

// New makes an underlay of its own and starts Headscale. It skips the test where the tools are missing. batch is
// Headscale's delay before it tells nodes of changes, 500 ms by its own default; 0.27 and older have none of that name.
func New(t testing.TB, batch time.Duration) *World {
	t.Helper()
	nstest.Require(t)
	bin := Tool(t, "headscale")
	Tool(t, "tailscaled")
	tun, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
	if err != nil {
		nstest.Skip(t, fmt.Sprintf("no tun device: %v", err))
	}
	tun.Close()
	protectEtc(t)
	w := &World{t: t, number: int(worlds.Add(1))}
	bridge := w.bridge()
	addr := w.addr(1)
	run(t, "ip", "link", "add", bridge, "type", "bridge")
	t.Cleanup(func() { run(t, "ip", "link", "del", bridge) })
	run(t, "ip", "addr", "add", addr.String()+"/24", "dev", bridge)
	run(t, "ip", "link", "set", bridge, "up")
	w.Headscale = newHeadscale(t, bin, addr, batch)
	w.Start()
	return w
}

func (w *World) bridge() string { return fmt.Sprintf("under%d", w.number) }

// addr is private: to a control server at http://<public address> tailscaled dials port 443 whenever it reconnects within
// two minutes, and never comes back.
func (w *World) addr(host int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, 99, byte(w.number), byte(host)})
}

// Tool finds a program in ToolsEnv or PATH. It skips the test where there is none.
func Tool(t testing.TB, name string) string {
	t.Helper()
	for _, dir := range filepath.SplitList(os.Getenv(ToolsEnv)) {
		if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return path
		}
	}
	path, err := exec.LookPath(name)
	if err != nil {
		nstest.Skip(t, fmt.Sprintf("no %s: set %s=$(test/tools/ensure headscale tailscale)", name, ToolsEnv))
	}
	return path
}

var etc sync.Once

// protectEtc lays a throw-away layer over /etc: tailscaled takes resolv.conf over by default.
func protectEtc(t testing.TB) {
	t.Helper()
	etc.Do(func() {
		for _, dir := range []string{"/run/etc-upper", "/run/etc-work"} {
			if err := os.MkdirAll(dir, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if err := unix.Mount("overlay", "/etc", "overlay", 0, "lowerdir=/etc,upperdir=/run/etc-upper,workdir=/run/etc-work"); err != nil {
			t.Fatalf("lay an overlay over /etc: %v", err)
		}
	})
}

func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// process is a program that is started and ended again and again.
type process struct {
	t   testing.TB
	cmd *exec.Cmd
	log bytes.Buffer
	mu  sync.Mutex
	end chan struct{}
}

// Write implements io.Writer: the output of all runs.
func (p *process) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.log.Write(b)
}

// Log is what the program has printed.
func (p *process) Log() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.log.String()
}

// PID is the number of the program that runs now.
func (p *process) PID() int { return p.cmd.Process.Pid }

func (p *process) start(cmd *exec.Cmd) {
	p.t.Helper()
	cmd.Stdout, cmd.Stderr = p, p
	if err := cmd.Start(); err != nil {
		p.t.Fatalf("start %s: %v", cmd.Path, err)
	}
	p.cmd, p.end = cmd, make(chan struct{})
	go func() {
		_ = cmd.Wait() // the test judges by what the program does
		close(p.end)
	}()
}

// Signal sends a signal and waits until the program is gone.
func (p *process) Signal(sig os.Signal) {
	p.t.Helper()
	if p.cmd == nil {
		return
	}
	_ = p.cmd.Process.Signal(sig) // it may be gone
	select {
	case <-p.end:
	case <-time.After(startTimeout):
		p.t.Fatalf("%s does not end", p.cmd.Path)
	}
	p.cmd = nil
}

// Kill ends the program at once.
func (p *process) Kill() { p.t.Helper(); p.Signal(os.Kill) }

// await polls ok until the program is ready.
func (p *process) await(what string, ok func() bool) {
	p.t.Helper()
	for deadline := time.Now().Add(startTimeout); !ok(); time.Sleep(20 * time.Millisecond) {
		select {
		case <-p.end:
			p.t.Fatalf("%s ended early:\n%s", what, p.Log())
		default:
		}
		if time.Now().After(deadline) {
			p.t.Fatalf("%s is not ready:\n%s", what, p.Log())
		}
	}
}

// Headscale is a running control server with its embedded relay.
type Headscale struct {
	process
	// URL of the server.
	URL    string
	bin    string
	config string
}

type object = map[string]any

func newHeadscale(t testing.TB, bin string, addr netip.Addr, batch time.Duration) *Headscale {
	t.Helper()
	dir := tempDir(t)
	h := &Headscale{process: process{t: t}, URL: fmt.Sprintf("http://%s:8080", addr), bin: bin, config: filepath.Join(dir, "config.yaml")}
	in := func(name string) string { return filepath.Join(dir, name) }
	b, err := json.Marshal(object{ // JSON is YAML
		"server_url": h.URL, "listen_addr": addr.String() + ":8080", "metrics_listen_addr": addr.String() + ":9090",
		"grpc_listen_addr": addr.String() + ":50443",
		"noise":            object{"private_key_path": in("noise.key")},
		"prefixes":         object{"v4": "100.64.0.0/10", "v6": "fd7a:115c:a1e0::/48", "allocation": "sequential"},
		"derp": object{
			"server": object{
				"enabled": true, "region_id": 999, "region_code": "test", "region_name": "test", "stun_listen_addr": addr.String() + ":3478",
				"private_key_path": in("derp.key"), "automatically_add_embedded_derp_region": true, "ipv4": addr.String(),
			},
			"urls": []string{}, "paths": []string{}, "auto_update_enabled": false,
		},
		"disable_check_updates": true,
		"database":              object{"type": "sqlite", "sqlite": object{"path": in("db.sqlite")}},
		"log":                   object{"level": "info"},
		"policy":                object{"mode": "database"},
		"dns":                   object{"magic_dns": true, "base_domain": "tailnet.test", "override_local_dns": false, "nameservers": object{"global": []string{}}},
		"unix_socket":           in("sock"), "unix_socket_permission": "0700",
		"logtail": object{"enabled": false},
		"tuning":  object{"node_store_batch_timeout": batch.String()},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(h.config, b, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.Kill)
	return h
}

// Start starts the server and waits until it answers.
func (h *Headscale) Start() {
	h.t.Helper()
	h.start(exec.Command(h.bin, "serve", "-c", h.config))
	client := http.Client{Timeout: time.Second}
	h.await("headscale", func() bool {
		res, err := client.Get(h.URL + "/health")
		if err != nil {
			return false
		}
		res.Body.Close()
		return res.StatusCode == http.StatusOK
	})
}

// Backup stops the server, copies its database and starts it again. What it returns puts the copy back in the same way.
func (h *Headscale) Backup() (restore func()) {
	h.t.Helper()
	dir, backup := filepath.Dir(h.config), tempDir(h.t)
	move := func(from, to string) {
		h.t.Helper()
		h.Kill()
		old, _ := filepath.Glob(filepath.Join(to, "db.sqlite*"))
		for _, name := range old {
			if err := os.Remove(name); err != nil {
				h.t.Fatal(err)
			}
		}
		run(h.t, "sh", "-c", "cp "+filepath.Join(from, "db.sqlite")+"* "+to)
		h.Start()
	}
	move(dir, backup)
	return func() { h.t.Helper(); move(backup, dir) }
}

// CLI runs the server's own client as its administrator does, and returns what it prints.
func (h *Headscale) CLI(args ...string) string {
	h.t.Helper()
	var out, stderr bytes.Buffer
	cmd := exec.Command(h.bin, append([]string{"-c", h.config}, args...)...)
	cmd.Stdout, cmd.Stderr = &out, &stderr
	if err := cmd.Run(); err != nil {
		h.t.Fatalf("headscale %s: %v\n%s%s", strings.Join(args, " "), err, out.String(), stderr.String())
	}
	return strings.TrimSpace(out.String())
}

// Since reports whether it is Headscale 0.<minor> or later: make test-matrix runs tests against older ones.
func (h *Headscale) Since(minor int) bool {
	h.t.Helper()
	info, err := buildinfo.ReadFile(h.bin)
	if err != nil {
		h.t.Fatalf("read which Headscale %s is: %v", h.bin, err)
	}
	var major, is int
	if _, err := fmt.Sscanf(info.Main.Version, "v%d.%d", &major, &is); err != nil {
		h.t.Fatalf("read which Headscale %s is: version %q", h.bin, info.Main.Version)
	}
	return major > 0 || is >= minor
}

// APIKey makes an API key.
func (h *Headscale) APIKey() string {
	h.t.Helper()
	return lastWord(h.CLI("apikeys", "create", "--expiration", "24h"))
}

// AuthKey makes a pre-auth key that joins nodes with tags; more are arguments of `headscale preauthkeys create`.
func (h *Headscale) AuthKey(tags string, more ...string) string {
	h.t.Helper()
	if !h.Since(28) { // every key has an owner
		more = append(more, "--user", h.owner())
	}
	return lastWord(h.CLI(append([]string{"preauthkeys", "create", "--expiration", "24h", "--tags", tags}, more...)...))
}

// owner is the number of a user, who is made where there is none yet.
func (h *Headscale) owner() string {
	h.t.Helper()
	list := func() string {
		h.t.Helper()
		var users []struct{ ID uint64 }
		if out := h.CLI("users", "list", "--output", "json"); json.Unmarshal([]byte(out), &users) != nil {
			h.t.Fatalf("headscale users list: %s", out)
		}
		if len(users) == 0 {
			return ""
		}
		return strconv.FormatUint(users[0].ID, 10)
	}
	if id := list(); id != "" {
		return id
	}
	h.CLI("users", "create", "somebody")
	return list()
}

func lastWord(s string) string {
	f := strings.Fields(s)
	if len(f) == 0 {
		return ""
	}
	return f[len(f)-1]
}

// Tailscaled is a node of its own network namespace.
type Tailscaled struct {
	process
	NS *nstest.NS
	// Socket of the LocalAPI.
	Socket string
	// Tun is the name of its interface.
	Tun string
	dir string
	bin string
	env []string
}

// Node makes a namespace on the underlay and starts tailscaled in it. It is not logged in.
func (w *World) Node() *Tailscaled {
	w.t.Helper()
	w.nodes++
	ns := nstest.New(w.t)
	link := fmt.Sprintf("u%dn%d", w.number, w.nodes)
	run(w.t, "ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", ns.Path)
	run(w.t, "ip", "link", "set", link, "master", w.bridge(), "up")
	ns.Run(w.t, "ip", "addr", "add", w.addr(10+w.nodes).String()+"/24", "dev", "eth0")
	ns.Run(w.t, "ip", "link", "set", "eth0", "up")
	ns.Run(w.t, "ip", "route", "add", "default", "via", w.addr(1).String())
	dir := tempDir(w.t)
	d := &Tailscaled{
		process: process{t: w.t}, NS: ns, Socket: filepath.Join(dir, "sock"), Tun: "tailscale0", dir: dir, bin: Tool(w.t, "tailscaled"),
		env: append(os.Environ(), "TS_LOGS_DIR="+dir, "TS_NO_LOGS_NO_SUPPORT=true", "TS_DEBUG_USE_DERP_HTTP=true",
			"TS_DEBUG_FIREWALL_MODE=nftables"),
	}
	w.t.Cleanup(d.Kill)
	d.Start()
	return d
}

// Start starts tailscaled, which keeps its state, and waits for its socket.
func (d *Tailscaled) Start() {
	d.t.Helper()
	cmd := d.NS.Command(d.bin, "--tun="+d.Tun, "--no-logs-no-support", "--statedir="+d.dir, "--socket="+d.Socket, "--port=41641")
	cmd.Env = d.env
	d.start(cmd)
	d.await("tailscaled", func() bool {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		c, err := dialer.DialContext(ctx, "unix", d.Socket)
		if err != nil {
			return false
		}
		c.Close()
		return true
	})
}

// CLI runs `tailscale` against it and returns what it prints.
func (d *Tailscaled) CLI(args ...string) string {
	d.t.Helper()
	return d.NS.Run(d.t, Tool(d.t, "tailscale"), append([]string{"--socket=" + d.Socket}, args...)...)
}

// tempDir is short enough for Unix sockets, in the private /run.
func tempDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/run", "rp")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) }) // /run ends with the test's process anyhow
	return dir
}
