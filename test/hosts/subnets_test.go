package hosts

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/headcni/headcni/internal/kubetest"
	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
	"github.com/headcni/headcni/pkg/kube"
)

// subnets is a lab with a host behind a device that is no node of the cluster: a real tailscaled leads there, in both families.
type subnets struct {
	*lab.Lab
	// inKubernetes is in host mode, and its Namespaces are asked; alone is in daemon mode, without Kubernetes.
	inKubernetes, alone *lab.Node
	api                 kubetest.Client
	far                 lab.Place
	behind              [2]netip.AddrPort
}

var behindRouter4And6 = []string{"192.168.50.0/24", "fd00:50::/64"}

func newSubnets(t *testing.T) *subnets {
	t.Helper()
	l := labtest.New(t, lab.Options{Nodes: 3, Spare: 3, Modes: []string{host, daemon, host}, Bin: labtest.Programs(t), Policy: allowAll})
	w := &subnets{Lab: l, inKubernetes: l.Nodes[0], alone: l.Nodes[1]}
	router := l.Nodes[2]
	far, err := router.Sandbox(labtest.Within(t), "far", lab.PodOptions{Config: &libcni.NetworkConfigList{}})
	if err != nil {
		t.Fatal(err)
	}
	labtest.Sh(t, router.Machine, `sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
		ip link add far type veth peer name eth0 netns far; ip link set far up; ip -n far link set eth0 up
		ip addr add 192.168.50.1/24 dev far; ip addr add fd00:50::1/64 dev far nodad
		ip -n far addr add 192.168.50.7/24 dev eth0; ip -n far addr add fd00:50::7/64 dev eth0 nodad
		ip -n far route add default via 192.168.50.1; ip -n far route add default via fd00:50::1`)
	w.far = far
	for i, a := range []string{"192.168.50.7:0", "[fd00:50::7]:0"} {
		w.behind[i] = labtest.Service(t, far, netip.MustParseAddrPort(a))
	}
	labtest.StartTailscaled(t, router)
	labtest.Up(t, l, router, labtest.AuthKey(t, l), "--snat-subnet-routes=false", "--advertise-routes="+strings.Join(behindRouter4And6, ","))
	labtest.Approve(t, l, router, behindRouter4And6...)
	// The nodes' default route leads there: what leaves by it in clear is seen, whoever's source it has. (tailscaled asks the router at its own
	// address there, whether it is near.)
	labtest.Sh(t, l.Control.Machine, `nft 'table inet eye { counter seen { }; chain c { type filter hook prerouting priority -310;
		ip daddr 192.168.50.7 counter name seen; ip6 daddr fd00:50::7 counter name seen; }; }'`)
	return w
}

// inClear is how many packets for the subnet have been seen on the nodes' LAN.
func (w *subnets) inClear(t *testing.T) (n int) {
	t.Helper()
	var list struct {
		Nftables []struct {
			Counter *struct{ Packets int }
		}
	}
	if err := json.Unmarshal([]byte(labtest.Sh(t, w.Control.Machine, "nft -j list counters table inet eye")), &list); err != nil {
		t.Fatal(err)
	}
	for _, o := range list.Nftables {
		if o.Counter != nil {
			n += o.Counter.Packets
		}
	}
	return n
}

// none holds that nothing is seen while do goes on.
func (w *subnets) none(t *testing.T, what string, do func()) {
	t.Helper()
	before := w.inClear(t)
	do()
	if n := w.inClear(t) - before; n > 0 {
		t.Errorf("%s: %d packets in clear", what, n)
	}
}

// send has pods send for a while.
func (w *subnets) send(t *testing.T, from ...lab.Place) {
	t.Helper()
	for end := time.Now().Add(labtest.Moment); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		for _, p := range from {
			for _, to := range w.behind {
				if err := labtest.Scatter(p, to.Addr()); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
}

// refused: a connection is refused at once, by an answer.
func (w *subnets) refused(t *testing.T, what string, from lab.Place) {
	t.Helper()
	for _, to := range w.behind {
		labtest.Eventually(t, what, func() error {
			c, err := from.Dial(labtest.Within(t), "tcp", to.String())
			if err == nil {
				c.Close()
				return fmt.Errorf("%s answers", to)
			}
			if !errors.Is(err, syscall.ECONNREFUSED) {
				return err
			}
			return nil
		})
	}
}

func (w *subnets) reaches(t *testing.T, what string, from *lab.Pod) {
	t.Helper()
	for i, to := range w.behind {
		labtest.WantTCP(t, what, from, to, labtest.TailnetAddrs(t, from.Node)[i])
	}
}

// says holds what `headcnictl why` finds between a pod and who is behind the router.
func (w *subnets) says(t *testing.T, pod string, refused bool) {
	t.Helper()
	for _, to := range w.behind {
		out := labtest.Sh(t, w.inKubernetes.Machine, "env -u KUBECONFIG headcnictl why --local %s %s --port %d 2>&1 || :", pod, to.Addr(), to.Port())
		if strings.Contains(out, "HC606") != refused || !strings.Contains(out, "on link hc") {
			t.Errorf("why %s %s, refused: %t\n%s", pod, to, refused, out)
		}
	}
}

// serveAPI starts the node with an API server, in which Namespaces are. Nobody else has to be real for that.
func (w *subnets) serveAPI(t *testing.T, namespaces ...*corev1.Namespace) {
	t.Helper()
	n := w.inKubernetes
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: n.Name, UID: "1"}}
	for _, p := range n.PodCIDRs {
		node.Spec.PodCIDRs = append(node.Spec.PodCIDRs, p.String())
	}
	w.api = kubetest.New(node)
	for _, ns := range namespaces {
		if err := w.api.Tracker().Add(ns); err != nil {
			t.Fatal(err)
		}
	}
	l := labtest.Listen(t, n, netip.MustParseAddrPort("127.0.0.1:0"))
	// A watch would otherwise outlast the test's own server.
	ctx, cancel := context.WithCancel(context.Background())
	server := &http.Server{Handler: w.api, BaseContext: func(net.Listener) context.Context { return ctx }}
	ended := make(chan struct{})
	go func() { defer close(ended); _ = server.Serve(l) }()
	t.Cleanup(func() { cancel(); server.Close(); <-ended })
	const kubeconfig = "/etc/headcni/kubeconfig"
	text := fmt.Sprintf("{apiVersion: v1, kind: Config, current-context: c, contexts: [{name: c, context: {cluster: c, user: c}}], "+
		"users: [{name: c}], clusters: [{name: c, cluster: {server: 'http://%s'}}]}", l.Addr())
	if err := os.WriteFile(n.Path(kubeconfig), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	labtest.StartTailscaled(t, n)
	labtest.Up(t, w.Lab, n, labtest.AuthKey(t, w.Lab))
	err := n.ConfigureDaemon(func(_ *lab.Node, c map[string]any) {
		labtest.Section(c, "kubernetes")["kubeconfig"] = kubeconfig
		labtest.Section(c, "kubernetes")["nodeName"] = n.Name
		network := labtest.Section(c, "network")
		delete(network, "podCIDRs")
		network["networkPolicy"] = false
		network["serviceCIDRs"] = []string{serviceCIDR4, serviceCIDR6}
	})
	if err == nil {
		err = n.StartDaemon()
	}
	if err != nil {
		t.Fatal(err)
	}
	var routes []string
	for _, p := range n.PodCIDRs {
		routes = append(routes, p.String())
	}
	labtest.Approve(t, w.Lab, n, routes...)
	labtest.Ready(t, n)
}

func namespaceWith(name, subnets string) *corev1.Namespace {
	n := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, UID: "2"}}
	if subnets != "" {
		n.Annotations = map[string]string{kube.TailnetSubnets: subnets}
	}
	return n
}

func (w *subnets) annotate(t *testing.T, name, subnets string) {
	t.Helper()
	if _, err := w.api.Namespaces().Update(t.Context(), namespaceWith(name, subnets), metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
}

// Pods of a Namespace that names a subnet reach it, as their node, and no others do; whatever dies or changes, nothing for it is in clear.
func TestTailnetSubnets(t *testing.T) {
	w := newSubnets(t)
	n := w.inKubernetes
	both := strings.Join(behindRouter4And6, ",")
	w.serveAPI(t, namespaceWith("shop", both+",0.0.0.0/0,10.244.9.0/24"), namespaceWith("other", ""))
	accepted(t, n, behindRouter4And6...)
	yes := labtest.AddPod(t, n, "yes", lab.PodOptions{Namespace: "shop"})
	no := labtest.AddPod(t, n, "no", lab.PodOptions{Namespace: "other"})
	w.none(t, "consent", func() {
		w.reaches(t, "with consent", yes)
		w.refused(t, "without consent", no)
		w.send(t, yes, no)
	})
	w.says(t, "other/no", true)
	w.says(t, "shop/yes", false)
	for i, v6 := range []bool{false, true} {
		labtest.WantTCP(t, "between pods", no, labtest.Echo(yes, v6), no.Addr(v6))
		at := labtest.Service(t, w.Control, netip.AddrPortFrom(labtest.ControlAddr(w.Lab, v6), 0))
		labtest.WantTCP(t, "outside", yes, at, n.Underlay[i])
		labtest.WantTCP(t, "outside", no, at, n.Underlay[i])
	}
	events, err := w.api.Events("default").List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var notes []string
	for _, e := range events.Items {
		if e.Regarding.Kind == "Namespace" { // a busy machine's Node may have some too
			notes = append(notes, e.Note)
		}
	}
	if len(notes) != 1 || !strings.Contains(notes[0], "exit node") || !strings.Contains(notes[0], "10.244.9.0/24") {
		t.Errorf("events of Namespaces: %q", notes)
	}
	if text, _ := labtest.Part(t, n, "subnets"); text != "" {
		t.Errorf("the part subnets: %s", text)
	}

	// A new daemon opens nothing and cuts nothing, and what its Namespaces say meanwhile counts.
	held := w.hold(t, yes)
	labtest.Kill(t, n.Daemon)
	w.reaches(t, "without the daemon", yes)
	w.refused(t, "without the daemon", no)
	labtest.StartDaemon(t, n)
	held.talk(t)
	w.refused(t, "with a new daemon", no)

	w.none(t, "consent ends", func() {
		w.annotate(t, "shop", "")
		held.end(t)
		w.refused(t, "without consent any more", yes)
		w.says(t, "shop/yes", true)
		w.send(t, yes, no)
	})
	w.annotate(t, "shop", both)
	w.reaches(t, "with consent again", yes)

	w.none(t, "tailscaled is dead", func() {
		labtest.Stop(t, n.Tailscaled)
		w.send(t, yes, no)
	})
	// The host itself goes by its default route: the eye sees.
	before := w.inClear(t)
	w.send(t, n)
	if w.inClear(t) == before {
		t.Error("the eye is blind")
	}
	// Each of two defences does alone.
	labtest.Kill(t, n.Daemon)
	w.none(t, "the same, and somebody takes the rules away", func() {
		for _, v6 := range []bool{false, true} {
			labtest.Sh(t, n.Machine, "for p in 5191 5192; do while %s rule del pref $p 2>/dev/null; do :; done; done", ip(v6))
		}
		w.send(t, yes, no)
	})
	for _, reason := range []string{"tailnet_subnet", "subnet_in_clear"} {
		for _, family := range families {
			if counted := labtest.Sh(t, n.Machine, "nft list counter %s headcni %s", family, reason); strings.Contains(counted, "packets 0 ") {
				t.Errorf("not counted: %s", counted)
			}
		}
	}
	labtest.StartTailscaled(t, n)
	labtest.StartDaemon(t, n)
	labtest.Kill(t, n.Daemon)
	labtest.Stop(t, n.Tailscaled)
	w.none(t, "the same, and somebody takes the tables away", func() {
		labtest.Sh(t, n.Machine, "nft delete table ip headcni; nft delete table ip6 headcni")
		w.send(t, yes, no)
	})
	labtest.StartTailscaled(t, n)
	labtest.StartDaemon(t, n)
	w.reaches(t, "when all is back", yes)
	w.refused(t, "when all is back", no)
}

// Without Kubernetes all pods may, or none.
func TestTailnetSubnetsWithoutKubernetes(t *testing.T) {
	w := newSubnets(t)
	n := w.alone
	labtest.Start(t, n, nil)
	labtest.Ready(t, n)
	accepted(t, n, behindRouter4And6...)
	p := labtest.AddPod(t, n, "p", lab.PodOptions{})
	for _, to := range w.behind {
		labtest.WantRefused(t, "deny", p, to)
	}
	change := func(key, value string) {
		t.Helper()
		labtest.Stop(t, n.Daemon)
		if err := n.ConfigureDaemon(func(_ *lab.Node, c map[string]any) { labtest.Section(c, "network")[key] = value }); err != nil {
			t.Fatal(err)
		}
		labtest.StartDaemon(t, n)
	}
	change("lanFirst", "false")
	w.none(t, "deny, and the tailnet's routes first", func() {
		w.refused(t, "deny", p)
		labtest.Stop(t, n.Tailscaled)
		w.send(t, p)
	})
	labtest.StartTailscaled(t, n)
	change("tailnetSubnets", "allow")
	w.none(t, "allow", func() {
		w.reaches(t, "allow", p)
		labtest.Stop(t, n.Tailscaled)
		w.send(t, p)
	})
}

// held are connections to the host behind the router, one in each family.
type held []struct{ pod, far net.Conn }

func (w *subnets) hold(t *testing.T, from *lab.Pod) (h held) {
	t.Helper()
	for _, to := range w.behind {
		l := labtest.Listen(t, w.far, netip.AddrPortFrom(to.Addr(), 0))
		came := make(chan net.Conn, 1)
		go func() {
			if c, err := l.Accept(); err == nil {
				came <- c
			}
		}()
		ctx := labtest.Within(t)
		pod, err := from.Dial(ctx, "tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { pod.Close() })
		select {
		case far := <-came:
			t.Cleanup(func() { far.Close() })
			h = append(h, struct{ pod, far net.Conn }{pod, far})
		case <-ctx.Done():
			t.Fatal("nobody came")
		}
	}
	h.talk(t)
	return h
}

func (h held) talk(t *testing.T) {
	t.Helper()
	for _, c := range h {
		for _, way := range [][2]net.Conn{{c.pod, c.far}, {c.far, c.pod}} {
			if _, err := way[0].Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
			if err := way[1].SetReadDeadline(time.Now().Add(labtest.Soon)); err != nil {
				t.Fatal(err)
			}
			if _, err := way[1].Read(make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// end waits until both ends know that it is over, each by what it sends.
func (h held) end(t *testing.T) {
	t.Helper()
	for _, c := range h {
		for _, end := range []net.Conn{c.pod, c.far} {
			labtest.Eventually(t, "the connection ends at "+end.LocalAddr().String(), func() error {
				if _, err := end.Write([]byte("x")); err == nil {
					return errors.New("it can send")
				}
				return nil
			})
		}
	}
}
