package plugin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"

	"github.com/headcni/headcni/internal/cnimain"
	"github.com/headcni/headcni/internal/golden"
	"github.com/headcni/headcni/internal/jsonobj"
	"github.com/headcni/headcni/pkg/cmdlog"
	"github.com/headcni/headcni/pkg/config/netconf"
	"github.com/headcni/headcni/pkg/ipam"
	"github.com/headcni/headcni/pkg/networking/podlink"
)

// fakeKernel holds links in memory. fail names the calls that fail.
type fakeKernel struct {
	links map[string]podlink.Pod // by link name
	fail  map[string]error
	live  []podlink.LivePod
	inUse map[netip.Addr]bool
}

func (k *fakeKernel) OpenVacant(_, _ string) (*podlink.Netns, error) { return nil, k.fail["vacant"] }

func (k *fakeKernel) Attach(_ *slog.Logger, _ *podlink.Netns, pod podlink.Pod) (podlink.Pair, error) {
	name := podlink.Name(pod.ContainerID, pod.IfName)
	k.links[name] = pod
	if err := k.fail["attach"]; err != nil {
		return podlink.Pair{}, err // half-way: the link is there
	}
	mac := pod.MAC
	if mac == nil {
		mac = net.HardwareAddr{2, 0, 0, 0, 0, 2}
	}
	return podlink.Pair{
		HostName: name, HostMAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}, PodMAC: mac, HostMTU: 1280, PodMTU: 1280,
	}, nil
}

func (k *fakeKernel) Detach(containerID, ifName, _ string) (removed bool, err error) {
	if err := k.fail["detach"]; err != nil {
		return false, err
	}
	name := podlink.Name(containerID, ifName)
	_, removed = k.links[name]
	delete(k.links, name)
	return removed, nil
}

func (k *fakeKernel) There(name string) bool { _, there := k.links[name]; return there }

func (k *fakeKernel) Check(podlink.State) error       { return k.fail["check"] }
func (k *fakeKernel) Gate([]netip.Prefix, bool) error { return k.fail["gate"] }
func (k *fakeKernel) HasPods() bool                   { return len(k.links) > 0 }

func (k *fakeKernel) InUse(a netip.Addr) bool { return k.inUse[a] }

func (k *fakeKernel) Live(string) ([]podlink.LivePod, error) { return k.live, nil }

func (k *fakeKernel) Sweep(_ string, keep func(string) bool) (left []string, err error) {
	if err := k.fail["list"]; err != nil {
		return nil, err
	}
	for name := range k.links {
		if keep(name) {
			continue
		}
		if k.fail["sweep"] != nil {
			left, err = append(left, name), k.fail["sweep"]
		} else {
			delete(k.links, name)
		}
	}
	return left, err
}

// bench is a plugin on a fake kernel and a real address pool.
type bench struct {
	*Plugin
	kernel  *fakeKernel
	dir     string
	out     *bytes.Buffer
	log     *bytes.Buffer
	records []cmdlog.Record
}

func newBench(t *testing.T) *bench {
	k := &fakeKernel{links: map[string]podlink.Pod{}, fail: map[string]error{}}
	b := &bench{kernel: k, dir: t.TempDir(), out: &bytes.Buffer{}, log: &bytes.Buffer{}}
	b.Plugin = &Plugin{
		Links: k, Node: k, ChooseIPAM: chooseIPAM(k, k), Stdout: b.out, Stderr: b.log, Start: time.Now(),
		Record: func(_ string, r cmdlog.Record) error {
			b.records = append(b.records, r)
			return errors.New("no daemon")
		},
	}
	return b
}

// args makes a command for container id. keys are set in the configuration.
func (b *bench) args(t *testing.T, id, keys string) cnimain.Call {
	t.Helper()
	conf := map[string]json.RawMessage{}
	base := fmt.Sprintf(`{"cniVersion":"1.1.0","name":"n","type":"headcni","ipam":{"type":"headcni-ipam","dataDir":%q,
		"ranges":[[{"subnet":"10.244.1.0/30"}],[{"subnet":"fd00:244:1::/64"}]]},"gate":{"podCIDRs":["10.244.1.0/24","fd00:244:1::/64"]}}`, b.dir)
	for _, s := range []string{base, keys} {
		if s == "" {
			continue
		}
		if err := json.Unmarshal([]byte(s), &conf); err != nil {
			t.Fatalf("%s: %v", s, err)
		}
	}
	stdin, err := json.Marshal(conf)
	if err != nil {
		t.Fatal(err)
	}
	taken, err := jsonobj.Parse(stdin)
	if err != nil {
		t.Fatal(err)
	}
	return cnimain.Call{ContainerID: id, IfName: "eth0", Netns: "/run/netns/x", Stdin: stdin, Config: taken,
		Args: "IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=web;K8S_POD_INFRA_CONTAINER_ID=" + id}
}

func (b *bench) leases(t *testing.T) []ipam.Lease {
	t.Helper()
	p, err := ipam.Open(ipam.Config{Network: "n", DataDir: b.dir})
	if err != nil {
		t.Fatal(err)
	}
	l, err := p.List(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func (b *bench) empty(t *testing.T) {
	t.Helper()
	if l := b.leases(t); len(l) > 0 || len(b.kernel.links) > 0 {
		t.Errorf("left behind: leases %v, links %v", l, b.kernel.links)
	}
}

// fails asserts a CNI error and returns its text.
func fails(t *testing.T, err error, code uint) string {
	t.Helper()
	var e *types.Error
	if !errors.As(err, &e) {
		t.Fatalf("got %v, want a CNI error", err)
	}
	if e.Code != code {
		t.Errorf("code %d, want %d: %v", e.Code, code, e)
	}
	if strings.Contains(e.Error(), "\n") {
		t.Errorf("more than a line: %v", e)
	}
	return e.Error()
}

var bg = context.Background()

func TestAddAndDel(t *testing.T) {
	b := newBench(t)
	if err := b.Add(bg, b.args(t, "c1", "")); err != nil {
		t.Fatal(err)
	}
	leases := b.leases(t)
	if len(leases) != 1 || leases[0].Writer != ipam.InProcess || leases[0].PodName != "web" {
		t.Errorf("leases: %+v", leases)
	}
	if h := b.records[0]; h.Command != "ADD" || h.ErrorCode != 0 || len(h.Addrs) != 2 || h.PodName != "web" || h.HostIfName == "" || h.Duration <= 0 {
		t.Errorf("record: %+v", h)
	}
	for range 2 {
		a := b.args(t, "c1", "")
		a.Netns = ""
		if err := b.Del(bg, a); err != nil {
			t.Fatal(err)
		}
		b.empty(t)
	}
	// The daemon counts what was given back; the second DEL gave nothing.
	if first, second := b.records[1], b.records[2]; first.Command != "DEL" || len(first.Addrs) != 2 || len(second.Addrs) != 0 || second.ErrorCode != 0 {
		t.Errorf("records: %+v, %+v", first, second)
	}
	if b.log.Len() > 0 {
		t.Errorf("steady state logs: %s", b.log)
	}
}

// TestAddFailsAtEachStep: the code tells what failed, and nothing is left behind.
func TestAddFailsAtEachStep(t *testing.T) {
	boom := errors.New("boom")
	for _, tt := range []struct {
		name, keys string
		prepare    func(*bench)
		code       uint
		stage      string
		want       string
	}{
		{"unknown key", `{"mut":1}`, nil, 2, "config", "mut: unknown key (value 1)"},
		{"config", `{"mut":1,"mtu":1}`, nil, 7, "config", "mut: unknown key"},
		{"unknown ipam key", `{"ipam":{"type":"headcni-ipam","strategie":"x"}}`, nil, 2, "config", `strategie: unknown key (value "x")`},
		{"ipam config", `{"ipam":{"type":"headcni-ipam","strategy":"x"}}`, nil, 7, "config", "strategy"},
		{"both", `{"mut":1,"ipam":{"type":"headcni-ipam","strategy":"x"}}`, nil, 7, "config", "strategy"},
		{"gate", "", func(b *bench) { b.kernel.fail["gate"] = podlink.ErrNotProgrammed }, 11, "gate", "not programmed"},
		{"netns", "", func(b *bench) { b.kernel.fail["vacant"] = podlink.ErrNetns }, 8, "netns", "namespace"},
		{"interface exists", "", func(b *bench) { b.kernel.fail["vacant"] = podlink.ErrLinkExists }, CodeInterfaceExists, "netns", "exists"},
		{"address", `{"runtimeConfig":{"ips":["10.9.9.9"]}}`, nil, CodeAddress, "ipam", "10.9.9.9"},
		{"no IPv6", `{"enable_ipv6":true,"ipam":{"type":"headcni-ipam","subnet":"10.244.1.0/24"}}`, nil, 7, "config", "enable_ipv6"},
		{"attach", "", func(b *bench) { b.kernel.fail["attach"] = boom }, CodeAttach, "attach", "boom"},
		{"IPv6 off", "", func(b *bench) { b.kernel.fail["attach"] = podlink.ErrNoIPv6 }, CodeNoIPv6, "attach", "IPv6"},
		{"netns gone", "", func(b *bench) { b.kernel.fail["attach"] = podlink.ErrNetns }, 8, "attach", "namespace"},
		{"result", "", func(b *bench) { b.Stdout = brokenPipe{} }, 5, "result", "broken pipe"},
		{"prevResult", `{"prevResult":{"cniVersion":"9.9.9"}}`, nil, 7, "config", "prevResult"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBench(t)
			if tt.prepare != nil {
				tt.prepare(b)
			}
			if text := fails(t, b.Add(bg, b.args(t, "c1", tt.keys)), tt.code); !strings.Contains(text, tt.want) {
				t.Errorf("got %q, want %q in it", text, tt.want)
			}
			if h := b.records[0]; h.ErrorCode != tt.code || h.Stage != tt.stage {
				t.Errorf("record: code %d stage %q, want %d %q", h.ErrorCode, h.Stage, tt.code, tt.stage)
			}
			b.empty(t)
		})
	}
}

type brokenPipe struct{}

func (brokenPipe) Write([]byte) (int, error) { return 0, errors.New("broken pipe") }

func TestUndoThatFailsKeepsTheAddress(t *testing.T) {
	b := newBench(t)
	b.kernel.fail["attach"], b.kernel.fail["detach"] = errors.New("boom"), errors.New("stuck")
	text := fails(t, b.Add(bg, b.args(t, "c1", "")), CodeAttach)
	if !strings.Contains(text, "boom") || !strings.Contains(text, "stuck") {
		t.Errorf("got %q", text)
	}
	if len(b.leases(t)) != 1 {
		t.Error("the address is free while the link may be there")
	}
}

func TestDelThatCannotDetachKeepsTheAddress(t *testing.T) {
	b := newBench(t)
	if err := b.Add(bg, b.args(t, "c1", "")); err != nil {
		t.Fatal(err)
	}
	b.kernel.fail["detach"] = errors.New("stuck")
	fails(t, b.Del(bg, b.args(t, "c1", "")), CodeDetach)
	if len(b.leases(t)) != 1 {
		t.Error("the address is free while the link is there")
	}
	b.kernel.fail["detach"] = nil
	if err := b.Del(bg, b.args(t, "c1", "")); err != nil {
		t.Fatal(err)
	}
	b.empty(t)
}

// TestDelOfWhatCannotBeAdded: the configuration may have become wrong since ADD.
func TestDelIsLenient(t *testing.T) {
	for _, keys := range []string{
		`{"mut":1}`, `{"mtu":"x"}`, `{"pod_cidr":"10.9.0.0/16"}`, `{"gate":{}}`,
		`{"ipam":{"type":"headcni-ipam","dataDir":"DIR","rangeStart":"junk"}}`,
	} {
		b := newBench(t)
		if err := b.Add(bg, b.args(t, "c1", "")); err != nil {
			t.Fatal(err)
		}
		a := b.args(t, "c1", strings.ReplaceAll(keys, "DIR", b.dir))
		a.Args = "junk;IP=junk"
		if err := b.Del(bg, a); err != nil {
			t.Errorf("%s: %v", keys, err)
		}
		b.empty(t)
	}
}

// TestPatternAsName: the kernel would choose another name than the one asked for.
func TestPatternAsName(t *testing.T) {
	b := newBench(t)
	a := b.args(t, "c1", "")
	a.IfName = "eth%d"
	if text := fails(t, b.Add(bg, a), 4); !strings.Contains(text, "CNI_IFNAME") {
		t.Errorf("got %q", text)
	}
	b.empty(t)
	if err := b.Del(bg, a); err != nil {
		t.Error(err)
	}
}

func TestSecondAddTouchesNothing(t *testing.T) {
	b := newBench(t)
	if err := b.Add(bg, b.args(t, "c1", "")); err != nil {
		t.Fatal(err)
	}
	before := b.leases(t)
	b.kernel.fail["vacant"] = podlink.ErrLinkExists
	fails(t, b.Add(bg, b.args(t, "c1", "")), CodeInterfaceExists)
	if diff := cmp.Diff(len(before), len(b.leases(t))); diff != "" || len(b.kernel.links) != 1 {
		t.Errorf("the first attachment suffered: %s, links %v", diff, b.kernel.links)
	}
}

func TestLeaseOfAnInterruptedAddIsReplaced(t *testing.T) {
	b := newBench(t)
	if err := b.Add(bg, b.args(t, "c1", "")); err != nil {
		t.Fatal(err)
	}
	if err := b.Add(bg, b.args(t, "c1", "")); err != nil { // the pod has no interface: the first one was killed
		t.Fatal(err)
	}
	if l := b.leases(t); len(l) != 1 || len(b.kernel.links) != 1 {
		t.Errorf("leases %v, links %v", l, b.kernel.links)
	}
}

// TestLock: what another command on the attachment is about is not touched by ADD. DEL has to delete all the same.
func TestLock(t *testing.T) {
	b := newBench(t)
	if err := b.Add(bg, b.args(t, "c1", "")); err != nil {
		t.Fatal(err)
	}
	other := &Request{ContainerID: "c1", IfName: "eth0"}
	if err := other.lock(bg); err != nil {
		t.Fatal(err)
	}
	defer other.unlock()
	soon, cancel := context.WithTimeout(bg, 20*time.Millisecond)
	defer cancel()
	fails(t, b.Add(soon, b.args(t, "c1", "")), types.ErrTryAgainLater)
	if len(b.leases(t)) != 1 || len(b.kernel.links) != 1 {
		t.Errorf("the other's are gone: leases %v, links %v", b.leases(t), b.kernel.links)
	}
	if err := b.Add(soon, b.args(t, "c2", `{"ipam":{"type":"headcni-ipam","dataDir":"`+b.dir+`","subnet":"10.244.1.0/24"}}`)); err != nil {
		t.Errorf("another attachment: %v", err)
	}
	if err := errors.Join(b.Del(soon, b.args(t, "c1", "")), b.Del(bg, b.args(t, "c2", ""))); err != nil {
		t.Fatal(err)
	}
	b.empty(t)
	other.unlock()
	if err := b.Add(soon, b.args(t, "c1", "")); err != nil {
		t.Errorf("the other has ended: %v", err)
	}
}

func TestPoolExhausted(t *testing.T) {
	b := newBench(t)
	if err := b.Add(bg, b.args(t, "c1", "")); err != nil { // a /30 has one address for pods
		t.Fatal(err)
	}
	if text := fails(t, b.Add(bg, b.args(t, "c2", "")), CodeAddress); !strings.Contains(text, "no address is free") {
		t.Errorf("got %q", text)
	}
	if l := b.leases(t); len(l) != 1 || l[0].ContainerID != "c1" {
		t.Errorf("leases %v", l)
	}
}

func TestCorruptStoreIsRebuiltFromTheLinks(t *testing.T) {
	b := newBench(t)
	wide := fmt.Sprintf(`{"ipam":{"type":"headcni-ipam","dataDir":%q,"subnet":"10.244.1.0/24"}}`, b.dir)
	if err := b.Add(bg, b.args(t, "c1", wide)); err != nil {
		t.Fatal(err)
	}
	first := b.leases(t)[0].Addrs[0].Addr
	b.kernel.live = []podlink.LivePod{{ContainerID: "c1", IfName: "eth0", Label: "ns/web", Addrs: []netip.Addr{first.Addr()}}}
	spoilStore(t, b.dir)
	if err := b.Add(bg, b.args(t, "c2", wide)); err != nil {
		t.Fatal(err)
	}
	l := b.leases(t)
	if len(l) != 2 || l[0].Addrs[0].Addr == l[1].Addrs[0].Addr || l[0].Addrs[0].Addr != first || l[0].PodName != "web" {
		t.Errorf("leases %+v, want c1 with %s and another", l, first)
	}
	if !strings.Contains(b.log.String(), "corrupt") {
		t.Errorf("not said: %s", b.log)
	}
}

// spoilStore damages the layout of the store beyond what a killed writer can.
func spoilStore(t *testing.T, dir string) {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(dir, "n", "*", "index"))
	if err != nil || len(found) != 1 {
		t.Fatalf("no store in %s: %v, %v", dir, found, err)
	}
	if err := errors.Join(os.RemoveAll(found[0]), os.WriteFile(found[0], []byte("junk"), 0o600)); err != nil {
		t.Fatal(err)
	}
}

func TestResultVersions(t *testing.T) {
	for _, version := range []string{"0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		t.Run(version, func(t *testing.T) {
			b := newBench(t)
			keys := fmt.Sprintf(`{"cniVersion":%q,"magic_dns":{"enable":true,"base_domain":"cluster.local","nameservers":["10.2.0.1"]},
				"ipam":{"type":"headcni-ipam","dataDir":%q,"ranges":[[{"subnet":"10.244.1.0/24","gateway":"10.244.1.254"}],[{"subnet":"fd00:244:1::/64"}]],
				"routes":[{"dst":"0.0.0.0/0","mtu":1200,"advmss":1160,"priority":5}]}}`, version, b.dir)
			if err := b.Add(bg, b.args(t, "c1", keys)); err != nil {
				t.Fatal(err)
			}
			goldenResult(t, "result-"+version+".json", b.out.Bytes())
		})
	}
}

// goldenResult compares a result, set out for people, with a file.
func goldenResult(t *testing.T, name string, result []byte) {
	t.Helper()
	var indented bytes.Buffer
	if err := json.Indent(&indented, bytes.TrimSpace(result), "", "  "); err != nil {
		t.Fatal(err)
	}
	golden.Check(t, "testdata/"+name, indented.String()+"\n")
}

func TestChained(t *testing.T) {
	b := newBench(t)
	keys := `{"prevResult":{"cniVersion":"1.1.0","interfaces":[{"name":"net1","sandbox":"/run/netns/x","mac":"02:00:00:00:00:aa"}],
		"ips":[{"address":"192.0.2.9/24","interface":0}],"routes":[{"dst":"192.0.2.0/24"}],"dns":{"nameservers":["192.0.2.53"]}}}`
	if err := b.Add(bg, b.args(t, "c1", keys)); err != nil {
		t.Fatal(err)
	}
	goldenResult(t, "chained.json", b.out.Bytes())
}

func TestRequested(t *testing.T) {
	b := newBench(t)
	wide := fmt.Sprintf(`{"ipam":{"type":"headcni-ipam","dataDir":%q,"ranges":[[{"subnet":"10.244.1.0/24"}],[{"subnet":"fd00:244:1::/64"}]]},
		"runtimeConfig":{"mac":"02:00:00:00:00:77"}}`, b.dir)
	a := b.args(t, "c1", wide)
	a.Args = "IP=10.244.1.77,fd00:244:1::77;MAC=02:00:00:00:00:66"
	if err := b.Add(bg, a); err != nil {
		t.Fatal(err)
	}
	pod := b.kernel.links[podlink.Name("c1", "eth0")]
	if got := fmt.Sprint(pod.Addrs, pod.MAC); got != "[10.244.1.77 fd00:244:1::77] 02:00:00:00:00:77" {
		t.Errorf("got %s", got)
	}
	// The capability ipRanges goes before the configured ranges.
	a = b.args(t, "c2", `{"runtimeConfig":{"ipRanges":[[{"subnet":"10.244.1.128/25"}]]},"ipam":{"type":"headcni-ipam","dataDir":"`+b.dir+`"}}`)
	if err := b.Add(bg, a); err != nil {
		t.Fatal(err)
	}
	if got := b.kernel.links[podlink.Name("c2", "eth0")].Addrs; len(got) != 1 || !netip.MustParsePrefix("10.244.1.128/25").Contains(got[0]) {
		t.Errorf("got %v", got)
	}
}

func TestMergeDNS(t *testing.T) {
	ipamDNS := types.DNS{Nameservers: []string{"1"}, Domain: "i", Search: []string{"is"}, Options: []string{"io"}}
	conf := netconf.DNS{Nameservers: []string{"2"}, Options: []string{"co"}}
	magic := netconf.MagicDNS{Enable: true, Nameservers: []string{"3"}, BaseDomain: "m", SearchDomains: []string{"ms"}}
	runtime := netconf.DNS{Nameservers: []string{"4"}, Search: []string{"rs"}}
	for _, tt := range []struct {
		name string
		c    netconf.Config
		ipam types.DNS
		want types.DNS
	}{
		{"nothing", netconf.Config{}, types.DNS{}, types.DNS{}},
		{"ipam", netconf.Config{}, ipamDNS, ipamDNS},
		{"conf over ipam", netconf.Config{DNS: conf}, ipamDNS, types.DNS{Nameservers: []string{"2"}, Domain: "i", Search: []string{"is"}, Options: []string{"co"}}},
		{"magic off", netconf.Config{MagicDNS: netconf.MagicDNS{Nameservers: []string{"3"}}}, ipamDNS, ipamDNS},
		{"magic over conf", netconf.Config{DNS: conf, MagicDNS: magic}, ipamDNS, types.DNS{Nameservers: []string{"3"}, Domain: "m", Search: []string{"ms"}, Options: []string{"co"}}},
		{"runtime over all", netconf.Config{DNS: conf, MagicDNS: magic, Runtime: netconf.Runtime{DNS: runtime}}, ipamDNS,
			types.DNS{Nameservers: []string{"4"}, Domain: "m", Search: []string{"rs"}, Options: []string{"co"}}},
	} {
		if diff := cmp.Diff(tt.want, mergeDNS(tt.c, tt.ipam)); diff != "" {
			t.Errorf("%s: %s", tt.name, diff)
		}
	}
}

func TestParseArgs(t *testing.T) {
	a, err := parseArgs("IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=p;K8S_POD_UID=4b-1;IP=;MAC=02:00:00:00:00:01;OTHER=a=b;")
	if err != nil || a.PodNamespace != "ns" || a.PodName != "p" || a.PodUID != "4b-1" || a.IPs != nil || a.MAC.String() != "02:00:00:00:00:01" {
		t.Errorf("got %+v, %v", a, err)
	}
	a, err = parseArgs(" IP = 10.0.0.9 ; K8S_POD_NAME= p; ; MAC =")
	if err != nil || len(a.IPs) != 1 || a.IPs[0].String() != "10.0.0.9" || a.PodName != "p" || a.MAC != nil {
		t.Errorf("got %+v, %v", a, err)
	}
	for _, s := range []string{"x", " x ", "IP=1.2.3", "MAC=ff:ff:ff:ff:ff:ff", "IP=::1%lo"} {
		if _, err := parseArgs(s); !errors.Is(err, errEnvironment) || !strings.Contains(err.Error(), "CNI_ARGS") {
			t.Errorf("%q: %v", s, err)
		}
	}
	b := newBench(t)
	bad := b.args(t, "c1", "")
	bad.Args = "IP=x"
	fails(t, b.Add(bg, bad), types.ErrInvalidEnvironmentVariables)
}

func TestGC(t *testing.T) {
	wide := func(b *bench, valid string) string {
		return fmt.Sprintf(`{"ipam":{"type":"headcni-ipam","dataDir":%q,"subnet":"10.244.1.0/24"}%s}`, b.dir, valid)
	}
	setUp := func(t *testing.T) *bench {
		b := newBench(t)
		for _, id := range []string{"c1", "c2", "c3"} {
			if err := b.Add(bg, b.args(t, id, wide(b, ""))); err != nil {
				t.Fatal(err)
			}
		}
		return b
	}
	one := `,"cni.dev/valid-attachments":[{"containerID":"c2","ifname":"eth0"}]`
	t.Run("stale go", func(t *testing.T) {
		b := setUp(t)
		if err := b.GC(bg, b.args(t, "", wide(b, one))); err != nil {
			t.Fatal(err)
		}
		if l := b.leases(t); len(l) != 1 || l[0].ContainerID != "c2" || len(b.kernel.links) != 1 {
			t.Errorf("leases %v, links %v", l, b.kernel.links)
		}
	})
	t.Run("a link that stays keeps its address", func(t *testing.T) {
		b := setUp(t)
		b.kernel.fail["sweep"] = errors.New("stuck")
		fails(t, b.GC(bg, b.args(t, "", wide(b, one))), CodeDetach)
		if l := b.leases(t); len(l) != 3 {
			t.Errorf("leases %v", l)
		}
	})
	t.Run("unknown links keep all", func(t *testing.T) {
		b := setUp(t)
		b.kernel.fail["list"] = errors.New("no netlink")
		fails(t, b.GC(bg, b.args(t, "", wide(b, one))), CodeDetach)
		if l := b.leases(t); len(l) != 3 {
			t.Errorf("leases %v", l)
		}
	})
	t.Run("null, a nil list of Go", func(t *testing.T) {
		b := setUp(t)
		if err := b.GC(bg, b.args(t, "", wide(b, `,"cni.dev/valid-attachments":null`))); err != nil {
			t.Fatal(err)
		}
		b.empty(t)
	})
	t.Run("no list", func(t *testing.T) {
		b := setUp(t)
		fails(t, b.GC(bg, b.args(t, "", wide(b, ""))), 7)
		if l := b.leases(t); len(l) != 3 {
			t.Errorf("leases %v", l)
		}
	})
}

func TestStatus(t *testing.T) {
	b := newBench(t)
	if err := b.Status(bg, b.args(t, "", "")); err != nil {
		t.Error(err)
	}
	b.kernel.fail["gate"] = podlink.ErrNotProgrammed
	fails(t, b.Status(bg, b.args(t, "", "")), types.ErrPluginNotAvailable)
	b.kernel.links["hc"] = podlink.Pod{}
	fails(t, b.Status(bg, b.args(t, "", "")), types.ErrLimitedConnectivity)
	fails(t, b.Status(bg, b.args(t, "", `{"mut":1}`)), 2)
	if len(b.records) > 0 {
		t.Errorf("STATUS sends records: %v", b.records)
	}
}

func TestCheck(t *testing.T) {
	b := newBench(t)
	if err := b.Add(bg, b.args(t, "c1", "")); err != nil {
		t.Fatal(err)
	}
	previous := fmt.Sprintf(`{"prevResult":%s}`, b.out)
	if err := b.Check(bg, b.args(t, "c1", previous)); err != nil {
		t.Error(err)
	}
	fails(t, b.Check(bg, b.args(t, "c1", "")), 7)       // no prevResult
	fails(t, b.Check(bg, b.args(t, "c2", previous)), 7) // another's
	for _, list := range []string{"interfaces", "ips", "routes"} {
		null := fmt.Sprintf(`{"prevResult":%s}`, strings.Replace(b.out.String(), `"`+list+`":[`, `"`+list+`":[null,`, 1))
		if !strings.Contains(null, "[null,") {
			t.Fatalf("the result has no %s: %s", list, null)
		}
		fails(t, b.Check(bg, b.args(t, "c1", null)), 7)
		fails(t, b.Add(bg, b.args(t, "c3", null)), 7)
	}
	b.kernel.fail["check"] = errors.New("host link is missing")
	if text := fails(t, b.Check(bg, b.args(t, "c1", previous)), CodeCheck); !strings.Contains(text, "host link is missing") {
		t.Errorf("got %q", text)
	}
	b.kernel.fail["check"] = nil
	if err := b.Del(bg, b.args(t, "c1", "")); err != nil {
		t.Fatal(err)
	}
	fails(t, b.Check(bg, b.args(t, "c1", previous)), CodeAddress) // no lease
	b.kernel.fail["gate"] = podlink.ErrNotProgrammed
	fails(t, b.Check(bg, b.args(t, "c1", previous)), types.ErrTryAgainLater)
}

func TestLog(t *testing.T) {
	b := newBench(t)
	file := filepath.Join(t.TempDir(), "headcni.log")
	if err := os.WriteFile(file, make([]byte, logLimit), 0o600); err != nil {
		t.Fatal(err)
	}
	keys := fmt.Sprintf(`{"log_level":"debug","log_file":%q,"auth_key":"s3cret"}`, file)
	if err := b.Add(bg, b.args(t, "c1", keys)); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"auth_key stands in", "msg=done", "container=c1"} {
		if !strings.Contains(string(text), want) {
			t.Errorf("no %q in %s", want, text)
		}
	}
	if strings.Contains(string(text), "s3cret") || b.log.Len() > 0 {
		t.Errorf("secret in the log, or standard error in use: %s %s", text, b.log)
	}
	if info, err := os.Stat(file + ".1"); err != nil || info.Size() != logLimit {
		t.Errorf("not rotated: %v", err)
	}
}

// script writes a plugin that notes what it was given and answers with output.
func script(t *testing.T, name, body string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	text := "#!/bin/sh\nd=$(dirname $0)\necho $CNI_COMMAND $CNI_CONTAINERID >>$d/calls\ncat >$d/stdin\n" + body + "\n"
	if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestDelegate(t *testing.T) {
	answer := `echo '{"ips":[{"address":"10.9.0.5/24","gateway":"10.9.0.1"}],"dns":{"nameservers":["10.9.0.53"]}}'`
	run := func(t *testing.T, body string, f func(*Plugin, cnimain.Call) error, keys string) (dir string, b *bench, err error) {
		dir, b = script(t, "my-ipam", body), newBench(t)
		t.Setenv("CNI_CONTAINERID", "c1")
		t.Setenv("CNI_COMMAND", "OVERRIDDEN")
		a := b.args(t, "c1", `{"ipam":{"type":"my-ipam","own":"key"}`+keys+`}`)
		a.Path = "/nowhere:" + dir
		return dir, b, f(b.Plugin, a)
	}
	calls := func(t *testing.T, dir string) string {
		t.Helper()
		text, err := os.ReadFile(filepath.Join(dir, "calls"))
		if err != nil {
			t.Fatal(err)
		}
		return strings.Join(strings.Split(strings.TrimSpace(string(text)), "\n"), ",")
	}
	add := func(p *Plugin, a cnimain.Call) error { return p.Add(bg, a) }
	t.Run("ADD", func(t *testing.T) {
		dir, b, err := run(t, answer, add, "")
		if err != nil {
			t.Fatal(err)
		}
		if got := calls(t, dir); got != "ADD c1" {
			t.Errorf("calls: %s", got)
		}
		stdin, err := os.ReadFile(filepath.Join(dir, "stdin"))
		if err != nil || !strings.Contains(string(stdin), `"own":"key"`) || !strings.Contains(string(stdin), `"gate"`) {
			t.Errorf("it did not get the whole configuration: %s, %v", stdin, err)
		}
		pod := b.kernel.links[podlink.Name("c1", "eth0")]
		if fmt.Sprint(pod.Addrs, pod.Routes[0].Gateway) != "[10.9.0.5] 10.9.0.1" {
			t.Errorf("pod: %+v", pod)
		}
	})
	t.Run("ADD fails", func(t *testing.T) {
		dir, b, err := run(t, `[ $CNI_COMMAND = DEL ] || { echo '{"code":123,"msg":"none left","details":"really"}'; exit 1; }`, add, "")
		if text := fails(t, err, 123); !strings.Contains(text, "plugin my-ipam: none left") || !strings.Contains(text, "really") {
			t.Errorf("got %q", text)
		}
		if got := calls(t, dir); got != "ADD c1,DEL c1" { // specification, section 4
			t.Errorf("calls: %s", got)
		}
		b.empty(t)
	})
	t.Run("ADD fails without a code", func(t *testing.T) {
		_, _, err := run(t, `echo '{"code":0,"msg":"none left"}'; exit 1`, add, "")
		if text := fails(t, err, CodeAddress); !strings.Contains(text, "none left; undo: ") {
			t.Errorf("got %q", text)
		}
	})
	for _, addr := range []string{"0.0.0.0/24", "127.0.0.1/8", "224.0.0.5/24", "ff02::5/64", "::/64"} {
		t.Run("ADD answers "+addr, func(t *testing.T) {
			_, b, err := run(t, `[ $CNI_COMMAND = DEL ] || echo '{"ips":[{"address":"`+addr+`"}]}'`, add, "")
			if text := fails(t, err, CodeAddress); !strings.Contains(text, "a pod cannot have") {
				t.Errorf("got %q", text)
			}
			b.empty(t)
		})
	}
	t.Run("ADD answers nothing", func(t *testing.T) {
		dir, _, err := run(t, `[ $CNI_COMMAND = DEL ] || echo '{}'`, add, "")
		fails(t, err, CodeAddress)
		if got := calls(t, dir); got != "ADD c1,DEL c1" {
			t.Errorf("calls: %s", got)
		}
	})
	t.Run("ADD answers null", func(t *testing.T) {
		_, _, err := run(t, `[ $CNI_COMMAND = DEL ] || echo '{"ips":[null]}'`, add, "")
		fails(t, err, CodeAddress)
	})
	t.Run("ADD answers junk", func(t *testing.T) {
		_, _, err := run(t, `echo junk`, add, "")
		fails(t, err, CodeAddress)
	})
	t.Run("unwanted IPv6", func(t *testing.T) {
		dir, _, err := run(t, `echo '{"ips":[{"address":"fd00::5/64"}]}'`, add, `,"enable_ipv6":false`)
		if text := fails(t, err, CodeAddress); !strings.Contains(text, "enable_ipv6 is false") {
			t.Errorf("got %q", text)
		}
		if got := calls(t, dir); got != "ADD c1,DEL c1" {
			t.Errorf("calls: %s", got)
		}
	})
	t.Run("DEL tells what prevResult says", func(t *testing.T) {
		dir, b, err := run(t, answer, add, "")
		if err != nil {
			t.Fatal(err)
		}
		a := b.args(t, "c1", `{"ipam":{"type":"my-ipam"},"prevResult":`+b.out.String()+`}`)
		a.Path = dir
		for range 2 {
			if err := b.Del(bg, a); err != nil {
				t.Fatal(err)
			}
		}
		if got := fmt.Sprint(b.records[1].Addrs, b.records[2].Addrs); got != "[10.9.0.5] []" {
			t.Errorf("got %s", got)
		}
	})
	for command, f := range map[string]func(*Plugin, cnimain.Call) error{
		"DEL":    func(p *Plugin, a cnimain.Call) error { return p.Del(bg, a) },
		"GC":     func(p *Plugin, a cnimain.Call) error { return p.GC(bg, a) },
		"STATUS": func(p *Plugin, a cnimain.Call) error { return p.Status(bg, a) },
	} {
		t.Run(command, func(t *testing.T) {
			dir, _, err := run(t, "", f, `,"cni.dev/valid-attachments":[]`)
			if got := calls(t, dir); err != nil || got != command+" c1" {
				t.Errorf("calls: %s, %v", got, err)
			}
			_, _, err = run(t, `echo '{"code":50,"msg":"sick"}'; exit 1`, f, `,"cni.dev/valid-attachments":[]`)
			fails(t, err, 50)
		})
	}
	t.Run("itself", func(t *testing.T) {
		self, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		b, dir := newBench(t), t.TempDir()
		if err := os.Symlink(self, filepath.Join(dir, "headcni")); err != nil {
			t.Fatal(err)
		}
		a := b.args(t, "c1", `{"ipam":{"type":"headcni"}}`)
		a.Path = dir
		if text := fails(t, b.Add(bg, a), 7); !strings.Contains(text, "itself") {
			t.Errorf("got %q", text)
		}
	})
	t.Run("missing", func(t *testing.T) {
		b := newBench(t)
		a := b.args(t, "c1", `{"ipam":{"type":"my-ipam"}}`)
		a.Path = "/nowhere"
		if text := fails(t, b.Add(bg, a), CodeAddress); !strings.Contains(text, "/nowhere") {
			t.Errorf("got %q", text)
		}
		b.kernel.links[podlink.Name("c1", "eth0")] = podlink.Pod{}
		fails(t, b.Del(bg, a), CodeAddress)
		b.empty(t) // the link went all the same
	})
}

// A program that prints without end is ended, with all that it has started and whatever it does about broken pipes, and what was printed is
// in no error. One that prints much and ends is believed.
func TestDelegateWithoutEnd(t *testing.T) {
	const answer = `[ $CNI_COMMAND = DEL ] || echo '{"ips":[{"address":"10.9.0.5/24"}]}'`
	stderr := os.Stderr
	t.Cleanup(func() { os.Stderr = stderr })
	for name, c := range map[string]struct{ body, want string }{
		"standard output":           {"yes secret", "my-ipam printed more than 1 MiB on standard output at ADD"},
		"standard output, zeros":    {"cat /dev/zero", "my-ipam printed more than 1 MiB on standard output at ADD"},
		"standard error":            {"yes secret >&2", "my-ipam printed more than 1 MiB on standard error at ADD"},
		"both":                      {"yes secret & yes secret >&2", "my-ipam printed more than 1 MiB on standard"},
		"after an answer":           {answer + "; yes secret", "my-ipam printed more than 1 MiB on standard output at ADD"},
		"deaf to broken pipes":      {"trap '' PIPE; while :; do echo secret-secret-secret-secret-secret-secret-secret; done 2>/dev/null", "my-ipam printed more than 1 MiB on standard output at ADD"},
		"an error without end":      {`echo '{"code":50,"msg":"'; yes secret`, "my-ipam printed more than 1 MiB on standard output at ADD"},
		"a long error":              {`printf '{"code":50,"msg":"%0100000d"}' 0; exit 1`, "plugin my-ipam: " + strings.Repeat("0", cnimain.TextMax/4) + "..."},
		"many words, and an answer": {answer + "; yes words | head -c 100000 >&2", ""},
	} {
		t.Run(name, func(t *testing.T) {
			var err error
			if os.Stderr, err = os.Create(filepath.Join(t.TempDir(), "stderr")); err != nil {
				t.Fatal(err)
			}
			dir, b := script(t, "my-ipam", "[ $CNI_COMMAND = DEL ] || echo $$ > $d/pid\n"+c.body), newBench(t)
			a := b.args(t, "c1", `{"ipam":{"type":"my-ipam"}}`)
			a.Path = dir
			if err = b.Add(bg, a); c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Fatalf("got %.3000v, want %q", err, c.want)
			}
			if err != nil && (strings.Contains(err.Error(), "secret") || len(err.Error()) > cnimain.TextMax) {
				t.Errorf("too much in the error: %.3000v", err)
			}
			pid, err := os.ReadFile(filepath.Join(dir, "pid"))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := os.Stat("/proc/" + strings.TrimSpace(string(pid))); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("it goes on: %v", err)
			}
			if info, err := os.Stderr.Stat(); err != nil || info.Size() > 3*wordsMax {
				t.Errorf("%d bytes of it are on our own standard error, %v", info.Size(), err)
			}
		})
	}
}

// Ports are mapped by portmap, and only for a pod that asks for some.
func TestPorts(t *testing.T) {
	const asked = `{"portmap":{"snat":false},"runtimeConfig":{"portMappings":[{"hostPort":8080,"containerPort":80,"protocol":"tcp"}]}}`
	t.Setenv("CNI_CONTAINERID", "c1")
	world := func(t *testing.T, body string) (dir string, b *bench) { return script(t, "portmap", body), newBench(t) }
	calls := func(dir string) string {
		text, _ := os.ReadFile(filepath.Join(dir, "calls")) // none: not called
		return strings.Join(strings.Fields(strings.ReplaceAll(string(text), "c1", "")), ",")
	}
	attachment := func(b *bench, t *testing.T, path, keys string) cnimain.Call {
		a := b.args(t, "c1", keys)
		a.Path = path
		return a
	}
	t.Run("not asked for", func(t *testing.T) {
		dir, b := world(t, "exit 1")
		for _, keys := range []string{
			`{"portmap":{}}`, `{"portmap":{},"runtimeConfig":{"portMappings":[]}}`, `{"portmap":{},"runtimeConfig":{"portMappings":null}}`,
			strings.Replace(asked, `"portmap":{"snat":false},`, "", 1), // another plugin's
		} {
			a := attachment(b, t, dir, keys)
			if err := errors.Join(b.Add(bg, a), b.Del(bg, a)); err != nil {
				t.Error(err)
			}
		}
		if got := calls(dir); got != "" {
			t.Errorf("calls: %s", got)
		}
	})
	t.Run("asked for", func(t *testing.T) {
		dir, b := world(t, "cp $d/stdin $d/$CNI_COMMAND")
		if err := b.Add(bg, attachment(b, t, dir, asked)); err != nil {
			t.Fatal(err)
		}
		result := strings.TrimSpace(b.out.String())
		keys := strings.TrimSuffix(asked, "}") + `,"prevResult":` + result + "}"
		a := attachment(b, t, dir, keys)
		if err := errors.Join(b.Check(bg, a), b.Del(bg, a), b.Del(bg, a)); err != nil {
			t.Fatal(err)
		}
		if got := calls(dir); got != "ADD,CHECK,DEL,DEL" {
			t.Errorf("calls: %s", got)
		}
		for _, command := range []string{"ADD", "CHECK"} {
			var got struct {
				CNIVersion, Name, Type string
				SNAT                   *bool
				PrevResult             map[string]any
				RuntimeConfig          struct{ PortMappings []map[string]any }
			}
			text, err := os.ReadFile(filepath.Join(dir, command))
			if err == nil {
				err = json.Unmarshal(text, &got)
			}
			if err != nil {
				t.Fatal(err)
			}
			if got.CNIVersion != "1.0.0" || got.Name != "n" || got.Type != "portmap" || got.SNAT == nil || *got.SNAT {
				t.Errorf("%s: %s", command, text)
			}
			if fmt.Sprint(got.RuntimeConfig.PortMappings) != "[map[containerPort:80 hostPort:8080 protocol:tcp]]" {
				t.Errorf("%s: mappings: %v", command, got.RuntimeConfig.PortMappings)
			}
			if ips, _ := got.PrevResult["ips"].([]any); len(ips) == 0 || got.PrevResult["cniVersion"] != "1.0.0" {
				t.Errorf("%s: prevResult: %v", command, got.PrevResult)
			}
		}
	})
	t.Run("ADD fails", func(t *testing.T) {
		dir, b := world(t, `[ $CNI_COMMAND = DEL ] || { echo '{"code":0,"msg":"port is taken"}'; exit 1; }`)
		if text := fails(t, b.Add(bg, attachment(b, t, dir, asked)), CodePorts); !strings.Contains(text, "plugin portmap: port is taken") {
			t.Errorf("got %q", text)
		}
		if got := calls(dir); got != "ADD,DEL" {
			t.Errorf("calls: %s", got)
		}
		if stage := b.records[0].Stage; stage != "ports" {
			t.Errorf("the daemon hears of %q", stage)
		}
		b.empty(t)
	})
	t.Run("ADD without portmap", func(t *testing.T) {
		_, b := world(t, "")
		text := fails(t, b.Add(bg, attachment(b, t, "/nowhere", asked)), CodePorts)
		if !strings.Contains(text, `"portmap"`) || !strings.Contains(text, "/nowhere") {
			t.Errorf("got %q", text)
		}
		b.empty(t)
	})
	t.Run("DEL without portmap", func(t *testing.T) {
		dir, b := world(t, "")
		if err := b.Add(bg, attachment(b, t, dir, asked)); err != nil {
			t.Fatal(err)
		}
		if err := b.Del(bg, attachment(b, t, "/nowhere", asked)); err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(b.log.String(), "portmap") {
			t.Errorf("nothing is said of it: %s", b.log)
		}
		b.empty(t)
	})
	t.Run("DEL fails", func(t *testing.T) {
		dir, b := world(t, `[ $CNI_COMMAND != DEL ] || [ -e $d/well ] || { echo '{"code":999,"msg":"no xtables lock"}'; exit 1; }`)
		a := attachment(b, t, dir, asked)
		if err := b.Add(bg, a); err != nil {
			t.Fatal(err)
		}
		// The pod is gone, but its address is kept from others while a port of the node still leads to it.
		if text := fails(t, b.Del(bg, a), 999); !strings.Contains(text, "no xtables lock") || !strings.Contains(text, "stays taken") {
			t.Errorf("got %q", text)
		}
		if len(b.kernel.links) != 0 {
			t.Error("the link is still there")
		}
		if err := os.WriteFile(filepath.Join(dir, "well"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := b.Del(bg, a); err != nil {
			t.Fatal(err)
		}
		b.empty(t)
	})
}
