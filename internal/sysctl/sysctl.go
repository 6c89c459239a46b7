// Package sysctl reads and writes the kernel's settings below /proc/sys. A key is a path there, such as net/ipv4/ip_forward;
// those below net are of the network namespace of the calling thread.
package sysctl

import (
	"errors"
	"fmt"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/procfs"
)

const (
	// Root is where the kernel shows its settings.
	Root = "/proc/sys"
	// hostRoot is where a container has the host's /proc/sys/net mounted once more (below net). A runtime makes the
	// container's own /proc/sys read-only unless it is privileged, and lets nothing be mounted below /proc. Both show the
	// sysctls of the reader's network namespace, which is the host's (hostNetwork).
	hostRoot = "/host/proc/sys"
)

// The switches by which the whole host forwards packets.
const (
	IPv4Forwarding = "net/ipv4/ip_forward"
	IPv6Forwarding = "net/ipv6/conf/all/forwarding"
)

// AcceptRAWithForwarding is the value of accept_ra that keeps accepting router advertisements while forwarding (kernel:
// ip-sysctl.rst, accept_ra).
const AcceptRAWithForwarding = "2"

// IPv6Link is the key of a link's own IPv6 setting.
func IPv6Link(link, name string) string { return "net/ipv6/conf/" + link + "/" + name }

// IPv4LinkForwarding is the key of a link's own switch: what comes in by the link is forwarded only where it is 1, whatever
// the host's switch says (kernel: ip-sysctl.rst, conf/interface/forwarding). IPv6 has no such switch.
func IPv4LinkForwarding(link string) string { return "net/ipv4/conf/" + link + "/forwarding" }

// IPv4LinkReversePath is the key of whether what comes in by a link must have a source that a route leads back to: 0 no, 1 by that link, 2 by any. The
// greater of this and that of "all" counts (kernel: ip-sysctl.rst, rp_filter).
func IPv4LinkReversePath(link string) string { return "net/ipv4/conf/" + link + "/rp_filter" }

// IPv4LinkAcceptLocal is the key of whether it may have an address of the host's own as source (kernel: ip-sysctl.rst, accept_local).
func IPv4LinkAcceptLocal(link string) string { return "net/ipv4/conf/" + link + "/accept_local" }

// IPv4LinkARPIgnore is the key of whether a link answers ARP requests, and thereby learns who asks.
func IPv4LinkARPIgnore(link string) string { return "net/ipv4/conf/" + link + "/arp_ignore" }

// ARPIgnoreAll answers none (kernel: ip-sysctl.rst, arp_ignore).
const ARPIgnoreAll = "8"

// IPv4LinkSourceRoute is the key of whether a packet that comes in by the link may name its way itself (RFC 791: source route): through the node to
// somebody whom no rule has seen. The host's switch, mostly 0, must allow it too (kernel: ip-sysctl.rst, accept_source_route).
func IPv4LinkSourceRoute(link string) string { return "net/ipv4/conf/" + link + "/accept_source_route" }

// Read returns a setting's value. Errors are as those of os.ReadFile.
func Read(key string) (string, error) { return procfs.Read(filepath.Join(Root, key)) }

// IsOn reports whether a switch is 1. One that cannot be read is not.
func IsOn(key string) bool {
	v, err := Read(key)
	return err == nil && v == "1"
}

// Write sets a value, from a container too.
func Write(key, value string) error { return writeIn(Root, hostRoot, key, value) }

// writeIn writes below root, and below other where root is read-only.
func writeIn(root, other, key, value string) error {
	err := procfs.Write(filepath.Join(root, key), value)
	if !errors.Is(err, unix.EROFS) {
		return err
	}
	err2 := procfs.Write(filepath.Join(other, key), value)
	if err2 == nil {
		return nil
	}
	return fmt.Errorf("%w, and %w: mount the host's /proc/sys/net there (the chart does), or set it on the host yourself", err, err2)
}
