package podlink

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/headcni/headcni/internal/sysctl"
)

// forwarding are the node's switches, by family.
var forwarding = []struct {
	family string // in words
	ipv6   bool
	key    string
}{{"IPv4", false, sysctl.IPv4Forwarding}, {"IPv6", true, sysctl.IPv6Forwarding}}

// enableForwarding lets the node pass packets of the addresses' families on from link to link, as ptp and bridge do it.
// It is for nodes without a daemon; what is on already stays untouched.
func enableForwarding(addrs []netip.Addr) error {
	for _, f := range forwarding {
		if !slices.ContainsFunc(addrs, func(a netip.Addr) bool { return a.Is6() == f.ipv6 }) {
			continue
		}
		if sysctl.IsOn(f.key) {
			continue
		}
		if f.ipv6 {
			if err := keepRADefaultRoutes(); err != nil {
				return err
			}
		}
		if err := sysctl.Write(f.key, "1"); err != nil {
			return fmt.Errorf("let the node forward %s: %w", f.family, err)
		}
	}
	return nil
}

// keepRADefaultRoutes lets links go on taking router advertisements that have given the node a default route: once it
// forwards, the kernel would drop that route unless accept_ra is 2.
func keepRADefaultRoutes() error {
	table, err := os.ReadFile("/proc/net/ipv6_route")
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look for default routes by router advertisement: %w", err)
	}
	for _, link := range linksWithRADefault(string(table)) {
		key := sysctl.IPv6Link(link, "accept_ra")
		if ra, err := sysctl.Read(key); err != nil || ra != "1" {
			continue // the link is gone, or somebody has chosen
		}
		if err := sysctl.Write(key, sysctl.AcceptRAWithForwarding); err != nil {
			return fmt.Errorf("keep the default route over %s: %w", link, err)
		}
	}
	return nil
}

// linksWithRADefault finds the links of default routes by router advertisement in /proc/net/ipv6_route: ten fields a line,
// the destination, its length, four of no interest, metric, two counters, flags and link (net/ipv6/route.c).
func linksWithRADefault(table string) (links []string) {
	const rtfAddrconf = 0x00040000 // linux/ipv6_route.h: RTF_ADDRCONF, learned by router advertisement
	for line := range strings.Lines(table) {
		f := strings.Fields(line)
		if len(f) != 10 || f[1] != "00" || f[0] != strings.Repeat("0", 32) {
			continue
		}
		if flags, err := strconv.ParseUint(f[8], 16, 32); err == nil && flags&rtfAddrconf != 0 {
			links = append(links, f[9])
		}
	}
	return links
}
