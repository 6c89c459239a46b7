package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/pkg/ipam"
)

func TestMain(m *testing.M) { nstest.Main(m) }

// binary builds the program as it ships, once.
var binary = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("/run", "headcni-test") // of nstest: it goes with the tests
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "headcni")
	cmd := exec.Command("go", "build", "-buildvcs=false", "-trimpath", "-ldflags=-s -w", "-o", path, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build: %w\n%s", err, out)
	}
	return path, nil
})

// node is a runtime on a node of its own.
type node struct {
	host    *nstest.NS
	bin     string
	cniPath string
	dataDir string
	wrap    []string // runs the plugin, whose path it gets as last argument
}

func newNode(t *testing.T) *node {
	nstest.Require(t)
	bin, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	n := &node{host: nstest.New(t), bin: bin, cniPath: filepath.Dir(bin), dataDir: t.TempDir()}
	for _, a := range []string{"192.0.2.1/32", "2001:db8::1/128"} {
		n.host.Run(t, "ip", "addr", "add", a, "dev", "lo")
	}
	return n
}

// conf is a network with the ranges given; keys are set in it.
func (n *node) conf(t *testing.T, keys string, subnets ...string) string {
	t.Helper()
	var ranges [][]map[string]string
	for _, s := range subnets {
		ranges = append(ranges, []map[string]string{{"subnet": s}})
	}
	conf := map[string]any{
		"cniVersion": "1.1.0", "name": "net", "type": "headcni",
		"ipam": map[string]any{"type": "headcni-ipam", "dataDir": n.dataDir, "ranges": ranges},
	}
	if keys != "" {
		if err := json.Unmarshal([]byte(keys), &conf); err != nil {
			t.Fatal(err)
		}
	}
	b, err := json.Marshal(conf)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// command prepares a call of the plugin as a runtime makes it.
func (n *node) command(verb, id, netns, conf string) (cmd *exec.Cmd, stdout, stderr *bytes.Buffer) {
	argv := append(slices.Clone(n.wrap), n.bin)
	cmd = n.host.Command(argv[0], argv[1:]...)
	cmd.Env = []string{
		"PATH=" + os.Getenv("PATH"), "CNI_COMMAND=" + verb, "CNI_CONTAINERID=" + id, "CNI_IFNAME=eth0", "CNI_PATH=" + n.cniPath,
		"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=pod-" + id,
	}
	if netns != "" {
		cmd.Env = append(cmd.Env, "CNI_NETNS="+netns)
	}
	stdout, stderr = &bytes.Buffer{}, &bytes.Buffer{}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(conf), stdout, stderr
	return cmd, stdout, stderr
}

// cniError is what a plugin prints when it fails.
type cniError struct {
	Code         uint
	Msg, Details string
}

func (e *cniError) Error() string { return fmt.Sprintf("%d: %s: %s", e.Code, e.Msg, e.Details) }

func (n *node) call(verb, id, netns, conf string) (string, error) {
	cmd, stdout, stderr := n.command(verb, id, netns, conf)
	err := cmd.Run()
	if err == nil {
		if stderr.Len() > 0 && !strings.Contains(stderr.String(), "interrupted ADD") {
			return "", fmt.Errorf("%s %s is silent no more: %s", verb, id, stderr)
		}
		return stdout.String(), nil
	}
	e := &cniError{}
	if jerr := json.Unmarshal(stdout.Bytes(), e); jerr != nil || e.Code == 0 || strings.Contains(e.Details, "\n") {
		return "", fmt.Errorf("%s %s: %w, and no proper error: %q, %q", verb, id, err, stdout, stderr)
	}
	return "", e
}

func (n *node) must(t *testing.T, verb, id, netns, conf string) string {
	t.Helper()
	out, err := n.call(verb, id, netns, conf)
	if err != nil {
		t.Fatalf("%s %s: %v", verb, id, err)
	}
	return out
}

func wantCode(t *testing.T, err error, code uint) {
	t.Helper()
	var e *cniError
	if !errors.As(err, &e) || e.Code != code {
		t.Errorf("got %v, want code %d", err, code)
	}
}

// result is what the tests read of one.
type result struct {
	CNIVersion string
	Interfaces []struct {
		Name, Mac, Sandbox string
		Mtu                int
	}
	IPs []struct {
		Address, Gateway string
		Interface        int
	}
	Routes []struct{ Dst, GW string }
	DNS    struct {
		Nameservers []string
		Domain      string
		Search      []string
	}
}

func parse(t *testing.T, out string) (r result) {
	t.Helper()
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		t.Fatalf("%v in %s", err, out)
	}
	return r
}

func (r result) addrs(t *testing.T) (list []netip.Addr) {
	t.Helper()
	for _, ip := range r.IPs {
		list = append(list, netip.MustParsePrefix(ip.Address).Addr())
	}
	return list
}

func (n *node) leases(t *testing.T) []ipam.Lease {
	t.Helper()
	p, err := ipam.Open(ipam.Config{Network: "net", DataDir: n.dataDir})
	if err != nil {
		t.Fatal(err)
	}
	l, err := p.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// links counts the pods' links on the node.
func (n *node) links(t *testing.T) int {
	t.Helper()
	return strings.Count(n.host.Run(t, "ip", "-o", "link", "show", "type", "veth"), ": hc")
}

func (n *node) empty(t *testing.T) {
	t.Helper()
	if l := n.leases(t); len(l) > 0 {
		t.Errorf("leases left: %+v", l)
	}
	if c := n.links(t); c > 0 {
		t.Errorf("%d links left", c)
	}
	for _, family := range []string{"-4", "-6"} {
		if out := n.host.Run(t, "ip", family, "route"); strings.Contains(out, "dev hc") {
			t.Errorf("routes left: %s", out)
		}
	}
}

func ping(t *testing.T, from *nstest.NS, to string) {
	t.Helper()
	from.Run(t, "ping", "-n", "-c", "1", "-W", "2", to)
}

func withPrevious(t *testing.T, conf, previous string) string {
	t.Helper()
	return strings.TrimSuffix(conf, "}") + `,"prevResult":` + previous + "}"
}

func TestPods(t *testing.T) {
	for name, subnets := range map[string][]string{
		"v4": {"10.244.1.0/24"}, "v6": {"fd00:244:1::/64"}, "dual": {"10.244.1.0/24", "fd00:244:1::/64"},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			conf := n.conf(t, "", subnets...)
			pods := map[string]*nstest.NS{"c1": nstest.New(t), "c2": nstest.New(t)}
			addrs, outs := map[string][]netip.Addr{}, map[string]string{}
			for _, id := range []string{"c1", "c2"} {
				outs[id] = n.must(t, "ADD", id, pods[id].Path, conf)
				addrs[id] = parse(t, outs[id]).addrs(t)
				// At once: the first packet must pass.
				for _, a := range addrs[id] {
					host := "192.0.2.1"
					if a.Is6() {
						host = "2001:db8::1"
					}
					ping(t, n.host, a.String())
					ping(t, pods[id], host)
				}
			}
			for _, pair := range [][2]string{{"c1", "c2"}, {"c2", "c1"}} {
				for _, a := range addrs[pair[1]] {
					ping(t, pods[pair[0]], a.String())
				}
			}
			n.must(t, "CHECK", "c1", pods["c1"].Path, withPrevious(t, conf, outs["c1"]))
			_, err := n.call("ADD", "c1", pods["c1"].Path, conf)
			wantCode(t, err, 104)
			n.must(t, "CHECK", "c1", pods["c1"].Path, withPrevious(t, conf, outs["c1"])) // the first one did not suffer
			pods["c1"].Run(t, "ip", "addr", "flush", "dev", "eth0")
			_, err = n.call("CHECK", "c1", pods["c1"].Path, withPrevious(t, conf, outs["c1"]))
			wantCode(t, err, 103)

			n.must(t, "DEL", "c1", pods["c1"].Path, withPrevious(t, conf, outs["c1"]))
			if out := pods["c1"].Run(t, "ip", "-o", "link"); strings.Contains(out, "eth0") {
				t.Errorf("DEL returned before the link was gone: %s", out)
			}
			n.must(t, "DEL", "c1", pods["c1"].Path, conf)
			n.must(t, "DEL", "c2", "", conf)
			n.must(t, "DEL", "c2", "/run/netns/none", conf)
			n.must(t, "DEL", "never", "", conf)
			n.empty(t)
		})
	}
}

// TestDelAfterTheSandbox: the namespace went with its last process, and the link with it.
func TestDelAfterTheSandbox(t *testing.T) {
	n := newNode(t)
	conf := n.conf(t, "", "10.244.1.0/24")
	pod := nstest.New(t)
	n.must(t, "ADD", "c1", pod.Path, conf)
	pod.Handle.Close() // it keeps the namespace alive
	if out, err := exec.Command("umount", pod.Path).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	n.must(t, "DEL", "c1", pod.Path, conf)
	n.empty(t)
}

// TestSpecificationExample takes the specification's example word for word, with the reference IPAM plugin.
func TestSpecificationExample(t *testing.T) {
	n := newNode(t)
	n.referencePlugins(t)
	conf, err := os.ReadFile("../../pkg/config/netconf/testdata/specification.conf")
	if err != nil {
		t.Fatal(err)
	}
	// host-local keeps its leases in /var/lib/cni, and the example does not say otherwise.
	varLib := t.TempDir()
	n.wrap = []string{"unshare", "--mount", "sh", "-c", `mount --bind "$0" /var/lib && exec "$1"`, varLib}
	pod := nstest.New(t)
	out := n.must(t, "ADD", "c1", pod.Path, string(conf))
	got := parse(t, out)
	if len(got.IPs) != 1 || got.IPs[0].Address != "10.244.0.10/32" || got.IPs[0].Gateway != "10.244.0.1" || got.CNIVersion != "1.0.0" {
		t.Errorf("ips: %+v", got.IPs)
	}
	if got.DNS.Domain != "cluster.local" || !slices.Equal(got.DNS.Nameservers, []string{"10.2.0.1"}) || !slices.Equal(got.DNS.Search, []string{"c.binrc.com"}) {
		t.Errorf("dns: %+v", got.DNS)
	}
	if route := pod.Run(t, "ip", "route"); !strings.Contains(route, "default via 10.244.0.1 dev eth0") {
		t.Errorf("routes: %s", route)
	}
	if link := pod.Run(t, "ip", "link", "show", "dev", "eth0"); !strings.Contains(link, "mtu 1280") {
		t.Errorf("link: %s", link)
	}
	ping(t, n.host, "10.244.0.10")
	ping(t, pod, "192.0.2.1")
	n.must(t, "CHECK", "c1", pod.Path, withPrevious(t, strings.TrimSpace(string(conf)), out))
	n.must(t, "DEL", "c1", pod.Path, string(conf))
	n.must(t, "DEL", "c1", "", string(conf))
	n.empty(t)
	if left, err := filepath.Glob(filepath.Join(varLib, "cni/networks/tailscale-cni/10.*")); err != nil || len(left) > 0 {
		t.Errorf("host-local keeps %v, %v", left, err)
	}
}

// referencePlugins adds the CNI project's own plugins to CNI_PATH.
func (n *node) referencePlugins(t *testing.T) {
	t.Helper()
	dirs := os.Getenv("HEADCNI_TOOLS")
	if dirs == "" {
		out, err := exec.Command("../../test/tools/ensure", "cni-plugins").Output()
		if err != nil {
			nstest.Skip(t, fmt.Sprintf("no reference plugins: test/tools/ensure cni-plugins: %v", err))
		}
		dirs = strings.TrimSpace(string(out))
	}
	n.cniPath += ":" + dirs
	for _, dir := range filepath.SplitList(n.cniPath) {
		if _, err := os.Stat(filepath.Join(dir, "host-local")); err == nil {
			return
		}
	}
	nstest.Skip(t, "no host-local in "+n.cniPath)
}

func TestHostLocal(t *testing.T) {
	n := newNode(t)
	n.referencePlugins(t)
	keys := fmt.Sprintf(`{"ipam":{"type":"host-local","dataDir":%q,"ranges":[[{"subnet":"10.244.1.0/29"}],[{"subnet":"fd00:244:1::/64"}]],
		"routes":[{"dst":"0.0.0.0/0"},{"dst":"::/0"}]},"cni.dev/valid-attachments":[]}`, n.dataDir)
	conf := n.conf(t, keys)
	pod := nstest.New(t)
	out := n.must(t, "ADD", "c1", pod.Path, conf)
	for _, a := range parse(t, out).addrs(t) {
		ping(t, n.host, a.String())
	}
	n.must(t, "CHECK", "c1", pod.Path, withPrevious(t, conf, out))
	n.must(t, "STATUS", "", "", conf)
	for i := 2; i < 6; i++ { // 10.244.1.3 to .6
		n.must(t, "ADD", fmt.Sprintf("c%d", i), nstest.New(t).Path, conf)
	}
	_, err := n.call("ADD", "c6", nstest.New(t).Path, conf)
	if err == nil || !strings.Contains(err.Error(), "no IP addresses available") {
		t.Errorf("a full pool: %v", err)
	}
	n.must(t, "DEL", "c1", "", conf)
	n.must(t, "GC", "", "", conf) // host-local takes GC and does nothing: the addresses of the others go with their DEL
	if c := n.links(t); c > 0 {
		t.Errorf("%d links left", c)
	}
	for i := 2; i < 6; i++ {
		n.must(t, "DEL", fmt.Sprintf("c%d", i), "", conf)
	}
	if left, err := filepath.Glob(filepath.Join(n.dataDir, "net", "10.*")); err != nil || len(left) > 0 {
		t.Errorf("host-local keeps %v, %v", left, err)
	}
}

// TestAddressesOfAnotherNetwork: two networks have one subnet, as when a network is renamed, or its IPAM plugin changed,
// while pods run. No address comes twice, and the pods of one network do not keep the other's from starting.
func TestAddressesOfAnotherNetwork(t *testing.T) {
	for _, strategy := range []string{"sequential", "random", "dense-pack"} {
		t.Run(strategy, func(t *testing.T) {
			n := newNode(t)
			n.referencePlugins(t)
			conf := func(name, ipamType string) string {
				return n.conf(t, fmt.Sprintf(`{"name":%q,"ipam":{"type":%q,"dataDir":%q,"ranges":[[{"subnet":"10.244.1.0/28"}],[{"subnet":"fd00:244:1::/124"}]]}}`,
					name, ipamType, filepath.Join(n.dataDir, name)))
			}
			now := strings.Replace(conf("new", "headcni-ipam"), `"dataDir"`, fmt.Sprintf(`"strategy":%q,"dataDir"`, strategy), 1)
			seen := map[netip.Addr]bool{}
			for i := range 13 { // all that a /28 has
				of := now
				switch {
				case i < 3:
					of = conf("hostlocal", "host-local")
				case i < 6:
					of = conf("old", "headcni-ipam")
				}
				out := n.must(t, "ADD", fmt.Sprint("c", i), nstest.New(t).Path, of)
				for _, a := range parse(t, out).addrs(t) {
					if seen[a] {
						t.Errorf("%s was given twice", a)
					}
					seen[a] = true
				}
			}
		})
	}
}

// TestKilledAdd kills ADD at many moments. The DEL that a runtime sends then leaves nothing, and so does an ADD that is
// tried again before.
func TestKilledAdd(t *testing.T) {
	n := newNode(t)
	conf := n.conf(t, "", "10.244.1.0/24", "fd00:244:1::/64")
	pod := nstest.New(t)
	rounds, killed, half := 150, 0, 0
	if testing.Short() {
		rounds = 30
	}
	span := time.Hour
	for range 5 { // on a busy machine one may take many times as long as the next
		whole := time.Now()
		n.must(t, "ADD", "warm", pod.Path, conf)
		span = min(span, time.Since(whole))
		n.must(t, "DEL", "warm", pod.Path, conf)
	}
	for i := range rounds {
		id := fmt.Sprintf("k%d", i)
		if n.killed(t, "ADD", id, pod.Path, conf, rand.N(span)) {
			killed++
		}
		if len(n.leases(t)) > 0 || n.links(t) > 0 {
			half++
		}
		if i%3 == 0 && !strings.Contains(pod.Run(t, "ip", "-o", "link"), "eth0") {
			n.must(t, "ADD", id, pod.Path, conf)
		}
		n.must(t, "DEL", id, pod.Path, conf)
		n.empty(t)
		if out := pod.Run(t, "ip", "-o", "link"); strings.Contains(out, "eth0") {
			t.Fatalf("round %d: the pod keeps %s", i, out)
		}
	}
	t.Logf("%d of %d killed, %d with something done", killed, rounds, half)
	if killed < rounds/5 || half < rounds/20 {
		t.Errorf("the test killed too early or too late: %d of %d killed, %d with something done", killed, rounds, half)
	}
}

// TestKilledAddOfADelegate: the IPAM plugin that runs when ADD is killed lives on. The DEL that a runtime then sends must
// come after it, or what it takes stays taken.
func TestKilledAddOfADelegate(t *testing.T) {
	n := newNode(t)
	script := `#!/bin/sh
cd $(dirname $0)
case $CNI_COMMAND in
ADD) touch at-work; sleep 0.3; touch lease; echo '{"ips": [{"address": "10.244.1.5/24"}]}' ;;
DEL) rm -f lease ;;
esac
`
	if err := os.WriteFile(filepath.Join(n.dataDir, "slow-ipam"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	n.cniPath = n.dataDir
	conf := n.conf(t, `{"ipam":{"type":"slow-ipam"}}`)
	add, _, _ := n.command("ADD", "c1", nstest.New(t).Path, conf)
	if err := add.Start(); err != nil {
		t.Fatal(err)
	}
	exists := func(name string) bool { _, err := os.Stat(filepath.Join(n.dataDir, name)); return err == nil }
	for end := time.Now().Add(5 * time.Second); !exists("at-work"); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the IPAM plugin did not run")
		}
	}
	_ = add.Process.Kill()
	if add.Wait() == nil {
		t.Fatal("ADD was not killed")
	}
	n.must(t, "DEL", "c1", "", conf)
	time.Sleep(400 * time.Millisecond)
	if exists("lease") {
		t.Error("the address stays taken")
	}
}

func TestKilledDel(t *testing.T) {
	n := newNode(t)
	conf := n.conf(t, "", "10.244.1.0/24")
	pod := nstest.New(t)
	rounds := 40
	if testing.Short() {
		rounds = 10
	}
	for i := range rounds {
		id := fmt.Sprintf("k%d", i)
		n.must(t, "ADD", id, pod.Path, conf)
		n.killed(t, "DEL", id, pod.Path, conf, rand.N(30*time.Millisecond))
		n.must(t, "DEL", id, "", conf)
		n.empty(t)
	}
}

// killed runs a command and kills it after d. It reports whether it was killed before it had ended.
func (n *node) killed(t *testing.T, verb, id, netns, conf string, d time.Duration) bool {
	t.Helper()
	cmd, _, _ := n.command(verb, id, netns, conf)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(d)
	_ = cmd.Process.Kill() // it may have ended
	err := cmd.Wait()
	return err != nil
}

func TestConcurrent(t *testing.T) {
	n := newNode(t)
	conf := n.conf(t, "", "10.244.0.0/22", "fd00:244:1::/64")
	const pods = 100
	paths := make([]string, pods)
	for i := range paths {
		paths[i] = nstest.New(t).Path
	}
	all := func(verb string, each func(i int, out string)) {
		t.Helper()
		var wg sync.WaitGroup
		var mu sync.Mutex
		for i := range pods {
			wg.Go(func() {
				out, err := n.call(verb, fmt.Sprintf("c%d", i), paths[i], conf)
				mu.Lock()
				defer mu.Unlock()
				if err != nil {
					t.Errorf("%s c%d: %v", verb, i, err)
				} else if each != nil {
					each(i, out)
				}
			})
		}
		wg.Wait()
	}
	given := map[netip.Addr]int{}
	all("ADD", func(i int, out string) {
		for _, a := range parse(t, out).addrs(t) {
			if other, taken := given[a]; taken {
				t.Errorf("%s for c%d and c%d", a, i, other)
			}
			given[a] = i
		}
	})
	if len(given) != 2*pods || n.links(t) != pods || len(n.leases(t)) != pods {
		t.Errorf("%d addresses, %d links, %d leases", len(given), n.links(t), len(n.leases(t)))
	}
	all("DEL", nil)
	n.empty(t)
}

func TestGC(t *testing.T) {
	n := newNode(t)
	conf := n.conf(t, "", "10.244.1.0/24")
	for _, id := range []string{"c1", "c2"} {
		n.must(t, "ADD", id, nstest.New(t).Path, conf)
	}
	n.must(t, "GC", "", "", n.conf(t, `{"cni.dev/valid-attachments":[{"containerID":"c2","ifname":"eth0"}]}`, "10.244.1.0/24"))
	if l := n.leases(t); len(l) != 1 || l[0].ContainerID != "c2" || n.links(t) != 1 {
		t.Errorf("leases %+v, %d links", l, n.links(t))
	}
	n.must(t, "DEL", "c2", "", conf)
	n.empty(t)
}

func TestGateAndStatus(t *testing.T) {
	n := newNode(t)
	conf := n.conf(t, `{"gate":{"podCIDRs":["10.244.1.0/24"]}}`, "10.244.1.0/24")
	pod := nstest.New(t)
	n.host.Run(t, "ip", "route", "add", "default", "dev", "lo")
	_, err := n.call("ADD", "c1", pod.Path, conf)
	wantCode(t, err, 11)
	_, err = n.call("STATUS", "", "", conf)
	wantCode(t, err, 50)
	n.must(t, "ADD", "c2", pod.Path, n.conf(t, "", "10.244.1.0/24")) // as it was before the rules went
	_, err = n.call("STATUS", "", "", conf)
	wantCode(t, err, 51)
	n.must(t, "DEL", "c2", pod.Path, conf)
	if _, err := exec.LookPath("nft"); err != nil {
		nstest.Skip(t, "nft is not installed (Debian package nftables)")
	}
	n.host.Run(t, "ip", "route", "add", "unreachable", "10.244.1.0/24")
	for _, family := range []string{"ip", "ip6"} {
		n.host.Run(t, "nft", fmt.Sprintf("add table %s headcni; add chain %[1]s headcni guard; add rule %[1]s headcni guard drop", family))
	}
	n.must(t, "STATUS", "", "", conf)
	n.must(t, "ADD", "c1", pod.Path, conf)
	n.must(t, "DEL", "c1", pod.Path, conf)
	n.empty(t)
}

// TestBadInput: every failure is one well-formed error, with nothing done.
func TestBadInput(t *testing.T) {
	n := newNode(t)
	pod := nstest.New(t)
	good := n.conf(t, "", "10.244.1.0/24")
	for _, tt := range []struct {
		verb, id, netns, conf string
		code                  uint
	}{
		{"ADD", "c1", pod.Path, "", 6}, {"ADD", "c1", pod.Path, "[]", 6}, {"ADD", "c1", pod.Path, `{"cniVersion":"1.1.0"}`, 7},
		{"ADD", "c1", pod.Path, n.conf(t, `{"mut":1}`, "10.244.1.0/24"), 2},
		{"ADD", "c1", pod.Path, n.conf(t, `{"cniVersion":"2.0.0"}`, "10.244.1.0/24"), 1},
		{"ADD", "c1", pod.Path, n.conf(t, "", "100.64.1.0/24"), 7},
		{"ADD", "c1", pod.Path, n.conf(t, `{"ipam":{"type":"nowhere"}}`), 100},
		{"ADD", "c1", "", good, 4}, {"ADD", "-", pod.Path, good, 4}, {"FETCH", "c1", pod.Path, good, 4},
		{"ADD", "c1", "/run/netns/none", good, 8}, {"ADD", "c1", "/proc/self/ns/mnt", good, 8},
		{"ADD", "c1", "/etc/passwd", good, 8}, {"ADD", "c1", n.host.Path, good, 8},
		{"ADD", "c1", pod.Path, n.conf(t, `{"prevResult":{"cniVersion":"1.1.0","interfaces":[{"name":"net1"}],"ips":[{"interface":1,"address":"192.0.2.7/24"}]}}`, "10.244.1.0/24"), 7},
		{"CHECK", "c1", pod.Path, good, 7}, {"GC", "", "", good, 7},
	} {
		_, err := n.call(tt.verb, tt.id, tt.netns, tt.conf)
		var e *cniError
		if !errors.As(err, &e) || e.Code != tt.code {
			t.Errorf("%s %q %s %.60s: got %v, want code %d", tt.verb, tt.id, tt.netns, tt.conf, err, tt.code)
		}
	}
	n.empty(t)
}

func TestVersion(t *testing.T) {
	n := newNode(t)
	out := n.must(t, "VERSION", "", "", `{"cniVersion":"1.0.0"}`)
	var v struct{ SupportedVersions []string }
	if err := json.Unmarshal([]byte(out), &v); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"}, v.SupportedVersions); diff != "" {
		t.Error(diff)
	}
}

// TestLean: what makes a program slow to start stays out.
func TestLean(t *testing.T) {
	out, err := exec.Command("go", "list", "-buildvcs=false", "-deps", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, dep := range strings.Fields(string(out)) {
		for _, heavy := range []string{"net/http", "crypto/tls", "k8s.io/", "tailscale.com", "github.com/prometheus/", "go.opentelemetry.io/", "sigs.k8s.io/"} {
			if dep == heavy || strings.HasSuffix(heavy, "/") && strings.HasPrefix(dep, heavy) || strings.HasPrefix(dep, heavy+"/") {
				t.Errorf("the plugin links %s", dep)
			}
		}
	}
	nstest.Require(t)
	bin, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(bin)
	if err != nil {
		t.Fatal(err)
	}
	const limit = 5 << 20
	t.Logf("%d KiB", info.Size()>>10)
	if info.Size() > limit {
		t.Errorf("%d bytes, more than %d", info.Size(), limit)
	}
}
