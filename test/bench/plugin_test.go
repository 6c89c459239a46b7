package bench

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/pkg/cmdlog"
	"github.com/headcni/headcni/pkg/config/paths"
)

// hostLocal is the reference IPAM object, with its leases on the same tmpfs as ours.
func hostLocal(subnet string) string {
	return `"ipam":{"type":"host-local","dataDir":"/var/lib/headcni/host-local","subnet":"` + subnet + `","routes":[{"dst":"0.0.0.0/0"}]}`
}

// Every contender has a /16, so that no run comes near its end.
var (
	headcni = contender{"headcni", "bench-headcni", []link{
		{"headcni", `"mtu":1280,"ipam":{"type":"headcni-ipam","subnet":"10.1.0.0/16"}`},
	}}
	ptp = contender{"ptp + host-local", "bench-ptp", []link{{"ptp", `"mtu":1280,` + hostLocal("10.2.0.0/16")}}}

	references = []contender{ptp, {"bridge + host-local", "bench-bridge", []link{
		{"bridge", `"bridge":"bench0","isGateway":true,` + hostLocal("10.3.0.0/16")},
	}}}
)

// otherLinks gives the host more links: the ends of pods that are there already.
func otherLinks(b *testing.B, n int) {
	b.Helper()
	if n == 0 {
		return
	}
	pods := nstest.New(b)
	fd, err := os.Open(pods.Path)
	if err != nil {
		b.Fatal(err)
	}
	defer fd.Close()
	for i := range n {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.Flags = fmt.Sprintf("other%d", i), net.FlagUp
		err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: fmt.Sprintf("pod%d", i), PeerNamespace: netlink.NsFd(fd.Fd())})
		if err != nil {
			b.Fatalf("make link %d of %d: %v", i, n, err)
		}
	}
	b.Cleanup(func() { removeOtherLinks(b) })
}

// removeOtherLinks waits: one link's removal takes a grace period of the kernel, a namespace's takes all at once.
func removeOtherLinks(b *testing.B) {
	links, err := netlink.LinkList()
	if err != nil {
		b.Fatal(err)
	}
	const group = 77
	for _, l := range links {
		if l.Type() == "veth" {
			if err := netlink.LinkSetGroup(l, group); err != nil {
				b.Fatal(err)
			}
		}
	}
	if out, err := exec.Command("ip", "link", "delete", "group", fmt.Sprint(group)).CombinedOutput(); err != nil {
		b.Fatalf("remove the other links: %v\n%s", err, out)
	}
}

// BenchmarkPlugin compares whole plugin processes: one, and many at once until the last is done. 110 is the kubelet's default
// limit of pods on a node: its DEL drains a node.
func BenchmarkPlugin(b *testing.B) {
	goals := map[string]string{
		"ADD 1": "at most 0.30", "ADD 300": "at most 0.33: 3 times the rate", "DEL 110": "at most 0.45",
	}
	for _, links := range []int{0, 1000} {
		b.Run(fmt.Sprintf("links=%d", links), func(b *testing.B) {
			p := newPrograms(b)
			otherLinks(b, links)
			r := newComparison(b, fmt.Sprintf("Plugins, with %d other links on the host:", links))
			for _, load := range []struct{ atOnce, rounds int }{{1, 60}, {30, 12}, {110, 6}, {300, 5}} {
				b.Run(fmt.Sprintf("at-once=%d", load.atOnce), func(b *testing.B) {
					all := newSandboxes(b, load.atOnce)
					ways := []way{p.lives(headcni, all, "ADD", "CHECK", "DEL")}
					for _, c := range references {
						ways = append(ways, p.lives(c, all, "ADD", "CHECK", "DEL"))
					}
					got := interleave(b, load.rounds, ways...)
					for _, command := range []string{"ADD", "CHECK", "DEL"} {
						for _, c := range references {
							w := row{command, fmt.Sprintf("%d at once, ms", load.atOnce), headcni.name, c.name, ratio, ""}
							if c.name == ptp.name {
								w.goal = goals[fmt.Sprint(command, " ", load.atOnce)]
							}
							r.compare(got, w)
						}
					}
				})
			}
		})
	}
}

// shipped is the conflist that the daemon writes (pkg/daemon/conflist.go), with a socket of our choice. It is for IPv4 alone: the
// reference plugin waits for the kernel's duplicate address detection of IPv6, a second that would outweigh all else. ports is
// the configuration of onePort or noPort.
func shipped(name, network, subnet, socket, ports string) contender {
	return contender{name, network, []link{
		{"headcni", fmt.Sprintf(`"pod_cidr":%q,"service_cidr":"10.96.0.0/16","mtu":1280,"enable_ipv6":false,`+
			`"ipam":{"type":"headcni-ipam","ranges":[[{"subnet":%[1]q}]],"strategy":"sequential"},`+
			`"magic_dns":{"enable":true,"base_domain":"cluster.local","nameservers":["10.96.0.10"]},`+
			`"gate":{"podCIDRs":[%[1]q]},"daemon_socket":%[2]q,"portmap":{},`+ports, subnet, socket)},
	}}
}

// ptpPortmap is the likeness of shipped that is made of reference plugins.
func ptpPortmap(name, network, subnet, ports string) contender {
	return contender{name, network, []link{{"ptp", `"mtu":1280,` + hostLocal(subnet)}, {"portmap", ports}}}
}

const (
	// noPort: a pod that asks for no port of the host, like nearly all.
	noPort  = `"capabilities":{"portMappings":true}`
	onePort = noPort + `,"runtimeConfig":{"portMappings":[{"hostPort":8080,"containerPort":80,"protocol":"tcp"}]}`
)

// openGate makes what the plugin's gate looks for: the daemon's node network.
func openGate(b *testing.B, subnets ...string) {
	b.Helper()
	for _, s := range subnets {
		dst, err := netlink.ParseIPNet(s)
		if err != nil {
			b.Fatal(err)
		}
		if err := netlink.RouteAdd(&netlink.Route{Dst: dst, Type: unix.RTN_UNREACHABLE}); err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() {
			if err := netlink.RouteDel(&netlink.Route{Dst: dst, Type: unix.RTN_UNREACHABLE}); err != nil {
				b.Error(err)
			}
		})
	}
	nft := func(verb string) {
		for _, family := range []string{"ip", "ip6"} {
			if out, err := exec.Command("nft", verb, "table", family, "headcni").CombinedOutput(); err != nil {
				b.Fatalf("nft %s table: %v\n%s", verb, err, out)
			}
		}
	}
	nft("add")
	b.Cleanup(func() { nft("delete") })
}

// listen stands in for the daemon: it takes records out of the spool when it is woken.
func listen(b *testing.B, socket string) {
	b.Helper()
	spool := cmdlog.Spool(socket)
	if err := os.MkdirAll(spool, 0o700); err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done, heard := make(chan error), 0
	take := func() {
		heard++
		got, err := cmdlog.ReadSpool(spool, 1000)
		for _, h := range got {
			err = errors.Join(err, cmdlog.RemoveSpooled(spool, []string{h.Name}))
		}
		if err != nil {
			b.Error(err)
		}
	}
	go func() { done <- cmdlog.Serve(ctx, socket, take, func(error) {}) }()
	b.Cleanup(func() {
		cancel()
		if err := <-done; err != nil || heard == 0 {
			b.Errorf("the stand-in for the daemon has heard of %d commands: %v", heard, err)
		}
	})
}

// BenchmarkConflist compares the shipped conflist with its likeness of reference plugins.
func BenchmarkConflist(b *testing.B) {
	p := newPrograms(b)
	socket, absent := filepath.Join(paths.RunDir, "listening", "daemon.sock"), filepath.Join(paths.RunDir, "absent.sock")
	listen(b, socket)
	openGate(b, "10.4.0.0/16", "10.5.0.0/16", "10.7.0.0/16")
	r := newComparison(b, "The shipped conflist:")
	plain := []contender{
		ptpPortmap("ptp + portmap", "bench-ptp-portmap", "10.6.0.0/16", noPort),
		shipped("headcni", "bench-heard", "10.5.0.0/16", socket, noPort),
		shipped("headcni, no daemon", "bench-quiet", "10.4.0.0/16", absent, noPort),
	}
	mapped := []contender{
		ptpPortmap("ptp + portmap, a port", "bench-ptp-port", "10.8.0.0/16", onePort),
		shipped("headcni, a port", "bench-port", "10.7.0.0/16", socket, onePort),
	}
	for _, load := range []struct {
		atOnce, rounds int
		contenders     []contender
		goal           string
	}{{1, 40, plain, "at most 0.30"}, {30, 10, plain, ""}, {1, 20, mapped, ""}} {
		reference, ours := load.contenders[0], load.contenders[1:]
		b.Run(fmt.Sprintf("%s/at-once=%d", reference.name, load.atOnce), func(b *testing.B) {
			all := newSandboxes(b, load.atOnce)
			verbs := []string{"ADD", "CHECK", "DEL"}
			var ways []way
			for _, c := range load.contenders {
				ways = append(ways, p.lives(c, all, verbs...))
			}
			got := interleave(b, load.rounds, ways...)
			for _, command := range verbs {
				for i, c := range ours {
					w := row{command, fmt.Sprintf("%d at once, ms", load.atOnce), c.name, reference.name, ratio, ""}
					if i == 0 && command == "ADD" {
						w.goal = load.goal
					}
					r.compare(got, w)
				}
			}
		})
	}
}
