package bench

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/networking/podlink"
)

// requests are netlink messages that go out in one system call.
type requests struct{ b []byte }

func (r *requests) add(typ uint16, flags uint16, parts ...nl.NetlinkRequestData) {
	m := nl.NetlinkRequest{NlMsghdr: unix.NlMsghdr{Len: unix.SizeofNlMsghdr, Type: typ, Flags: flags | unix.NLM_F_REQUEST}}
	for _, p := range parts {
		m.AddData(p)
	}
	r.b = append(r.b, m.Serialize()...)
}

// write asks for an answer to the last message and puts all into a file.
func (r *requests) write(b testing.TB, name string) string {
	b.Helper()
	at := 0
	for next := 0; next < len(r.b); {
		at = next
		next += int(binary.NativeEndian.Uint32(r.b[at:]))
	}
	flags := r.b[at+6:]
	binary.NativeEndian.PutUint16(flags, binary.NativeEndian.Uint16(flags)|unix.NLM_F_ACK)
	path := filepath.Join(b.TempDir(), name)
	if err := os.WriteFile(path, r.b, 0o600); err != nil {
		b.Fatal(err)
	}
	return path
}

// The kernel lets the maker of a link choose its index, so that all requests can be known beforehand.
const (
	bareHost, barePod = 900001, 900002
	bareNetns         = 100 // the file descriptor under which the program bare has the pod's namespace
	makeNew           = unix.NLM_F_CREATE | unix.NLM_F_EXCL

	addrGenMode, addrGenNone = 8, 1 // IFLA_INET6_ADDR_GEN_MODE, IN6_ADDR_GEN_MODE_NONE, linux/if_link.h
)

var (
	bareHostMAC = net.HardwareAddr{2, 0, 0, 0, 0, 1}
	barePodMAC  = net.HardwareAddr{2, 0, 0, 0, 0, 2}
)

func attr32(typ int, v uint32) *nl.RtAttr { return nl.NewRtAttr(typ, nl.Uint32Attr(v)) }

func linkMessage(index int, flags uint32) *nl.IfInfomsg {
	m := nl.NewIfInfomsg(unix.AF_UNSPEC)
	m.Index, m.Flags, m.Change = int32(index), flags, flags
	return m
}

// link: ip link add bare index N mtu 1280 address MAC addrgenmode none type veth peer name eth0 index N mtu 1280 address MAC netns FD
func (r *requests) link() {
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(unix.IFLA_INFO_KIND, []byte("veth"))
	peer := info.AddRtAttr(unix.IFLA_INFO_DATA, nil).AddRtAttr(nl.VETH_INFO_PEER, nil)
	peer.AddChild(linkMessage(barePod, 0))
	peer.AddRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated("eth0"))
	peer.AddRtAttr(unix.IFLA_MTU, nl.Uint32Attr(1280))
	peer.AddRtAttr(unix.IFLA_ADDRESS, barePodMAC)
	peer.AddRtAttr(unix.IFLA_NET_NS_FD, nl.Uint32Attr(bareNetns))
	r.add(unix.RTM_NEWLINK, makeNew, linkMessage(bareHost, 0), nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated("bare")),
		attr32(unix.IFLA_MTU, 1280), nl.NewRtAttr(unix.IFLA_ADDRESS, bareHostMAC), info)
	r.noLinkLocal(bareHost, unix.IFF_UP)
}

// noLinkLocal: ip link set LINK [up] addrgenmode none. A link whose other end is up gets an address before the kernel reads the mode.
func (r *requests) noLinkLocal(index int, flags uint32) {
	spec := nl.NewRtAttr(unix.IFLA_AF_SPEC, nil)
	spec.AddRtAttr(unix.AF_INET6, nil).AddRtAttr(addrGenMode, []byte{addrGenNone})
	r.add(unix.RTM_SETLINK, 0, linkMessage(index, flags), spec)
}

// neighbour: ip neigh add ADDR lladdr MAC nud permanent dev LINK
func (r *requests) neighbour(index uint32, a netip.Addr, mac net.HardwareAddr) {
	m := &netlink.Ndmsg{Family: unix.AF_INET, Index: index, State: unix.NUD_PERMANENT}
	r.add(unix.RTM_NEWNEIGH, makeNew, m, nl.NewRtAttr(unix.NDA_DST, a.AsSlice()), nl.NewRtAttr(unix.NDA_LLADDR, mac))
}

// route: ip route add DST [via GATEWAY onlink] dev LINK proto PROTOCOL
func (r *requests) route(index uint32, protocol byte, dst netip.Prefix, gateway netip.Addr) {
	m := nl.NewRtMsg()
	m.Family, m.Dst_len, m.Protocol, m.Scope = unix.AF_INET, uint8(dst.Bits()), protocol, unix.RT_SCOPE_LINK
	parts := []nl.NetlinkRequestData{m, nl.NewRtAttr(unix.RTA_DST, dst.Addr().AsSlice()), attr32(unix.RTA_OIF, index)}
	if gateway.IsValid() {
		m.Scope, m.Flags = unix.RT_SCOPE_UNIVERSE, unix.RTNH_F_ONLINK
		parts = append(parts, nl.NewRtAttr(unix.RTA_GATEWAY, gateway.AsSlice()))
	}
	r.add(unix.RTM_NEWROUTE, makeNew, parts...)
}

// bare is what the plugin leaves of a pod, by the fewest requests that do it, as the files that the program bare takes: for the
// host and the pod, and to remove all again.
type bare struct{ host, pod, remove string }

func newBare(b testing.TB) bare {
	b.Helper()
	addr, gateway := netip.MustParseAddr("10.9.0.2"), podlink.Gateway4
	var host, pod, remove requests
	host.link()
	host.neighbour(bareHost, addr, barePodMAC)
	host.route(bareHost, unix.RTPROT_KERNEL, netip.PrefixFrom(addr, 32), netip.Addr{})
	pod.noLinkLocal(barePod, 0)
	pod.add(unix.RTM_NEWLINK, 0, linkMessage(barePod, unix.IFF_UP))
	m := nl.NewIfAddrmsg(unix.AF_INET)
	m.Index, m.Prefixlen = barePod, 32
	pod.add(unix.RTM_NEWADDR, makeNew, m, nl.NewRtAttr(unix.IFA_LOCAL, addr.AsSlice()))
	pod.neighbour(barePod, gateway, bareHostMAC)
	pod.route(barePod, unix.RTPROT_STATIC, netip.PrefixFrom(gateway, 32), netip.Addr{})
	pod.route(barePod, unix.RTPROT_STATIC, netip.MustParsePrefix("0.0.0.0/0"), gateway)
	remove.add(unix.RTM_DELLINK, 0, linkMessage(bareHost, 0))
	return bare{host.write(b, "host"), pod.write(b, "pod"), remove.write(b, "remove")}
}

// TestBareLeavesWhatADDLeaves holds that the floor is that of the same work.
func TestBareLeavesWhatADDLeaves(t *testing.T) {
	p := newPrograms(t).build(t, "bare")
	s, kernel := newSandboxes(t, 1)[0], newBare(t)
	ipam := fmt.Sprintf(`"ipam":{"type":"headcni-ipam","subnet":"10.9.0.0/16","dataDir":%q}`, t.TempDir())
	c := contender{"headcni", "bench-bare", []link{{"headcni", `"mtu":1280,` + ipam}}}
	if err := p.command(c, "ADD", s); err != nil {
		t.Fatal(err)
	}
	want := look(t, podlink.Name(s.id, "eth0"), s)
	if err := p.command(c, "DEL", s); err != nil {
		t.Fatal(err)
	}
	if _, _, err := p.run("bare", nil, nil, kernel.host, s.netns, kernel.pod); err != nil {
		t.Fatal(err)
	}
	diff := ""
	for range 50 { // the kernel brings a link without our look at its carrier into use within milliseconds
		if diff = cmp.Diff(want, look(t, "bare", s)); diff == "" {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	if diff != "" {
		t.Errorf("the program bare leaves another pod than the plugin (-plugin +bare):\n%s", diff)
	}
	if _, _, err := p.run("bare", nil, nil, kernel.remove); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("ip", "link", "show", "bare").CombinedOutput(); err == nil {
		t.Errorf("the program bare does not remove the link:\n%s", out)
	}
}

// differs is what no two attachments have in common: numbers and names of links, MACs and what is made of them.
var differs = regexp.MustCompile(`(?m)^\d+: |@\S+|[0-9a-f]{2}(:[0-9a-f]{2}){5}|fe80::\S+`)

// look tells what `ip` says of both ends of a pod's link.
func look(t *testing.T, host string, s *sandbox) string {
	t.Helper()
	var text strings.Builder
	same := strings.NewReplacer(host, "HOST", " tentative", "") // duplicate address detection may be over
	for _, args := range [][]string{{"addr"}, {"route"}, {"neigh"}, {"-6", "route"}} {
		for _, cmd := range []*exec.Cmd{
			exec.Command("ip", append(args, "show", "dev", host)...),
			exec.Command("nsenter", append(append([]string{"--net=" + s.netns, "ip"}, args...), "show", "dev", "eth0")...),
		} {
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Fatalf("%v: %v\n%s", cmd.Args, err, out)
			}
			fmt.Fprintf(&text, "%v\n%s", args, differs.ReplaceAllString(same.Replace(string(out)), "*"))
		}
	}
	return text.String()
}

// timed is the way that runs a program.
func (p programs) timed(what, name string, env []string, args ...string) way {
	return func(got samples) error {
		_, took, err := p.run(name, nil, env, args...)
		got.add(what, took)
		return err
	}
}

// inOrder is the way that goes several ways, one after another.
func inOrder(ways ...way) way {
	return func(got samples) error {
		for _, w := range ways {
			if err := w(got); err != nil {
				return err
			}
		}
		return nil
	}
}

// BenchmarkFloor shows what is left between us and what no plugin in Go can do without: a process and the kernel's work.
func BenchmarkFloor(b *testing.B) {
	p := newPrograms(b).build(b, "empty", "bare")
	all := newSandboxes(b, 1)
	kernel, version := newBare(b), []string{"CNI_COMMAND=VERSION"}
	socket := filepath.Join(paths.RunDir, "listening", "daemon.sock")
	listen(b, socket)
	openGate(b, "10.1.0.0/16")
	also := func(name, members string) contender {
		return contender{name, headcni.network, []link{{"headcni", headcni.chain[0].members + members}}}
	}
	gate := also("headcni with a gate", `,"gate":{"podCIDRs":["10.1.0.0/16"]}`)
	heard := also("headcni with a daemon", fmt.Sprintf(`,"daemon_socket":%q`, socket))
	lease := ipamContender("headcni-ipam", "headcni-ipam", poolDir(b, "floor"), "")
	got := interleave(b, 150,
		p.timed("start empty Go program", "empty", nil),
		p.timed("start headcni VERSION", "headcni", version),
		p.timed("start headcni-ipam VERSION", "headcni-ipam", version),
		p.timed("start ptp VERSION", "ptp", version),
		p.timed("start host-local VERSION", "host-local", version),
		p.lives(headcni, all, "ADD", "DEL"), p.lives(gate, all, "ADD", "DEL"), p.lives(heard, all, "ADD", "DEL"),
		p.lives(lease, all, "ADD", "DEL"),
		inOrder(
			p.timed("ADD process + kernel's work", "bare", nil, kernel.host, all[0].netns, kernel.pod),
			p.timed("DEL process + kernel's delete", "bare", nil, kernel.remove),
		),
	)
	got["ADD empty Go program"] = got["start empty Go program"]
	got["ADD headcni-ipam VERSION"] = got["start headcni-ipam VERSION"]
	r := newComparison(b, "Above the floor (rows of \"more\" are differences, not ratios):")
	for _, w := range []row{
		{"start", "ms", "headcni VERSION", "empty Go program", ratio, ""},
		{"start", "ms", "headcni-ipam VERSION", "empty Go program", ratio, ""},
		{"start", "ms", "headcni VERSION", "ptp VERSION", ratio, ""},
		{"start", "ms", "headcni-ipam VERSION", "host-local VERSION", ratio, ""},
		{"start", "more, ms", "headcni VERSION", "empty Go program", excess, ""},
		{"ADD", "more, ms", "headcni-ipam", "headcni-ipam VERSION", excess, ""},
		{"ADD", "more, ms", gate.name, headcni.name, excess, ""},
		{"ADD", "more, ms", heard.name, headcni.name, excess, ""},
		{"ADD", "more, ms", "process + kernel's work", "empty Go program", excess, ""},
		{"ADD", "more, ms", headcni.name, "process + kernel's work", excess, "at most +0.5"},
		{"DEL", "ms", headcni.name, "process + kernel's delete", ratio, "at most 1.15"},
	} {
		r.compare(got, w)
	}
}
