package nodedns

import (
	"bufio"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/config/netconf"
	"github.com/headcni/headcni/pkg/findings"
	"github.com/headcni/headcni/pkg/reconcile"
	"github.com/headcni/headcni/pkg/tailscale"
)

// resolvConfs are where the name servers stand that pods with the host's resolver get (dnsPolicy Default, and CoreDNS as a rule). In a
// container it is kubelet's choice. On a host with systemd-resolved the first has the local stub alone, and kubelet is given the second.
var resolvConfs = []string{"/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"}

// Nameservers are those of the first file that has one that is not the host's loopback. What cannot be read has none. root is where the
// host's files are.
func Nameservers(root string) (found []netip.Addr) {
	for _, path := range resolvConfs {
		f, err := os.Open(filepath.Join(root, path))
		if err != nil {
			continue
		}
		for lines := bufio.NewScanner(f); lines.Scan(); {
			words := strings.Fields(lines.Text())
			if len(words) < 2 || words[0] != "nameserver" {
				continue
			}
			if a, err := netip.ParseAddr(words[1]); err == nil && !a.IsLoopback() {
				found = append(found, a)
			}
		}
		f.Close()
		if found != nil {
			break
		}
	}
	return found
}

// FarResolver says that pods do not reach a name server that the host reaches by its default route: to pods that range is the tailnet's,
// but for networks to which the host has a route of its own. The tailnet's resolver they do reach, and so what its devices have or lead to.
// shared are the networks that the host has inside the tailnet's IPv4 range.
func FarResolver(t *tailscale.Status, nameservers []netip.Addr, shared []netip.Prefix) error {
	if t == nil {
		return nil
	}
	for _, a := range nameservers {
		contains := func(p netip.Prefix) bool { return p.Contains(a) }
		if !netset.TailnetIPv4.Contains(a) || a.String() == netconf.MagicDNSServer || slices.ContainsFunc(shared, contains) ||
			slices.Contains(t.Self.IPs, a) {
			continue
		}
		known := false
		for _, p := range t.Peers {
			known = known || slices.Contains(p.IPs, a) || slices.ContainsFunc(p.Routes, contains)
		}
		if !known {
			return reconcile.Warning{Err: findings.Errorf(findings.ResolverFar, "the host's name server %s is in %s, where pods reach the tailnet alone: pods with the host's resolver "+
				"(dnsPolicy Default, CoreDNS as a rule) get no answers from it; give the host a route of its own to it, such as `ip route add %[1]s via "+
				"GATEWAY`, which has to come back at a boot, or give kubelet another resolvConf", a, netset.TailnetIPv4)}
		}
	}
	return nil
}
