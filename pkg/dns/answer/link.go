package answer

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/netset"
)

// The addresses stand on lo: a dummy link of our own is a kernel module that hosts lack. Of scope host the node uses them for nothing else.
const loopback = "lo"

// EnsureAddrs gives the node the addresses, and says which it had to add.
func EnsureAddrs(addrs []netip.Addr) (done []string, err error) {
	lo, err := netlink.LinkByName(loopback)
	if err != nil {
		return nil, fmt.Errorf("look for %s: %w", loopback, err)
	}
	for _, a := range addrs {
		err := netlink.AddrAdd(lo, address(a))
		switch {
		case err == nil:
			done = append(done, fmt.Sprintf("add %s to %s", a, loopback))
		case !errors.Is(err, unix.EEXIST):
			return done, fmt.Errorf("add %s to %s: %w", a, loopback, err)
		}
	}
	return done, nil
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
	}
	return out
}
