package tailnet

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/headcni/headcni/internal/kubetest"
	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
	"github.com/headcni/headcni/pkg/kube"
)

// failovers is how often each leader is cut off, for `make bench-services`.
var failovers = flag.Int("failovers", 1, "how often TestServicesFailOver cuts off who leads to services")

const (
	leadLabel  = "node-restriction.kubernetes.io/services"
	healthPort = 10256
)

// shop is a cluster with services: an imitated API server, a real controller, three nodes, of which the third has a user who accepts routes,
// and a laptop with nothing but tailscale.
type shop struct {
	*lab.Lab
	api                kubetest.Client
	a, b, c, laptop    *lab.Node
	pods               []*lab.Pod // of a, b and c
	unhealthy          map[*lab.Node]*atomic.Bool
	near, far, outside []netip.AddrPort // Services of a pod of a, of one of c, and of a host beside the nodes; IPv4 first
	controller         *lab.Process
}

var shops = labtest.OneByOne(newShop)

func newShop(t testing.TB) *shop {
	bin := labtest.Programs(t)
	labtest.WithController(t, bin)
	s := &shop{unhealthy: map[*lab.Node]*atomic.Bool{}}
	s.Lab = labtest.New(t, lab.Options{Nodes: 4, Spare: 4, Modes: []string{daemon, daemon, host, host}, Bin: bin, Policy: toServices})
	s.a, s.b, s.c, s.laptop = s.Nodes[0], s.Nodes[1], s.Nodes[2], s.Nodes[3]
	s.startKubernetes(t)
	labtest.StartTailscaled(t, s.laptop)
	labtest.Up(t, s.Lab, s.laptop, labtest.AuthKey(t, s.Lab), "--accept-routes")
	labtest.StartTailscaled(t, s.c)
	labtest.Up(t, s.Lab, s.c, labtest.AuthKey(t, s.Lab), "--accept-routes", "--hostname="+s.c.Name)
	for _, n := range s.cluster() {
		if err := n.ConfigureDaemon(s.inKubernetes); err != nil {
			t.Fatal(err)
		}
		if n != s.c {
			labtest.StartTailscaled(t, n)
		}
		if err := n.StartDaemon(); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range s.cluster() {
		labtest.Ready(t, n)
		s.pods = append(s.pods, labtest.AddPod(t, n, "shop-"+n.Name, lab.PodOptions{}))
	}
	s.startServices(t)
	return s
}

func (s *shop) cluster() []*lab.Node { return []*lab.Node{s.a, s.b, s.c} }

// toServices lets everybody reach services.
func toServices(policy map[string]any) {
	rules := policy["acls"].([]map[string]any)
	for _, p := range lab.ServiceCIDRs {
		rules[0]["dst"] = append(rules[0]["dst"].([]string), p.String()+":*")
	}
}

// startKubernetes starts the API server and the controller, both on the control host.
func (s *shop) startKubernetes(t testing.TB) {
	objects := []runtime.Object{&networkingv1.ServiceCIDR{ObjectMeta: metav1.ObjectMeta{Name: "kubernetes"}}}
	for _, p := range lab.ServiceCIDRs {
		c := objects[0].(*networkingv1.ServiceCIDR)
		c.Spec.CIDRs = append(c.Spec.CIDRs, p.String())
	}
	for _, n := range s.cluster() {
		k := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: n.Name, UID: "u", CreationTimestamp: metav1.Now()}}
		for _, p := range n.PodCIDRs {
			k.Spec.PodCIDRs = append(k.Spec.PodCIDRs, p.String())
		}
		k.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}
		objects = append(objects, k)
	}
	s.api = kubetest.New(objects...)
	l := labtest.Listen(t, s.Control, netip.AddrPortFrom(labtest.ControlAddr(s.Lab, false), 0))
	server := &http.Server{Handler: s.api}
	go func() { _ = server.Serve(l) }()  // ends with the listener
	t.Cleanup(func() { server.Close() }) // at once: who watches would come back for ever
	kubeconfig := fmt.Sprintf(`{"apiVersion":"v1","kind":"Config","current-context":"x","contexts":[{"name":"x","context":{"cluster":"x","user":"x"}}],`+
		`"clusters":[{"name":"x","cluster":{"server":"http://%s"}}],"users":[{"name":"x"}]}`, l.Addr())
	c := map[string]any{"headscale": map[string]any{"url": s.Control.URL, "apiKeyFile": lab.KeyFile}, "network": map[string]any{
		"clusterCIDRs": lab.ClusterCIDRs, "advertiseServices": map[string]any{"nodeSelector": map[string]string{leadLabel: "true"}},
	}, "kubernetes": map[string]any{"kubeconfig": "/etc/headcni/kubeconfig"}}
	b, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	s.write(t, s.Control.Machine, "/etc/headcni/daemon.yaml", string(b))
	s.write(t, s.Control.Machine, lab.KeyFile, s.Control.APIKey+"\n")
	for _, m := range []*lab.Machine{s.Control.Machine, s.a.Machine, s.b.Machine, s.c.Machine} {
		s.write(t, m, "/etc/headcni/kubeconfig", kubeconfig)
	}
	if s.controller, err = s.Control.Start("headcni-controller", nil, "run"); err != nil {
		t.Fatal(err)
	}
}

func (s *shop) write(t testing.TB, m *lab.Machine, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(m.Path(path)), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(m.Path(path), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// inKubernetes is what a node of the cluster has: no key, and no ranges.
func (s *shop) inKubernetes(n *lab.Node, c map[string]any) {
	delete(labtest.Section(c, "network"), "podCIDRs")
	delete(labtest.Section(c, "headscale"), "apiKeyFile")
	labtest.Section(c, "network")["networkPolicy"] = false
	c["kubernetes"] = map[string]any{"kubeconfig": "/etc/headcni/kubeconfig", "nodeName": n.Name}
}

// startServices does kube-proxy's part on each node: DNAT as its nftables mode has it, without --cluster-cidr, and its health.
func (s *shop) startServices(t testing.TB) {
	for i, v6 := range []bool{false, true} {
		ip := func(last string) netip.AddrPort {
			return netip.AddrPortFrom(netip.MustParseAddr(map[bool]string{false: "10.96.0.", true: "fd00:96::"}[v6]+last), 80)
		}
		s.near, s.far, s.outside = append(s.near, ip("10")), append(s.far, ip("11")), append(s.outside, ip("12"))
		beside := labtest.Service(t, s.Control, netip.AddrPortFrom(labtest.ControlAddr(s.Lab, v6), 0))
		for _, n := range s.cluster() {
			fam := []string{"ip", "ip6"}[i]
			labtest.Sh(t, n.Machine, `nft 'table %s kube-proxy {
				map service-ips { type ipv%s_addr . inet_proto . inet_service : verdict; elements = { %s . tcp . 80 : goto near, %s . tcp . 80 : goto far, %s . tcp . 80 : goto outside } }
				chain near { meta l4proto tcp dnat to %s; }
				chain far { meta l4proto tcp dnat to %s; }
				chain outside { meta l4proto tcp dnat to %s; }
				chain services { %s daddr . meta l4proto . th dport vmap @service-ips; }
				chain nat-prerouting { type nat hook prerouting priority dstnat; jump services; }
				chain nat-output { type nat hook output priority -100; jump services; }
			}'`, fam, []string{"4", "6"}[i], s.near[i].Addr(), s.far[i].Addr(), s.outside[i].Addr(),
				labtest.Echo(s.pods[0], v6), labtest.Echo(s.pods[2], v6), beside, fam)
		}
	}
	for _, n := range s.cluster() {
		sick := &atomic.Bool{}
		s.unhealthy[n] = sick
		server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			if sick.Load() {
				w.WriteHeader(http.StatusServiceUnavailable)
			}
		})}
		l := labtest.Listen(t, n, netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), healthPort))
		go func() { _ = server.Serve(l) }() // ends with the listener
		t.Cleanup(func() { server.Close() })
	}
}

// label labels Nodes, and takes the label from all others.
func (s *shop) label(t testing.TB, nodes ...*lab.Node) {
	t.Helper()
	for _, n := range s.cluster() {
		value := any(nil)
		if slices.Contains(nodes, n) {
			value = "true"
		}
		s.patch(t, n, map[string]any{"metadata": map[string]any{"labels": map[string]any{leadLabel: value}}})
	}
}

func (s *shop) patch(t testing.TB, n *lab.Node, change map[string]any) {
	t.Helper()
	b, err := json.Marshal(change)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.api.Nodes().Patch(t.Context(), n.Name, "application/merge-patch+json", b, metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
}

// approved waits until exactly these nodes have the approval for all ranges of services, and one of them leads there, which it returns.
func (s *shop) approved(t testing.TB, want ...*lab.Node) (leader *lab.Node) {
	t.Helper()
	var names []string
	for _, n := range want {
		names = append(names, n.Name)
	}
	labtest.EventuallyWithin(t, minutes, fmt.Sprintf("services are approved for %v", names), func() error {
		nodes, err := labtest.Headscale(t, s.Lab).Nodes(t.Context())
		if err != nil {
			return err
		}
		leader = nil
		var have []string
		for _, n := range nodes {
			if routes := inServices(n.Approved); len(routes) > 0 {
				have = append(have, fmt.Sprintf("%s %v", n.Hostname, routes))
			}
			if slices.Contains(n.Primary, lab.ServiceCIDRs[0]) && slices.Contains(n.Primary, lab.ServiceCIDRs[1]) {
				leader = s.Nodes[slices.IndexFunc(s.Nodes, func(l *lab.Node) bool { return l.Name == n.Hostname })]
			}
		}
		slices.Sort(have)
		var wanted []string
		for _, name := range names {
			wanted = append(wanted, fmt.Sprintf("%s %v", name, lab.ServiceCIDRs))
		}
		if slices.Sort(wanted); !slices.Equal(have, wanted) {
			return fmt.Errorf("approved is %v", have)
		}
		if len(want) > 0 && !slices.Contains(want, leader) {
			return errors.New("none of them leads")
		}
		return nil
	})
	return leader
}

func inServices(routes []netip.Prefix) []netip.Prefix {
	return slices.DeleteFunc(slices.Clone(routes), func(r netip.Prefix) bool {
		return !slices.ContainsFunc(lab.ServiceCIDRs, r.Overlaps)
	})
}

// reached says that the laptop reaches the services by a node, and whom their servers see.
func (s *shop) reached(t testing.TB, by *lab.Node) {
	t.Helper()
	for i, v6 := range []bool{false, true} {
		leads := labtest.TailnetAddrs(t, by)[i]
		labtest.Eventually(t, fmt.Sprintf("the laptop knows that %s leads", by.Name), func() error {
			seen, err := lab.Ask(t.Context(), s.laptop, s.outside[i])
			if err == nil && seen != by.Underlay[i] {
				err = fmt.Errorf("it goes by %s", seen)
			}
			return err
		})
		for _, c := range []struct {
			what string
			to   netip.AddrPort
			pod  *lab.Pod
		}{{"a Service of a pod of a", s.near[i], s.pods[0]}, {"a Service of a pod of c", s.far[i], s.pods[2]}} {
			want := leads
			if c.pod.Node == by {
				want = labtest.TailnetAddrs(t, s.laptop)[i]
			}
			labtest.WantTCP(t, fmt.Sprintf("%s, %s by %s", labtest.Family(v6), c.what, by.Name), s.laptop, c.to, want)
		}
	}
}

// lost waits until the laptop reaches a Service no more.
func (s *shop) lost(t testing.TB, to netip.AddrPort) {
	t.Helper()
	labtest.Eventually(t, fmt.Sprintf("nobody leads to %s", to), func() error {
		seen, err := lab.Ask(t.Context(), s.laptop, to)
		if err == nil {
			return fmt.Errorf("answered, to %s", seen)
		}
		return nil
	})
}

// ownBusiness says that nodes and pods of the cluster use services as ever.
func (s *shop) ownBusiness(t testing.TB) {
	t.Helper()
	for i, v6 := range []bool{false, true} {
		for j, n := range s.cluster() {
			what := labtest.Family(v6) + ", " + n.Name
			labtest.WantTCP(t, what+" to a Service beside the nodes", n, s.outside[i], n.Underlay[i])
			other := s.far[i]
			if n == s.c {
				other = s.near[i] // a pod that reaches itself is kube-proxy's masquerading
			}
			labtest.WantTCP(t, what+"'s pod to a Service of a pod elsewhere", s.pods[j], other, s.pods[j].Addr(v6))
			want := labtest.TailnetAddrs(t, n)[i]
			if n == s.c {
				want = n.Underlay[i]
			}
			labtest.WantTCP(t, what+" to a Service of a pod of c", n, s.far[i], want)
		}
	}
}

// Devices of the tailnet reach services by the nodes that the label chooses, and by no other.
func TestServicesForTheTailnet(t *testing.T) {
	s := shops.Enter(t)
	s.ownBusiness(t)
	s.label(t, s.a)
	s.reached(t, s.approved(t, s.a))
	s.ownBusiness(t)
	for _, n := range s.cluster() {
		labtest.Ready(t, n)
		if text, _ := labtest.Part(t, n, "services"); text != "" {
			t.Errorf("%s: %s", n.Name, text)
		}
	}

	t.Run("a stolen node", func(t *testing.T) {
		var routes []string
		for _, p := range lab.ServiceCIDRs {
			routes = append(routes, p.String())
		}
		labtest.Approve(t, s.Lab, s.b, routes...) // as somebody did by mistake
		if _, err := s.b.Run(labtest.Within(t), "tailscale", "--socket="+s.b.Socket(), "set",
			"--advertise-routes="+strings.Join(append(routes, s.b.PodCIDRs[0].String(), s.b.PodCIDRs[1].String()), ",")); err != nil {
			t.Fatal(err)
		}
		s.reached(t, s.approved(t, s.a))
		if _, err := s.b.Run(labtest.Within(t), "tailscale", "--socket="+s.b.Socket(), "set",
			"--advertise-routes="+s.b.PodCIDRs[0].String()+","+s.b.PodCIDRs[1].String()); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("another node's label", func(t *testing.T) {
		s.label(t, s.b)
		s.reached(t, s.approved(t, s.b))
		s.ownBusiness(t)
	})
	t.Run("a cordon and a node that is not ready", func(t *testing.T) {
		s.label(t, s.a, s.b)
		s.approved(t, s.a, s.b)
		s.patch(t, s.b, map[string]any{"spec": map[string]any{"unschedulable": true}})
		s.reached(t, s.approved(t, s.a))
		s.patch(t, s.b, map[string]any{"spec": map[string]any{"unschedulable": nil}})
		s.approved(t, s.a, s.b)
	})
	t.Run("kube-proxy does not work", func(t *testing.T) {
		s.label(t, s.b)
		s.approved(t, s.b)
		s.unhealthy[s.b].Store(true)
		advertises := func(want bool) {
			t.Helper()
			labtest.EventuallyWithin(t, minutes, fmt.Sprintf("%s advertises services: %v", s.b.Name, want), func() error {
				text := labtest.Sh(t, s.b.Machine, "tailscale --socket=%s debug prefs", s.b.Socket())
				if strings.Contains(text, lab.ServiceCIDRs[0].String()) != want {
					return errors.New(text)
				}
				return nil
			})
		}
		advertises(false)
		labtest.Eventually(t, "the daemon says it", func() error {
			if text, ready := labtest.Part(t, s.b, "services"); !ready || !strings.Contains(text, "503") {
				return fmt.Errorf("%v %q", ready, text)
			}
			return nil
		})
		for i := range lab.ServiceCIDRs {
			s.lost(t, s.near[i])
		}
		s.unhealthy[s.b].Store(false)
		advertises(true)
		s.reached(t, s.approved(t, s.b))
	})
	t.Run("what a node that does not lead drops", func(t *testing.T) {
		// Whatever tailscaled lets in: here the address becomes a service's behind it.
		for i, v6 := range []bool{false, true} {
			fam := []string{"ip", "ip6"}[i]
			before := counted(t, s.c, fam)
			labtest.Sh(t, s.c.Machine, `nft 'table %[1]s inject { chain pre { type filter hook prerouting priority -310;
				iifname "%[2]s" %[1]s daddr %[3]s tcp dport 80 %[1]s daddr set %[4]s; }; }'`, fam, s.c.Tun, labtest.TailnetAddrs(t, s.c)[i], s.near[i].Addr())
			labtest.WantRefused(t, labtest.Family(v6)+" out of the tunnel to a service, by a node that does not lead", s.laptop,
				netip.AddrPortFrom(labtest.TailnetAddrs(t, s.c)[i], 80))
			labtest.Sh(t, s.c.Machine, "nft delete table %s inject", fam)
			if counted(t, s.c, fam) == before {
				t.Errorf("%s: nothing was counted", labtest.Family(v6))
			}
		}
	})
	t.Run("only Services that have a name", func(t *testing.T) {
		cluster4 := s.near[0].Addr().String()
		_, err := s.api.Services("shop").Create(t.Context(), &corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Name: "web", Namespace: "shop", Annotations: map[string]string{kube.TailnetName: "web"}, CreationTimestamp: metav1.Now()},
			Spec:       corev1.ServiceSpec{ClusterIP: cluster4, ClusterIPs: []string{cluster4}},
		}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		labtest.Stop(t, s.controller)
		if s.controller, err = s.Control.Start("headcni-controller", nil, "run", "--set", "network.advertiseServices.only=named"); err != nil {
			t.Fatal(err)
		}
		labtest.EventuallyWithin(t, minutes, "one address is approved", func() error {
			node, err := labtest.Registered(t, s.Lab, s.b)
			if got := fmt.Sprint(inServices(node.Primary)); err == nil && got != "["+cluster4+"/32]" {
				err = errors.New(got)
			}
			return err
		})
		labtest.WantTCP(t, "a Service with a name", s.laptop, s.near[0], labtest.TailnetAddrs(t, s.b)[0])
		labtest.WantRefused(t, "a Service without", s.laptop, s.far[0])
		labtest.Stop(t, s.controller)
		if s.controller, err = s.Control.Start("headcni-controller", nil, "run"); err != nil {
			t.Fatal(err)
		}
		s.reached(t, s.approved(t, s.b))
	})
	s.label(t)
	s.approved(t)
	for i := range lab.ServiceCIDRs {
		s.lost(t, s.near[i])
	}
	s.ownBusiness(t)
}

// counted is how many packets a node has dropped for services that it does not lead to.
func counted(t testing.TB, n *lab.Node, family string) string {
	return labtest.Sh(t, n.Machine, "nft list counter %s headcni tailnet_service", family)
}

// One of two that lead is cut off, and nobody is told: the other has the route as soon as Headscale has noticed.
func TestServicesFailOver(t *testing.T) {
	s := shops.EnterLast(t)
	s.label(t, s.a, s.b)
	s.approved(t, s.a, s.b)
	for _, ha := range []string{"3s 1s", ""} {
		if ha == "" && *failovers == 1 {
			continue // takes up to 15 s more each
		}
		s.probeRoutes(t, ha)
		var gaps []time.Duration
		for range *failovers {
			gaps = append(gaps, s.failOver(t))
		}
		slices.Sort(gaps)
		t.Logf("node.routes.ha %q: a device is without services for %v to %v, median %v, of %d", ha, gaps[0], gaps[len(gaps)-1], gaps[len(gaps)/2], len(gaps))
	}
}

// probeRoutes sets Headscale's node.routes.ha and starts it anew.
func (s *shop) probeRoutes(t *testing.T, ha string) {
	t.Helper()
	path := s.Control.Path("/etc/headscale/config.yaml")
	b, err := os.ReadFile(path)
	var c map[string]any
	if err == nil {
		err = json.Unmarshal(b, &c)
	}
	if err != nil {
		t.Fatal(err)
	}
	delete(c, "node")
	if interval, timeout, ok := strings.Cut(ha, " "); ok {
		c["node"] = map[string]any{"routes": map[string]any{"ha": map[string]any{"probe_interval": interval, "probe_timeout": timeout}}}
	}
	if b, err = json.Marshal(c); err == nil {
		err = os.WriteFile(path, b, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	labtest.Stop(t, s.Control.Headscale)
	if err := s.Control.StartHeadscale(labtest.Within(t)); err != nil {
		t.Fatal(err)
	}
	s.approved(t, s.a, s.b)
}

// failOver cuts off who leads, and says how long the laptop reaches no Service.
func (s *shop) failOver(t *testing.T) time.Duration {
	t.Helper()
	var leader *lab.Node
	labtest.Eventually(t, "the laptop goes by who leads", func() error {
		seen, err := lab.Ask(t.Context(), s.laptop, s.outside[0])
		if leader = s.leads(t); err == nil && (leader == nil || seen != leader.Underlay[0]) {
			err = fmt.Errorf("it goes by %s", seen)
		}
		return err
	})
	to := s.far[0] // whose pod is neither's
	labtest.Sh(t, s.Control.Machine, "ip link set %s down", leader.Port)
	began := time.Now()
	var back time.Duration
	labtest.EventuallyWithin(t, minutes, "the Service answers by the other", func() error {
		var err error
		dialErr := s.laptop.Do(func() error {
			var c net.Conn
			if c, err = net.DialTimeout("tcp", to.String(), 300*time.Millisecond); err == nil {
				c.Close()
			}
			return nil
		})
		back = time.Since(began)
		return errors.Join(dialErr, err)
	})
	labtest.Sh(t, s.Control.Machine, "ip link set %s up", leader.Port)
	labtest.EventuallyWithin(t, minutes, leader.Name+" is back", func() error {
		_, err := lab.Ask(t.Context(), leader, netip.AddrPortFrom(s.pods[2].Addr(false), lab.EchoPort))
		return err
	})
	s.approved(t, s.a, s.b)
	return back
}

// leads is the node that Headscale leads devices to.
func (s *shop) leads(t testing.TB) *lab.Node {
	t.Helper()
	for _, n := range []*lab.Node{s.a, s.b} {
		node, err := labtest.Registered(t, s.Lab, n)
		if err == nil && slices.Contains(node.Primary, lab.ServiceCIDRs[0]) {
			return n
		}
	}
	return nil
}
