package live

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"runtime"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Where a probe was sent from.
const (
	FromNamespace = "the pod's network namespace"
	FromLink      = "the pod's link, on its node"
	FromNode      = "the node"
)

// The pair of links by which a packet is made to come in by a pod's.
const injectLink, injectPeer = "headcni-why", "headcni-why1"

// sender sends probes.
type sender struct {
	from  string
	send  func(packet []byte) error
	close func()
}

// senderOf chooses how to send. From a pod: from inside its network namespace where that is open (not -1), else so that it comes in by the pod's
// link as if the pod had sent it.
func senderOf(p Probe, namespace int, link string) (*sender, error) {
	switch {
	case link == "":
		return raw(p, FromNode)
	case namespace < 0:
		return inject(p, link)
	}
	var s *sender
	err := In(namespace, func() (err error) {
		s, err = raw(p, FromNamespace)
		return err
	})
	return s, err
}

// In does something in another network namespace, where a socket stays.
func In(namespace int, do func() error) (err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread ends with this goroutine
		if err = unix.Setns(namespace, unix.CLONE_NEWNET); err == nil {
			err = do()
		}
	}()
	<-done
	return err
}

// raw sends from the network namespace of its thread.
func raw(p Probe, from string) (*sender, error) {
	family := unix.AF_INET6
	var to unix.Sockaddr = &unix.SockaddrInet6{Addr: p.Dst.As16()}
	if p.Dst.Is4() {
		family, to = unix.AF_INET, &unix.SockaddrInet4{Addr: p.Dst.As4()}
	}
	fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return nil, fmt.Errorf("open a raw socket: %w; it needs root", err)
	}
	return &sender{
		from: from, send: func(packet []byte) error { return unix.Sendto(fd, packet, 0, to) }, close: func() { unix.Close(fd) },
	}, nil
}

// inject makes a pair of links, what comes in by one of which the kernel takes for coming in by the pod's: the daemon's container may not enter
// a pod's network namespace. The pair is of use to nobody else, and one that was left by a process that was killed is removed first.
//
//	tc qdisc add dev headcni-why1 ingress
//	tc filter add dev headcni-why1 parent ffff: protocol all u32 match u32 0 0 action mirred ingress redirect dev LINK
func inject(p Probe, link string) (_ *sender, err error) {
	pod, err := netlink.LinkByName(link)
	if err != nil {
		return nil, fmt.Errorf("find the pod's link %s: %w", link, err)
	}
	removePair()
	pair := &netlink.Veth{LinkAttrs: netlink.NewLinkAttrs(), PeerName: injectPeer}
	pair.Name = injectLink
	pair.HardwareAddr, pair.PeerHardwareAddr = net.HardwareAddr{2, 0, 0, 0, 0, 1}, net.HardwareAddr{2, 0, 0, 0, 0, 2} // else systemd changes them
	if err := netlink.LinkAdd(pair); err != nil {
		return nil, fmt.Errorf("make a link to send by: %w", err)
	}
	defer func() {
		if err != nil {
			removePair()
		}
	}()
	peer, err := netlink.LinkByName(injectPeer)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(netlink.LinkSetUp(pair), netlink.LinkSetUp(peer)); err != nil {
		return nil, fmt.Errorf("make a link to send by: %w", err)
	}
	attrs := netlink.QdiscAttrs{LinkIndex: peer.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_INGRESS}
	if err := netlink.QdiscAdd(&netlink.Ingress{QdiscAttrs: attrs}); err != nil {
		return nil, fmt.Errorf("send as the pod (kernel modules sch_ingress, cls_u32 and act_mirred): %w", err)
	}
	redirect := netlink.NewMirredAction(pod.Attrs().Index)
	redirect.MirredAction = netlink.TCA_INGRESS_REDIR
	if err := netlink.FilterAdd(&netlink.U32{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: peer.Attrs().Index, Parent: attrs.Handle, Priority: 1, Protocol: unix.ETH_P_ALL},
		Actions:     []netlink.Action{redirect},
	}); err != nil {
		return nil, fmt.Errorf("send as the pod (kernel modules sch_ingress, cls_u32 and act_mirred): %w", err)
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open a raw socket: %w; it needs root", err)
	}
	// The queue of a link that has just come up still throws packets away.
	if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_QDISC_BYPASS, 1); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("send past the link's queue: %w", err)
	}
	head := slices.Concat(pair.PeerHardwareAddr, pair.HardwareAddr, binary.BigEndian.AppendUint16(nil, etherType(p)))
	return &sender{
		from: FromLink,
		send: func(packet []byte) error {
			return unix.Sendto(fd, slices.Concat(head, packet), 0, &unix.SockaddrLinklayer{Ifindex: pair.Attrs().Index})
		},
		close: func() {
			unix.Close(fd)
			removePair()
		},
	}, nil
}

func etherType(p Probe) uint16 {
	if p.Dst.Is6() {
		return unix.ETH_P_IPV6
	}
	return unix.ETH_P_IP
}

// removePair removes the pair, whoever left it. A link of another kind by that name is not ours.
func removePair() {
	if l, err := netlink.LinkByName(injectLink); err == nil && l.Type() == "veth" {
		_ = netlink.LinkDel(l) // the next one tries again
	}
}
