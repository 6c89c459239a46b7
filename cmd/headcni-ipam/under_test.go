package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/headcni/headcni/internal/cnimain"
	"github.com/headcni/headcni/internal/nstest"
)

// binary builds headcni-ipam as it ships, once, and returns its folder.
var binary = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("/run", "headcni-test") // of nstest: it goes with the tests
	if err != nil {
		return "", err
	}
	build := exec.Command("go", "build", "-buildvcs=false", "-trimpath", "-ldflags=-s -w", "-o", filepath.Join(dir, "headcni-ipam"), ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build: %w\n%s", err, out)
	}
	return dir, nil
})

// programs returns CNI_PATH: the folders of headcni-ipam and of the CNI project's own plugins.
var programs = sync.OnceValues(func() (string, error) {
	dir, err := binary()
	if err != nil {
		return "", err
	}
	tools := os.Getenv("HEADCNI_TOOLS")
	if tools == "" {
		out, err := exec.Command("../../test/tools/ensure", "cni-plugins").Output()
		if err != nil {
			return "", fmt.Errorf("test/tools/ensure cni-plugins: %w", err)
		}
		tools = strings.TrimSpace(string(out))
	}
	return dir + ":" + tools, nil
})

// node runs the CNI project's plugins as a runtime does.
type node struct {
	host *nstest.NS
	path string // CNI_PATH
}

func newNode(t *testing.T) *node {
	t.Helper()
	nstest.Require(t)
	path, err := programs()
	if err != nil {
		nstest.Skip(t, fmt.Sprintf("no programs: %v", err))
	}
	return &node{host: newNS(t), path: path}
}

// newNS is a namespace without duplicate address detection, for which these plugins wait, but not for long.
func newNS(t *testing.T) *nstest.NS {
	t.Helper()
	ns := nstest.New(t)
	ns.Run(t, "sh", "-c", "echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad")
	return ns
}

func (n *node) find(t *testing.T, plugin string) string {
	t.Helper()
	for _, dir := range filepath.SplitList(n.path) {
		if path := filepath.Join(dir, plugin); exists(path) {
			return path
		}
	}
	t.Fatalf("no %s in %s", plugin, n.path)
	return ""
}

func exists(path string) bool { _, err := os.Stat(path); return err == nil }

// try runs a plugin. The error has what it printed.
func (n *node) try(plugin string, c call, netns string) (string, error) {
	cmd := n.host.Command(plugin)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "CNI_COMMAND=" + c.command, "CNI_CONTAINERID=" + c.id, "CNI_NETNS=" + netns, "CNI_IFNAME=eth0",
		"CNI_PATH=" + n.path, "CNI_ARGS=" + c.args}
	cmd.Stdin = strings.NewReader(c.conf)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s %s %s: %w: %s", plugin, c.command, c.id, err, out.Bytes())
	}
	return out.String(), nil
}

func (n *node) must(t *testing.T, plugin string, c call, netns string) string {
	t.Helper()
	out, err := n.try(n.find(t, plugin), c, netns)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// with sets keys in a configuration.
func with(t *testing.T, conf, keys string) string {
	t.Helper()
	m := map[string]json.RawMessage{}
	for _, text := range []string{conf, keys} {
		if err := json.Unmarshal([]byte(text), &m); err != nil {
			t.Fatalf("%s: %v", text, err)
		}
	}
	b, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// ipamResult is what an attachment got.
type ipamResult struct {
	IPs    []struct{ Version, Address, Gateway string }
	Routes []map[string]any
	DNS    map[string]any
}

func parseResult(t *testing.T, out string) (r ipamResult) {
	t.Helper()
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		t.Fatalf("%s: %v", out, err)
	}
	return r
}

// TestSameAsHostLocal: a configuration of host-local gives the same with headcni-ipam, in every version of the result.
func TestSameAsHostLocal(t *testing.T) {
	n := newNode(t)
	resolv := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(resolv, []byte("nameserver 10.0.0.10\ndomain example\nsearch a.example b.example\noptions ndots:5\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct{ ipam, keys, args string }{
		"subnet":               {ipam: `"subnet": "10.0.0.0/24"`},
		"specification":        {ipam: `"subnet": "10.244.0.0/24", "rangeStart": "10.244.0.10", "rangeEnd": "10.244.0.254", "gateway": "10.244.0.1"`},
		"smallest":             {ipam: `"subnet": "10.0.0.0/30"`},
		"gateway":              {ipam: `"subnet": "10.0.0.0/24", "gateway": "10.0.0.2"`},
		"gateway at start":     {ipam: `"subnet": "10.0.0.0/24", "rangeStart": "10.0.0.2", "gateway": "10.0.0.2"`},
		"ranges":               {ipam: `"ranges": [[{"subnet": "10.0.0.0/24", "rangeStart": "10.0.0.20"}, {"subnet": "10.0.1.0/24"}]]`},
		"dual":                 {ipam: `"ranges": [[{"subnet": "10.0.0.0/24"}], [{"subnet": "fd00:1::/64"}]]`},
		"both forms":           {ipam: `"subnet": "10.0.0.0/24", "ranges": [[{"subnet": "fd00:1::/112", "rangeStart": "fd00:1::10"}], [{"subnet": "10.9.0.0/16"}]]`},
		"IPv6 /64":             {ipam: `"subnet": "fd00:1:2:3::/64"`},
		"IPv6 /120":            {ipam: `"subnet": "fd00::/120", "gateway": "fd00::ff"`},
		"routes":               {ipam: `"subnet": "10.0.0.0/24", "routes": [{"dst": "0.0.0.0/0"}, {"dst": "10.9.0.0/16", "gw": "10.0.0.7"}, {"dst": "fd00::/8"}]`},
		"routes of 1.1.0":      {ipam: `"subnet": "10.0.0.0/24", "routes": [{"dst": "10.8.0.0/16", "mtu": 1400, "advmss": 1360, "priority": 5, "table": 100, "scope": 253}]`},
		"resolvConf":           {ipam: fmt.Sprintf(`"subnet": "10.0.0.0/24", "resolvConf": %q`, resolv)},
		"ipRanges":             {ipam: `"type": "x"`, keys: `{"runtimeConfig": {"ipRanges": [[{"subnet": "10.7.0.0/24"}], [{"subnet": "fd00:7::/64"}]]}}`},
		"ipRanges and ranges":  {ipam: `"ranges": [[{"subnet": "10.0.0.0/24"}]]`, keys: `{"runtimeConfig": {"ipRanges": [[{"subnet": "fd00:7::/64"}]]}}`},
		"CNI_ARGS":             {ipam: `"subnet": "10.0.0.0/24"`, args: "IgnoreUnknown=1;IP=10.0.0.77"},
		"CNI_ARGS with length": {ipam: `"subnet": "10.0.0.0/24"`, args: "IP=10.0.0.77/24;IgnoreUnknown=1;K8S_POD_NAME=x"},
		"args.cni.ips":         {ipam: `"ranges": [[{"subnet": "10.0.0.0/24"}], [{"subnet": "fd00:1::/64"}]]`, keys: `{"args": {"cni": {"ips": ["10.0.0.9", "fd00:1::9"]}}}`},
		"runtimeConfig.ips":    {ipam: `"ranges": [[{"subnet": "10.0.0.0/24"}], [{"subnet": "fd00:1::/64"}]]`, keys: `{"runtimeConfig": {"ips": ["fd00:1::9/64"]}}`},
	} {
		for _, version := range cnimain.Versions() {
			if name == "routes of 1.1.0" && version != "1.1.0" {
				continue // host-local leaves them in older results
			}
			var results []ipamResult
			for _, program := range []string{"host-local", "headcni-ipam"} {
				cfg := conf(version, t.TempDir(), c.ipam, "")
				if !strings.Contains(c.ipam, `"type"`) {
					cfg = strings.Replace(cfg, `"headcni-ipam"`, fmt.Sprintf("%q", program), 1)
				}
				if c.keys != "" {
					cfg = with(t, cfg, c.keys)
				}
				for _, id := range []string{"a", "b"} {
					args := c.args
					if id == "b" {
						if c.args+c.keys != "" && !strings.HasPrefix(name, "ipRanges") || name == "smallest" {
							continue // the address is taken
						}
					}
					results = append(results, parseResult(t, n.must(t, program, call{"ADD", id, args, cfg}, "/run/netns/none")))
				}
			}
			half := len(results) / 2
			if diff := cmp.Diff(results[:half], results[half:], cmpopts.EquateEmpty()); diff != "" {
				t.Errorf("%s, version %s: %s", name, version, diff)
			}
		}
	}
}

// TestUnderOtherPlugins has bridge, ptp and macvlan ask headcni-ipam for addresses.
func TestUnderOtherPlugins(t *testing.T) {
	for _, plugin := range []string{"bridge", "ptp", "macvlan"} {
		t.Run(plugin, func(t *testing.T) {
			n := newNode(t)
			n.host.Run(t, "ip", "link", "add", "up0", "type", "veth", "peer", "name", "up1")
			n.host.Run(t, "ip", "link", "set", "up0", "up")
			n.host.Run(t, "ip", "link", "set", "up1", "up")
			cfg := with(t, conf("1.1.0", t.TempDir(), `"ranges": [[{"subnet": "10.5.0.0/24", "rangeStart": "10.5.0.10"}], [{"subnet": "fd00:5::/64"}]],
				"routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]`, ""),
				fmt.Sprintf(`{"type": %q, "bridge": "br5", "isGateway": true, "master": "up0", "mode": "bridge"}`, plugin))
			pods := map[string]*nstest.NS{"a": newNS(t), "b": newNS(t)}
			outs := map[string]string{}
			for _, id := range []string{"a", "b"} {
				outs[id] = n.must(t, plugin, call{"ADD", id, "", cfg}, pods[id].Path)
			}
			if got := fmt.Sprint(parseResult(t, outs["b"]).IPs); got != "[{ 10.5.0.11/24 10.5.0.1} { fd00:5::3/64 fd00:5::1}]" {
				t.Errorf("result: %s", outs["b"])
			}
			addrs := pods["a"].Run(t, "ip", "-o", "addr", "show", "dev", "eth0")
			if !strings.Contains(addrs, "10.5.0.10/24") || !strings.Contains(addrs, "fd00:5::2/64") {
				t.Errorf("addresses: %s", addrs)
			}
			pods["a"].Run(t, "ping", "-n", "-c", "1", "-W", "2", "10.5.0.11")
			n.must(t, plugin, call{"CHECK", "a", "", with(t, cfg, `{"prevResult": `+outs["a"]+`}`)}, pods["a"].Path)
			n.must(t, plugin, call{"STATUS", "", "", cfg}, "")
			n.must(t, plugin, call{"DEL", "a", "", with(t, cfg, `{"prevResult": `+outs["a"]+`}`)}, pods["a"].Path)
			n.must(t, plugin, call{"DEL", "a", "", cfg}, "")

			asked := with(t, cfg, `{"runtimeConfig": {"ips": ["10.5.0.77"]}}`)
			if out := n.must(t, plugin, call{"ADD", "c", "", asked}, newNS(t).Path); !strings.Contains(out, "10.5.0.77/24") {
				t.Errorf("requested: %s", out)
			}
			if _, err := n.try(n.find(t, plugin), call{"ADD", "d", "", asked}, newNS(t).Path); err == nil || !strings.Contains(err.Error(), "container c") {
				t.Errorf("an address of another: %v", err)
			}
			n.must(t, "headcni-ipam", call{"GC", "", "", with(t, cfg, `{"cni.dev/valid-attachments": [{"containerID": "c", "ifname": "eth0"}]}`)}, "")
			n.must(t, "headcni-ipam", call{"CHECK", "c", "", cfg}, "/run/netns/none")
			if _, err := n.try(n.find(t, "headcni-ipam"), call{"CHECK", "b", "", cfg}, "/run/netns/none"); err == nil {
				t.Error("GC left b's lease")
			}
		})
	}
}

// TestManyUnderBridge: 300 pods come and go at once.
func TestManyUnderBridge(t *testing.T) {
	n := newNode(t)
	pods := 300
	if testing.Short() {
		pods = 60
	}
	// No IPv6: bridge itself gives up on 300 at once, whose duplicate detection takes longer than it waits.
	cfg := with(t, conf("1.1.0", t.TempDir(), `"subnet": "10.5.0.0/22", "strategy": "dense-pack"`, ""),
		`{"type": "bridge", "bridge": "br5", "isGateway": true}`)
	bridge := n.find(t, "bridge")
	var paths []string
	var everybody []int
	for i := range pods {
		everybody = append(everybody, i)
		paths = append(paths, nstest.New(t).Path)
	}
	all := func(command string, which []int, each func(i int, out string)) {
		t.Helper()
		var mu sync.Mutex
		var wg sync.WaitGroup
		var failed []error
		for _, i := range which {
			wg.Go(func() {
				out, err := n.try(bridge, call{command, fmt.Sprint("c", i), "", cfg}, paths[i])
				mu.Lock()
				defer mu.Unlock()
				if err != nil {
					failed = append(failed, err)
				} else {
					each(i, out)
				}
			})
		}
		wg.Wait()
		if len(failed) > 0 {
			t.Fatalf("%d of %d failed: %v", len(failed), pods, errors.Join(failed[:min(3, len(failed))]...))
		}
	}
	var given []netip.Addr
	of := map[int]netip.Addr{}
	all("ADD", everybody, func(i int, out string) {
		for _, ip := range parseResult(t, out).IPs {
			of[i] = netip.MustParsePrefix(ip.Address).Addr()
			given = append(given, of[i])
		}
	})
	slices.SortFunc(given, netip.Addr.Compare)
	if different := len(slices.Compact(slices.Clone(given))); different != pods {
		t.Errorf("%d pods were given %d addresses, %d of them different", pods, len(given), different)
	}
	if first, last := netip.MustParseAddr("10.5.0.2"), given[len(given)-1]; given[0] != first || last.As4()[2] != byte((pods+1)>>8) || last.As4()[3] != byte(pods+1) {
		t.Errorf("dense-pack gave %s to %s, with holes", given[0], last)
	}
	// The last that are freed of a block rest, so the lowest go first.
	low := slices.DeleteFunc(slices.Clone(everybody), func(i int) bool { return netip.MustParseAddr("10.5.0.64").Less(of[i]) })
	all("DEL", low, func(int, string) {})
	all("DEL", slices.DeleteFunc(everybody, func(i int) bool { return slices.Contains(low, i) }), func(int, string) {})
	if out := mustRun(t, call{"ADD", "late", "", cfg}); !strings.Contains(out, `"10.5.0.2/22"`) {
		t.Errorf("something is left: %s", out)
	}
}
