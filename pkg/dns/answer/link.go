package answer

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/netset"
)

// The addresses stand on lo: a dummy link of our own is a kernel module that hosts lack. The node uses them for nothing else: in IPv4 they
// are of scope host; IPv6 has no such scope, and would take one that is on the first link as its own where no other fits better, as while
// a link's own address is gone. There they are deprecated, which is the last that it takes (RFC 6724, section 5, rule 3).
const loopback = "lo"

// port is DNS'.
const port = 53

// EnsureAddrs gives the node the addresses, and says what it had to do.
//
// They are there before a tailscaled of ours starts (Ahead): for each that comes later it binds its sockets anew, which loses a packet.
func EnsureAddrs(addrs []netip.Addr) (done []string, err error) {
	lo, err := netlink.LinkByName(loopback)
	if err != nil {
		return nil, fmt.Errorf("look for %s: %w", loopback, err)
	}
	for _, a := range addrs {
		err := netlink.AddrAdd(lo, address(a))
		if errors.Is(err, unix.EEXIST) {
			if !preferred(lo, a) {
				continue
			}
			err = netlink.AddrReplace(lo, address(a))
		}
		if err != nil {
			return done, fmt.Errorf("add %s to %s: %w", a, loopback, err)
		}
		done = append(done, fmt.Sprintf("add %s to %s", a, loopback))
	}
	return done, nil
}

// preferred reports whether the node may take the address as its own, as one that an older version of ours has added.
func preferred(lo netlink.Link, a netip.Addr) bool {
	have, err := netlink.AddrList(lo, netlink.FAMILY_V6)
	return (err == nil || errors.Is(err, netlink.ErrDumpInterrupted)) && slices.ContainsFunc(have, func(b netlink.Addr) bool {
		return b.Equal(*address(a)) && b.Flags&unix.IFA_F_DEPRECATED == 0
	})
}

// Ahead gives the node the addresses although nobody answers there yet: a question is refused until somebody does, and whoever asked goes on
// to the next server. Where another program listens at port 53 of all addresses it would be asked: then they do not come (see Server.Run).
func Ahead(addrs []netip.Addr) (done []string, err error) {
	for _, file := range []string{"udp", "udp6", "tcp", "tcp6"} {
		f, err := os.Open("/proc/thread-self/net/" + file)
		if errors.Is(err, fs.ErrNotExist) {
			continue // a kernel without IPv6
		}
		if err != nil {
			return nil, fmt.Errorf("look who listens at port %d: %w", port, err)
		}
		taken, err := listens(f)
		f.Close()
		if err != nil {
			return nil, fmt.Errorf("look who listens at port %d: %w", port, err)
		}
		if taken {
			return nil, nil
		}
	}
	return EnsureAddrs(addrs)
}

// listens reports whether a socket in a file such as /proc/net/udp is bound to the port at all addresses (proc_pid_net(5)): its second word
// is address and port in hexadecimal digits.
func listens(file io.Reader) (bool, error) {
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		words := strings.Fields(lines.Text())
		if len(words) < 2 {
			continue
		}
		if addr, at, _ := strings.Cut(words[1], ":"); at == fmt.Sprintf("%04X", port) && strings.Trim(addr, "0") == "" {
			return true, nil
		}
	}
	return false, lines.Err()
}

// RemoveAddrs takes them away.
func RemoveAddrs() error {
	lo, err := netlink.LinkByName(loopback)
	if err != nil {
		return fmt.Errorf("look for %s: %w", loopback, err)
	}
	for _, a := range []netip.Addr{netset.AnswererIPv4, netset.AnswererIPv6} {
		err := netlink.AddrDel(lo, address(a))
		// EACCES and EAFNOSUPPORT are of a kernel without IPv6.
		if err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) && !errors.Is(err, unix.EACCES) && !errors.Is(err, unix.EAFNOSUPPORT) && !errors.Is(err, unix.EOPNOTSUPP) {
			return fmt.Errorf("take %s from %s: %w", a, loopback, err)
		}
	}
	return nil
}

func address(a netip.Addr) *netlink.Addr {
	out := &netlink.Addr{IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}, Scope: unix.RT_SCOPE_HOST}
	if a.Is6() {
		out.Flags = unix.IFA_F_NODAD
		out.ValidLft, out.PreferedLft = math.MaxUint32, 0 // valid for ever, and deprecated
	}
	return out
}
