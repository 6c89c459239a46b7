// Package ipvs has the reason why a node with kube-proxy in IPVS mode does not say that NetworkPolicies are in force. It needs a kernel
// with IPVS and dummy links, and so runs in the virtual machine of test/kernel.
package ipvs

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/internal/policytest"
	"github.com/headcni/headcni/pkg/config/names"
	"github.com/headcni/headcni/pkg/policy"
	"github.com/headcni/headcni/pkg/policy/enforce"
)

func TestMain(m *testing.M) { nstest.Main(m) }

const (
	// patience is for what must happen, and moment is how long what must not happen is waited for.
	patience = 60 * time.Second
	moment   = 2 * time.Second
)

// TestServicesGoRound: a pod that may be reached by nobody is reached by a service of IPVS, and not by its own address. If a kernel or a
// change of ours makes the policy hold, the refusal in pkg/policy/agent can go.
func TestServicesGoRound(t *testing.T) {
	for i, family := range []string{"IPv4", "IPv6"} {
		t.Run(family, func(t *testing.T) {
			node := nstest.New(t)
			node.Run(t, "sh", "-ec", "echo 1 >/proc/sys/net/ipv4/ip_forward; echo 1 >/proc/sys/net/ipv6/conf/all/forwarding; ip link set lo up")
			client, server := policytest.Local(0)[i], policytest.Local(1)[i]
			from, to := pod(t, node, "0", client), pod(t, node, "1", server)
			listen(t, to, netip.AddrPortFrom(server, 8080), func(net.Conn) string { return "hello" })

			service := []netip.Addr{netip.MustParseAddr("10.96.0.10"), netip.MustParseAddr("fd00:96::10")}[i]
			serve(t, node, netip.AddrPortFrom(service, 80), netip.AddrPortFrom(server, 8080))

			table := enforce.New(filepath.Join(t.TempDir(), "chains"))
			for _, denied := range []bool{false, true} {
				rules := policy.Compile(cluster(denied))
				node.Do(t, func() error {
					_, err := table.Apply(t.Context(), rules, policy.Options{Strict: true})
					for tries := 1; err != nil && tries < 5; tries++ { // the first rules load the kernel's modules, which takes longer than nft may
						_, err = table.Apply(t.Context(), rules, policy.Options{Strict: true})
					}
					if err != nil {
						return err
					}
					// While flows of a pod that lost rights are looked through, answers by a service are judged too: that passes.
					left, err := table.Recheck(t.Context(), func(policy.Flow) (egress, ingress bool) { return true, true })
					if err == nil && left > 0 {
						err = fmt.Errorf("%d addresses are still looked through", left)
					}
					return err
				})
				if err := says(t, from, netip.AddrPortFrom(server, 8080), denied); (err == nil) == denied {
					t.Errorf("by the pod's address, denied: %t: %v", denied, err)
				}
				if err := says(t, from, netip.AddrPortFrom(service, 80), false); err != nil {
					t.Errorf("by the service, denied: %t: %v", denied, err)
				}
			}
		})
	}
}

// serve makes a service as kube-proxy does it.
func serve(t *testing.T, node *nstest.NS, service, server netip.AddrPort) {
	t.Helper()
	node.Run(t, "sh", "-ec", fmt.Sprintf(`ip link show kube-ipvs0 >/dev/null 2>&1 || ip link add kube-ipvs0 type dummy
		ip addr add %[1]s dev kube-ipvs0 nodad; ipvsadm -A -t %[2]s -s rr; ipvsadm -a -t %[2]s -r %[3]s -m; echo 1 >/proc/sys/net/ipv4/vs/conntrack`,
		netip.PrefixFrom(service.Addr(), service.Addr().BitLen()), service, server))
}

// cluster has two pods of this node, of which the second may be denied to all.
func cluster(denied bool) *policy.Snapshot {
	s := &policy.Snapshot{Node: "one", Nodes: policytest.Nodes(), Namespaces: []policy.Namespace{{Name: "shop"}}}
	for i := range 2 {
		name := fmt.Sprint("local-", i)
		s.Pods = append(s.Pods, &policy.Pod{Namespace: "shop", Name: name, Node: "one", Labels: map[string]string{"app": name}, IPs: policytest.Local(i)})
	}
	if denied {
		s.Policies = append(s.Policies, &networkingv1.NetworkPolicy{
			ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "deny"},
			Spec:       networkingv1.NetworkPolicySpec{PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": "local-1"}}},
		})
	}
	return s
}

// pod makes one behind a link of the node, of which policies are known.
func pod(t *testing.T, node *nstest.NS, id string, addr netip.Addr) *nstest.NS {
	t.Helper()
	ns := nstest.New(t)
	gateway := "169.254.1.1"
	if addr.Is6() {
		gateway = "fe80::1"
	}
	node.Run(t, "sh", "-ec", fmt.Sprintf(`ip link add %[1]s address 02:00:00:00:00:01 type veth peer name eth0 address 02:00:00:00:00:02 netns /run/netns/%[2]s
		ip link set %[1]s group %[3]d up; ip neigh add %[4]s lladdr 02:00:00:00:00:02 nud permanent dev %[1]s; ip route add %[4]s dev %[1]s`,
		names.PodLinkPrefix+id, ns.Name, names.PolicyLinkGroup, addr))
	ns.Run(t, "sh", "-ec", fmt.Sprintf(`ip link set lo up; ip link set eth0 up; ip addr add %[1]s dev eth0 nodad
		ip neigh add %[2]s lladdr 02:00:00:00:00:01 nud permanent dev eth0; ip route replace %[2]s dev eth0; ip route add default via %[2]s dev eth0`,
		netip.PrefixFrom(addr, addr.BitLen()), gateway))
	return ns
}

// listen tells whoever connects what say makes of the connection.
func listen(t *testing.T, ns *nstest.NS, at netip.AddrPort, say func(net.Conn) string) {
	t.Helper()
	var l net.Listener
	ns.Do(t, func() (err error) { l, err = net.Listen("tcp", at.String()); return err })
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(c, say(c)) // who does not hear it says so
			_ = c.Close()
		}
	}()
}

// says opens a connection and waits for a word.
func says(t *testing.T, ns *nstest.NS, to netip.AddrPort, denied bool) (err error) {
	t.Helper()
	wait := patience
	if denied {
		wait = moment
	}
	ns.Do(t, func() error {
		var c net.Conn
		if c, err = net.DialTimeout("tcp", to.String(), wait); err != nil {
			return nil
		}
		defer c.Close()
		_, err = io.ReadFull(c, make([]byte, 5))
		return nil
	})
	return err
}
