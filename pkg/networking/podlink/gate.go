package podlink

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/procfs"
	"github.com/headcni/headcni/internal/rtnl"
	"github.com/headcni/headcni/pkg/config/names"
)

// ErrNotProgrammed: the node's rules or tables are not there, as after a reboot or a flush.
var ErrNotProgrammed = errors.New("node network is not programmed")

// Gate asks the kernel whether the daemon's node network is in force: an address of the node's own CIDR that no pod has
// must lead nowhere, and the rules of both nft tables must be there, and with policy those of NetworkPolicies. It takes some 15 us a question. The
// error matches ErrNotProgrammed if the answer is no.
func (h *Handle) Gate(podCIDRs []netip.Prefix, policy bool) error {
	c, err := h.open()
	if err != nil {
		return err
	}
	for _, cidr := range podCIDRs {
		if err := gateClosed(c, cidr); err != nil {
			return err
		}
	}
	return gateTables(podCIDRs, policy)
}

// gateClosed looks the network's own address up, which no pod is ever given. A blackhole does not count as closed: see
// rtnl.Conn.RouteTo.
func gateClosed(c *rtnl.Conn, cidr netip.Prefix) error {
	a := cidr.Masked().Addr()
	_, err := c.RouteTo(a)
	switch {
	case err == nil:
		return fmt.Errorf("%w: packets to %s, which is free, would leave the node; is headcni-daemon running?", ErrNotProgrammed, a)
	case errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.EACCES):
		return nil
	}
	return fmt.Errorf("%w: %w", ErrNotProgrammed, err)
}

// gateTables: nft list chain ip headcni guard, ip6 headcni guard, inet headcni-policy ingress
func gateTables(podCIDRs []netip.Prefix, policy bool) error {
	c, err := rtnl.Open(unix.NETLINK_NETFILTER)
	if err != nil {
		return fmt.Errorf("%w: the kernel has no nf_tables: %w", ErrNotProgrammed, err)
	}
	defer c.Close()
	for _, t := range []struct {
		family      string
		number      byte
		name, chain string
		absent      bool // it need not be there
		ipv6        bool
	}{
		{"ip", unix.NFPROTO_IPV4, names.NFTTable, names.NFTChain, false, false}, {"ip6", unix.NFPROTO_IPV6, names.NFTTable, names.NFTChain, false, true},
		{"inet", unix.NFPROTO_INET, names.PolicyTable, names.PolicyChain, !policy, false},
	} {
		if t.absent {
			continue
		}
		r := rtnl.Request{
			What: fmt.Sprintf("look for chain %s of nft table %s %s", t.chain, t.family, t.name), Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETCHAIN,
		}
		r.Bytes(t.number, unix.NFNETLINK_V0, 0, 0)
		r.AttrString(unix.NFTA_CHAIN_TABLE, t.name)
		r.AttrString(unix.NFTA_CHAIN_NAME, t.chain)
		replies, err := c.Do(r)
		if err == nil && chainIsEmpty(replies[0]) {
			return fmt.Errorf("%w: chain %s of nft table %s %s has no rules; is headcni-daemon running?", ErrNotProgrammed, t.chain, t.family, t.name)
		}
		if err != nil && t.ipv6 && !anyIPv6(podCIDRs) && (errors.Is(err, unix.EAFNOSUPPORT) || !procfs.HasIPv6()) {
			continue
		}
		if err != nil {
			return fmt.Errorf("%w: %w; is headcni-daemon running?", ErrNotProgrammed, err)
		}
	}
	return nil
}

// nfgenmsgLen is the length of what comes before a message's attributes (struct nfgenmsg).
const nfgenmsgLen = 4

// chainIsEmpty: `nft flush table` leaves the chains. No other chain of ours leads to those that are asked for, so each use is a rule.
func chainIsEmpty(reply []byte) bool {
	if len(reply) < nfgenmsgLen {
		return true
	}
	use := rtnl.Attr(reply[nfgenmsgLen:], unix.NFTA_CHAIN_USE)
	return len(use) != 4 || binary.BigEndian.Uint32(use) == 0
}

func anyIPv6(list []netip.Prefix) bool {
	for _, p := range list {
		if p.Addr().Is6() {
			return true
		}
	}
	return false
}
