package tailnet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containernetworking/cni/libcni"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
	"github.com/headcni/headcni/pkg/config/names"
	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/ipam"
)

// As many pods as a kubelet runs by default, all at once.
const crowd = 100

func TestCrowd(t *testing.T) {
	l := steady.Enter(t)
	n := l.Nodes[crowded]
	labtest.Start(t, n, nil)
	labtest.Ready(t, n)
	// Which no pod waits for, and which has an address of its own on lo.
	labtest.Eventually(t, "the name server answers", func() error {
		if text, _ := labtest.Part(t, n, "names"); text != "" {
			return errors.New(text)
		}
		return nil
	})
	before := routes(t, n)
	pods := make([]*lab.Pod, crowd)
	atOnce(t, func(ctx context.Context, i int) (err error) {
		pods[i], err = n.AddPod(ctx, fmt.Sprintf("crowd-%d", i), lab.PodOptions{Idle: true})
		return err
	})
	owner := map[netip.Addr]string{}
	for _, p := range pods {
		if !p.Addr(false).IsValid() || !p.Addr(true).IsValid() {
			t.Errorf("%s has %v, want an address of each family", p.Name, p.Addrs)
		}
		for _, a := range p.Addrs {
			if other, taken := owner[a]; taken {
				t.Errorf("%s and %s both have %s", other, p.Name, a)
			}
			owner[a] = p.Name
		}
	}
	if got := len(leases(t, n)); got != crowd {
		t.Errorf("%d leases for %d pods", got, crowd)
	}
	atOnce(t, func(ctx context.Context, i int) error { return pods[i].Remove(ctx) })
	if links := podLinks(t, n); len(links) > 0 {
		t.Errorf("links left: %v", links)
	}
	if after := routes(t, n); after != before {
		t.Errorf("routes before:\n%s\nafter:\n%s", before, after)
	}
	if left := leases(t, n); len(left) > 0 {
		t.Errorf("leases left: %v", left)
	}
	p := labtest.AddPod(t, n, "after-crowd", lab.PodOptions{})
	labtest.WantTCP(t, "after the crowd", n, labtest.Echo(p, false), n.Underlay[0])
}

// atOnce calls do for each pod of a crowd.
func atOnce(t *testing.T, do func(ctx context.Context, i int) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*labtest.Soon)
	defer cancel()
	errs := make([]error, crowd)
	var wg sync.WaitGroup
	for i := range crowd {
		wg.Go(func() { errs[i] = do(ctx, i) })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// routes are those of the main table and of our rules.
func routes(t *testing.T, n *lab.Node) string {
	t.Helper()
	var all strings.Builder
	for _, f := range []string{"-4", "-6"} {
		for _, what := range []string{"route", "rule", "neigh"} {
			out, err := n.Run(labtest.Within(t), "ip", f, what, "show")
			if err != nil {
				t.Fatal(err)
			}
			if what == "neigh" { // those of pods are permanent
				out = keepLines(out, "PERMANENT")
			}
			all.WriteString(out)
		}
	}
	return all.String()
}

func keepLines(text, having string) string {
	var kept strings.Builder
	for line := range strings.Lines(text) {
		if strings.Contains(line, having) {
			kept.WriteString(line)
		}
	}
	return kept.String()
}

func podLinks(t *testing.T, n *lab.Node) (found []string) {
	t.Helper()
	links, err := n.Net.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	for _, link := range links {
		if strings.HasPrefix(link.Attrs().Name, names.PodLinkPrefix) {
			found = append(found, link.Attrs().Name)
		}
	}
	return found
}

// leases asks on the node: in another boot, and the lab's nodes have boots of their own, the store begins anew.
func leases(t *testing.T, n *lab.Node) (all []ipam.Lease) {
	t.Helper()
	out, err := n.Run(labtest.Within(t), "headcnictl", "ipam", "list", "--local", "-o", "json")
	if err == nil {
		err = json.Unmarshal([]byte(out), &all)
	}
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// The reference address manager in place of ours, by a line in daemon.yaml.
func TestHostLocal(t *testing.T) {
	l := steady.Enter(t)
	n, peer := l.Nodes[hostLocal], l.Nodes[nodeA]
	labtest.Start(t, n, func(_ *lab.Node, c map[string]any) { labtest.Section(c, "ipam")["type"] = "host-local" })
	labtest.Ready(t, n)
	a, b := labtest.AddPod(t, n, "hl-1", lab.PodOptions{}), labtest.AddPod(t, n, "hl-2", lab.PodOptions{})
	far := labtest.AddPod(t, peer, "hl-far", lab.PodOptions{})
	for _, to := range []*lab.Pod{b, far} {
		for _, v6 := range []bool{false, true} {
			if err := peer.WaitRoute(labtest.Within(t), a.Addr(v6)); err != nil {
				t.Fatal(err)
			}
			if err := n.WaitRoute(labtest.Within(t), far.Addr(v6)); err != nil {
				t.Fatal(err)
			}
			labtest.WantTCP(t, fmt.Sprintf("%s to %s, %s", a.Name, to.Name, labtest.Family(v6)), a, labtest.Echo(to, v6), a.Addr(v6))
		}
	}
	if err := a.Check(labtest.Within(t)); err != nil {
		t.Errorf("CHECK: %v", err)
	}
	// There is no lease of ours to look at: what its ADD said and what the link had must do.
	lose := func(p *lab.Pod) {
		t.Helper()
		labtest.Sh(t, n.Machine, "ip route flush dev %s; ip -6 route flush dev %[1]s; ip link set %[1]s down", p.Link())
	}
	young := labtest.AddPod(t, n, "hl-young", lab.PodOptions{})
	lose(young)
	lose(a)
	for _, p := range []*lab.Pod{a, young} {
		for _, v6 := range []bool{false, true} {
			labtest.Eventually(t, "the link of "+p.Name+" that lost its routes is mended, "+labtest.Family(v6), func() error {
				_, err := lab.Ask(labtest.Within(t), far, labtest.Echo(p, v6))
				return err
			})
		}
	}
	if err := a.Check(labtest.Within(t)); err != nil {
		t.Errorf("CHECK of the mended link: %v", err)
	}
	// Its leases are files, named by address.
	const store = "/var/lib/cni/networks/headcni"
	for _, addr := range append(a.Addrs, b.Addrs...) {
		if _, err := os.Stat(n.Path(filepath.Join(store, addr.String()))); err != nil {
			t.Errorf("no lease of host-local's: %v", err)
		}
	}
	for _, p := range []*lab.Pod{a, b, young} {
		if err := p.Remove(labtest.Within(t)); err != nil {
			t.Error(err)
		}
	}
	for _, addr := range append(a.Addrs, b.Addrs...) {
		if _, err := os.Stat(n.Path(filepath.Join(store, addr.String()))); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s after DEL: %v", addr, err)
		}
	}
	if links := podLinks(t, n); len(links) > 0 {
		t.Errorf("links left: %v", links)
	}
}

// The specification's own example, to the letter, with no daemon on the node.
func TestFlat(t *testing.T) {
	l := steady.Enter(t)
	n := l.Nodes[flat]
	text, err := os.ReadFile("testdata/spec.conf")
	if err != nil {
		t.Fatal(err)
	}
	path := n.Path(filepath.Join(paths.CNIConfDir, "10-headcni.conf"))
	if err := os.WriteFile(path, text, 0o644); err != nil {
		t.Fatal(err)
	}
	//lint:ignore SA1019 what containerd and CRI-O do with a .conf
	conf, err := libcni.ConfFromFile(path)
	if err != nil {
		t.Fatal(err)
	}
	//lint:ignore SA1019 likewise
	list, err := libcni.ConfListFromConf(conf)
	if err != nil {
		t.Fatal(err)
	}
	a, b := labtest.AddPod(t, n, "flat-1", lab.PodOptions{Config: list}), labtest.AddPod(t, n, "flat-2", lab.PodOptions{Config: list})
	for i, want := range []string{"10.244.0.10", "10.244.0.11"} {
		if got := fmt.Sprint([]*lab.Pod{a, b}[i].Addrs); got != "["+want+"]" {
			t.Errorf("addresses %s, want %s alone", got, want)
		}
	}
	if got := a.Result.IPs[0].Gateway.String(); got != "10.244.0.1" {
		t.Errorf("gateway %s", got)
	}
	labtest.WantUDP(t, "a full packet", a, b.Addr(false), 1280-headers[false], a.Addr(false))
	labtest.WantTCP(t, "pod to pod", b, labtest.Echo(a, false), b.Addr(false))
	labtest.WantTCP(t, "node to pod", n, labtest.Echo(a, false), n.Underlay[0])
	labtest.WantTCP(t, "pod to node", a, labtest.Service(t, n, netip.AddrPortFrom(n.Underlay[0], 0)), a.Addr(false))
	for _, p := range []*lab.Pod{a, b} {
		if err := p.Check(labtest.Within(t)); err != nil {
			t.Errorf("CHECK: %v", err)
		}
		if err := p.Remove(labtest.Within(t)); err != nil {
			t.Error(err)
		}
	}
	if links := podLinks(t, n); len(links) > 0 {
		t.Errorf("links left: %v", links)
	}
}
