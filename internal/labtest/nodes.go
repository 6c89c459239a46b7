package labtest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/pkg/config/secret"
	"github.com/headcni/headcni/pkg/headscale"
	"github.com/headcni/headcni/pkg/nodestatus"
)

// Sh runs a line of shell on a machine, and must succeed.
func Sh(t testing.TB, m *lab.Machine, format string, args ...any) string {
	t.Helper()
	out, err := m.Run(Within(t), "bash", "-euo", "pipefail", "-c", fmt.Sprintf(format, args...))
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// Section of a daemon.yaml in the making.
func Section(c map[string]any, name string) map[string]any {
	if c[name] == nil {
		c[name] = map[string]any{}
	}
	return c[name].(map[string]any)
}

// Start configures a node that was left alone and starts tailscaled and the daemon. It does not wait for readiness.
func Start(t testing.TB, n *lab.Node, change func(*lab.Node, map[string]any)) {
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
func StartTailscaled(t testing.TB, n *lab.Node) {
	t.Helper()
	if err := n.StartTailscaled(); err != nil {
		t.Fatal(err)
	}
	if err := n.WaitSocket(Within(t)); err != nil {
		t.Fatal(err)
	}
}

// StartDaemon starts the daemons of nodes and waits until all are ready.
func StartDaemon(t testing.TB, nodes ...*lab.Node) {
	t.Helper()
	for _, n := range nodes {
		if err := n.StartDaemon(); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range nodes {
		Ready(t, n)
	}
}

// Ready waits until a node's daemon says that all is right.
func Ready(t testing.TB, n *lab.Node) {
	t.Helper()
	if err := n.WaitReady(Within(t)); err != nil {
		t.Fatal(err)
	}
}

// Part is what is wrong with a part of a node, "" = nothing, and whether the node is ready all the same.
func Part(t testing.TB, n *lab.Node, name string) (text string, ready bool) {
	t.Helper()
	var s nodestatus.Status
	if err := json.Unmarshal([]byte(Sh(t, n.Machine, "headcni-daemon status -o json || :")), &s); err != nil {
		t.Fatal(err)
	}
	for _, p := range s.Parts {
		if p.Name == name {
			return p.Error, s.Ready
		}
	}
	t.Fatalf("%s has no part %s", n.Name, name)
	return "", false
}

// Stop ends processes as systemd does, Kill as the kernel does where memory is short.
func Stop(t testing.TB, processes ...*lab.Process) {
	t.Helper()
	end(t, syscall.SIGTERM, processes)
}

// Kill ends processes at once.
func Kill(t testing.TB, processes ...*lab.Process) {
	t.Helper()
	end(t, syscall.SIGKILL, processes)
}

func end(t testing.TB, sig syscall.Signal, processes []*lab.Process) {
	t.Helper()
	for _, p := range processes {
		if err := p.Signal(sig); err != nil {
			t.Fatal(err)
		}
	}
}

// AddPod makes a pod that is removed with the test, unless the test does it. One that belongs to a stage ends with the lab.
func AddPod(t testing.TB, n *lab.Node, name string, opt lab.PodOptions) *lab.Pod {
	t.Helper()
	p, err := n.AddPod(Within(t), name, opt)
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := t.(*keeper); ok {
		return p
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), Soon)
		defer cancel()
		if _, err := os.Stat(n.Path("/run/netns/" + name)); errors.Is(err, fs.ErrNotExist) {
			return // the test has removed it
		}
		if err := p.Remove(ctx); err != nil {
			t.Errorf("remove %s: %v", name, err)
		}
	})
	return p
}

// AuthKey makes a pre-auth key of the lab's user, as up to Headscale 0.27 each has to have one.
func AuthKey(t testing.TB, l *lab.Lab, args ...string) string {
	t.Helper()
	out, err := l.Control.Run(Within(t), "headscale", append([]string{"preauthkeys", "create", "--expiration", "24h", "--user", "1"}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	return LastWord(t, out)
}

// LastWord of what a program printed, such as the key that it made.
func LastWord(t testing.TB, s string) string {
	t.Helper()
	words := strings.Fields(s)
	if len(words) == 0 {
		t.Fatal("printed nothing")
	}
	return words[len(words)-1]
}

// Up joins a tailscaled that a user has started, without anything of ours.
func Up(t testing.TB, l *lab.Lab, n *lab.Node, key string, args ...string) {
	t.Helper()
	args = append([]string{"up", "--login-server=" + l.Control.URL, "--auth-key=" + key, "--accept-dns=false"}, args...)
	if _, err := n.Run(Within(t), "tailscale", args...); err != nil {
		t.Fatal(err)
	}
}

// Headscale is an administrator's client.
func Headscale(t testing.TB, l *lab.Lab) *headscale.Client {
	t.Helper()
	api, err := headscale.New(headscale.Options{
		URL: l.Control.URL, Key: secret.New(l.Control.APIKey),
		Transport: &http.Transport{DialContext: l.Control.Dial, DisableKeepAlives: true},
	})
	if err != nil {
		t.Fatal(err)
	}
	return api
}

// Registered is what Headscale has of a node that is in the tailnet.
func Registered(t testing.TB, l *lab.Lab, n *lab.Node) (headscale.Node, error) {
	t.Helper()
	nodes, err := Headscale(t, l).Nodes(Within(t))
	if err != nil {
		return headscale.Node{}, err
	}
	addr := TailnetAddrs(t, n)[0]
	for _, node := range nodes {
		if slices.Contains(node.IPs, addr) {
			return node, nil
		}
	}
	return headscale.Node{}, fmt.Errorf("Headscale has no node with the address %s", addr)
}

// Approve approves routes beside those that are approved already.
func Approve(t testing.TB, l *lab.Lab, n *lab.Node, routes ...string) {
	t.Helper()
	node, err := Registered(t, l, n)
	if err != nil {
		t.Fatal(err)
	}
	var want []netip.Prefix
	for _, r := range routes {
		want = append(want, netip.MustParsePrefix(r))
	}
	if _, err := Headscale(t, l).ApproveRoutes(Within(t), node, want, nil); err != nil {
		t.Fatal(err)
	}
}

// TailnetAddrs are a node's two addresses in the tailnet, IPv4 first.
func TailnetAddrs(t testing.TB, n *lab.Node) []netip.Addr {
	t.Helper()
	var addrs []netip.Addr
	Eventually(t, "wait for the tailnet's addresses", func() (err error) {
		addrs, err = n.TailnetAddrs()
		if err == nil && len(addrs) != 2 {
			err = fmt.Errorf("%s has %v", n.Name, addrs)
		}
		return err
	})
	return addrs
}

// Prefs are a tailscaled's, without its keys.
func Prefs(t testing.TB, n *lab.Node) map[string]any {
	t.Helper()
	out, err := n.Run(Within(t), "tailscale", "--socket="+n.Socket(), "debug", "prefs")
	if err != nil {
		t.Fatal(err)
	}
	var p map[string]any
	if err := json.Unmarshal([]byte(out), &p); err != nil {
		t.Fatal(err)
	}
	delete(p, "Config")
	return p
}

// FlushRules takes away our routing rules, FlushTables our nftables, FlushRoutes our routes of last resort. The daemon may take a rule away itself
// meanwhile.
const (
	FlushRules = `for f in -4 -6; do
		for pref in $(ip $f rule | sed -n 's/^\(51[89][0-9]\):.*/\1/p'); do ip $f rule delete pref $pref || [[ -z $(ip $f rule show pref $pref) ]]; done
	done`
	FlushTables = `for f in ip ip6; do nft delete table $f headcni; done`
	FlushRoutes = `for f in -4 -6; do ip $f route flush metric 4278 type unreachable; done`
)

// Flush takes away everything that we keep in a node's kernel.
func Flush(t testing.TB, n *lab.Node) {
	t.Helper()
	for _, line := range []string{FlushTables, FlushRules, FlushRoutes} {
		Sh(t, n.Machine, "%s", line)
	}
}
