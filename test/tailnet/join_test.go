package tailnet

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/headscale"
)

// Without an API key, where Headscale's policy approves the routes. Of that the node may hear late.
func TestPreAuthKey(t *testing.T) {
	l := steady.Enter(t)
	n, peer := l.Nodes[keyOnly], l.Nodes[nodeA]
	key := labtest.AuthKey(t, l, "--tags", tagAuto)
	if err := n.ConfigureDaemon(nil); err != nil {
		t.Fatal(err)
	}
	setKey(t, n, key)
	labtest.StartTailscaled(t, n)
	labtest.StartDaemon(t, n)
	a, b := labtest.AddPod(t, n, "key-1", lab.PodOptions{}), labtest.AddPod(t, peer, "key-2", lab.PodOptions{})
	for _, v6 := range []bool{false, true} {
		if err := peer.WaitRoute(labtest.Within(t), a.Addr(v6)); err != nil {
			t.Fatal(err)
		}
		labtest.WantTCP(t, labtest.Family(v6), b, labtest.Echo(a, v6), b.Addr(v6))
		labtest.WantTCP(t, labtest.Family(v6), a, labtest.Echo(b, v6), a.Addr(v6))
	}
	wantAddressesForNamesFirst(t, n)
}

// wantAddressesForNamesFirst: they were there before a tailscaled of ours started. For each address that comes later it binds its sockets anew, and a
// packet is lost. It says so, with what lo had before and has then; one more address has it say what it knows.
func wantAddressesForNamesFirst(t *testing.T, n *lab.Node) {
	t.Helper()
	const late = "192.0.2.77/32"
	if out, err := n.Run(t.Context(), "ip", "address", "add", late, "dev", "lo"); err != nil {
		t.Fatal(out, err)
	}
	var changes []string // what lo had before each
	labtest.Eventually(t, "tailscaled tells of an address", func() error {
		changes = nil
		for line := range strings.Lines(logSince(t, n, 0)) { // tailscaled's too
			if _, change, ok := strings.Cut(line, " ips lo: ["); ok && strings.Contains(line, "LinkChange: major") {
				before, now, _ := strings.Cut(change, "]->[")
				if changes = append(changes, before); strings.Contains(now, late) {
					return nil
				}
			}
		}
		return errors.New("not yet")
	})
	for _, before := range changes {
		if !strings.Contains(before, netset.AnswererIPv4.String()) || !strings.Contains(before, netset.AnswererIPv6.String()) {
			t.Errorf("tailscaled had begun when lo had %s", before)
		}
	}
}

// setKey gives the node another key, as an administrator would.
func setKey(t *testing.T, n *lab.Node, key string) {
	t.Helper()
	path := n.Path(lab.KeyFile)
	if err := os.WriteFile(path+".new", []byte(key+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

// Each fault on the way to a working node, repaired one after the other.
func TestBadInput(t *testing.T) {
	l := steady.Enter(t)
	n := l.Nodes[faulty]
	t.Run("range of the tailnet", func(t *testing.T) {
		if err := n.ConfigureDaemon(func(_ *lab.Node, c map[string]any) {
			labtest.Section(c, "network")["podCIDRs"] = []string{"100.64.7.0/24"}
		}); err != nil {
			t.Fatal(err)
		}
		refuses(t, n, `network.podCIDRs: "100.64.7.0/24": overlaps 100.64.0.0/10`)
	})
	t.Run("range outside the cluster's", func(t *testing.T) {
		if err := n.ConfigureDaemon(func(_ *lab.Node, c map[string]any) {
			labtest.Section(c, "network")["podCIDRs"] = []string{"10.99.7.0/24"}
		}); err != nil {
			t.Fatal(err)
		}
		refuses(t, n, `network.podCIDRs: "10.99.7.0/24": is outside network.clusterCIDRs`)
	})
	t.Run("unknown key", func(t *testing.T) {
		if err := n.ConfigureDaemon(func(_ *lab.Node, c map[string]any) { labtest.Section(c, "network")["podCidr"] = "10.244.9.0/24" }); err != nil {
			t.Fatal(err)
		}
		refuses(t, n, "network.podCidr: no such key; did you mean podCIDRs?")
	})
	t.Run("variables that everybody can read", func(t *testing.T) { exposedVariables(t, n) })
	expired, err := l.Control.Run(labtest.Within(t), "headscale", "apikeys", "create", "--expiration", "1ms")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name      string
		fault     func()
		part      string
		complaint string
	}{
		{"no tailscaled", func() {}, "tailnet", "systemctl start tailscaled"},
		{"wrong API key", func() {
			setKey(t, n, "hskey-api-abcdefghijkl-"+strings.Repeat("x", 64))
			labtest.StartTailscaled(t, n)
		}, "tailnet", "headscale apikeys create"},
		{"expired API key", func() { setKey(t, n, labtest.LastWord(t, expired)) }, "tailnet", "headscale apikeys create"},
		{"wrong pre-auth key", func() { setKey(t, n, "hskey-auth-abcdefghijkl-"+strings.Repeat("x", 64)) }, "tailnet", "headscale preauthkeys create"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if err := n.ConfigureDaemon(nil); err != nil {
				t.Fatal(err)
			}
			c.fault()
			from := logSize(t, n)
			if err := n.StartDaemon(); err != nil {
				t.Fatal(err)
			}
			complains(t, n, c.part, c.complaint)
			nothingDone(t, l, n)
			time.Sleep(1500 * time.Millisecond) // it tries again
			said := keepLines(logSince(t, n, from), `msg=failed part=`+c.part)
			if strings.Count(said, "\n") != 1 || !strings.Contains(said, c.complaint) {
				t.Errorf("logged:\n%s\nwant one line with %q, however often it is tried", said, c.complaint)
			}
			if c.name != "wrong pre-auth key" {
				labtest.Stop(t, n.Daemon)
			}
		})
	}
	t.Run("repaired", func(t *testing.T) {
		setKey(t, n, l.Control.APIKey)
		labtest.Ready(t, n)
		labtest.AddPod(t, n, "repaired", lab.PodOptions{})
	})
}

// exposedVariables holds that a key in a file that everybody can read is a fault to validate, and no reason to show nothing.
func exposedVariables(t *testing.T, n *lab.Node) {
	if err := errors.Join(n.ConfigureDaemon(nil), os.WriteFile(n.Path(paths.EnvFile), []byte("HEADSCALE_API_KEY=s3cret\n"), 0o644)); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(n.Path(paths.EnvFile))
	remedy := "chmod 0600 " + paths.EnvFile
	out, err := n.Run(labtest.Within(t), "sh", "-c", "headcni-daemon config show 2>&1")
	if err != nil || !strings.Contains(out, "warning: ") || !strings.Contains(out, remedy) || !strings.Contains(out, "podCIDRs") || strings.Contains(out, "s3cret") {
		t.Errorf("config show: %v\n%s", err, out)
	}
	if out, err := n.Run(labtest.Within(t), "headcni-daemon", "config", "validate"); err == nil || !strings.Contains(err.Error()+out, remedy) {
		t.Errorf("config validate: %v\n%s", err, out)
	}
}

// refuses starts the daemon, which must end with one line that holds want.
func refuses(t *testing.T, n *lab.Node, want string) {
	t.Helper()
	from := logSize(t, n)
	if err := n.StartDaemon(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-n.Daemon.Done():
	case <-labtest.Within(t).Done():
		t.Fatal("the daemon goes on")
	}
	said := logSince(t, n, from)
	if strings.Count(said, "\n") != 1 || !strings.Contains(said, want) {
		t.Errorf("said:\n%s\nwant one line with %s", said, want)
	}
	noConflist(t, n)
}

// complains waits until a part of the node is wrong for a reason.
func complains(t *testing.T, n *lab.Node, part, want string) {
	t.Helper()
	labtest.Eventually(t, fmt.Sprintf("wait for the complaint %q", want), func() error {
		parts, err := readyz(t, n)
		if err != nil {
			return err
		}
		if !strings.Contains(parts[part], want) {
			return fmt.Errorf("the parts are %v", parts)
		}
		if strings.Contains(parts[part], "\n") {
			t.Errorf("more than one line: %s", parts[part])
		}
		return nil
	})
	t.Log(part, "says:", mustReadyz(t, n)[part])
}

// readyz is what the daemon says of the parts of the node that are not right.
func readyz(t *testing.T, n *lab.Node) (map[string]string, error) {
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DialContext: n.Dial, DisableKeepAlives: true}}
	req, err := http.NewRequestWithContext(labtest.Within(t), http.MethodGet, "http://127.0.0.1:9669/readyz", nil)
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	var answer struct {
		Ready bool
		Parts []struct {
			Name, Error string
		}
	}
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		return nil, err
	}
	wrong := map[string]string{}
	for _, p := range answer.Parts {
		if p.Error != "" {
			wrong[p.Name] = p.Error
		}
	}
	if answer.Ready != (resp.StatusCode == http.StatusOK) {
		t.Errorf("readyz contradicts itself: %d, ready: %v, %v", resp.StatusCode, answer.Ready, wrong)
	}
	return wrong, nil
}

func mustReadyz(t *testing.T, n *lab.Node) map[string]string {
	t.Helper()
	parts, err := readyz(t, n)
	if err != nil {
		t.Fatal(err)
	}
	return parts
}

func logSize(t *testing.T, n *lab.Node) int64 {
	t.Helper()
	st, err := os.Stat(filepath.Join(n.Dir, "headcni-daemon.log"))
	if errors.Is(err, fs.ErrNotExist) {
		return 0
	}
	if err != nil {
		t.Fatal(err)
	}
	return st.Size()
}

func logSince(t *testing.T, n *lab.Node, from int64) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(n.Dir, "headcni-daemon.log"))
	if err != nil {
		t.Fatal(err)
	}
	return string(b[from:])
}

// nothingDone: no runtime may start pods, and nobody's routes are approved.
func nothingDone(t *testing.T, l *lab.Lab, n *lab.Node) {
	t.Helper()
	noConflist(t, n)
	for _, node := range headscaleNodes(t, l) {
		if node.Hostname == n.Name {
			t.Errorf("%s is in Headscale, with %v approved", n.Name, node.Approved)
		}
	}
}

func noConflist(t *testing.T, n *lab.Node) {
	t.Helper()
	if _, err := os.Stat(n.Path(filepath.Join(paths.CNIConfDir, paths.ConflistName))); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the conflist: %v, want none", err)
	}
}

func headscaleNodes(t *testing.T, l *lab.Lab) []headscale.Node {
	t.Helper()
	nodes, err := labtest.Headscale(t, l).Nodes(labtest.Within(t))
	if err != nil {
		t.Fatal(err)
	}
	return nodes
}

// A node with another one's pod range.
func TestDuplicateCIDR(t *testing.T) {
	l := steady.Enter(t)
	n, owner := l.Nodes[duplicate], l.Nodes[nodeA]
	labtest.Start(t, n, func(_ *lab.Node, c map[string]any) { labtest.Section(c, "network")["podCIDRs"] = owner.PodCIDRs })
	complains(t, n, "prefs", owner.Name+" advertises")
	noConflist(t, n)
	for _, node := range headscaleNodes(t, l) {
		if node.Hostname == n.Name && len(node.Approved)+len(node.Available) > 0 {
			t.Errorf("%s advertises %v, approved %v", n.Name, node.Available, node.Approved)
		}
		if node.Hostname == owner.Name && !slices.Equal(sorted(node.Primary), sorted(owner.PodCIDRs)) {
			t.Errorf("the owner has %v", node.Primary)
		}
	}
	labtest.Stop(t, n.Daemon)
	if err := n.ConfigureDaemon(nil); err != nil {
		t.Fatal(err)
	}
	labtest.StartDaemon(t, n)
	labtest.AddPod(t, n, "after-duplicate", lab.PodOptions{})
}

func sorted(p []netip.Prefix) []netip.Prefix {
	return slices.SortedFunc(slices.Values(p), netip.Prefix.Compare)
}
