package manual

import (
	"fmt"
	"strings"
	"testing"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
	"github.com/headcni/headcni/internal/netset"
)

// podmanConf has Debian's podman use CNI, as it did before it had a network program of its own.
const podmanConf = `[network]
network_backend = "cni"
cni_plugin_dirs = ["/opt/cni/bin"]
network_config_dir = "/etc/cni/net.d"

[engine]
cgroup_manager = "cgroupfs"
events_logger = "none"
`

// podmanRun starts a container in the network of HeadCNI. What podman keeps is where nobody looks for what HeadCNI leaves.
const podmanRun = "podman --root /var/tmp/podman --runroot /run/podman-test --storage-driver vfs run --rm --cgroups=disabled --network headcni %s --rootfs /srv/box /bin/busybox %s"

// podman is a runtime that hands the DNS part of a result to its containers: they ask magic_dns' name server, and what else they were
// given, reach a container of the other machine by its real address, and the runtime takes its addresses back.
func (w *world) podman(t *testing.T) {
	w.host.t, w.daemon.t = t, t
	for _, m := range w.both() {
		m.root(fmt.Sprintf("printf 'dns: {magicDNS: {enable: true, searchDomains: [%s]}}\\n' >>/etc/headcni/daemon.yaml && systemctl restart headcni-daemon", lab.BaseDomain))
	}
	w.ready(t)
	for _, m := range w.both() {
		labtest.Eventually(t, "the conflist has magic_dns", func() error {
			_, err := m.try(labtest.Within(t), "root", "grep -q magic_dns /etc/cni/net.d/10-headcni.conflist")
			return err
		})
	}
	leases := func(m *machine) string { return m.root("ls /var/lib/headcni/ipam/*/") }
	before := leases(w.host)
	resolv := w.host.root(fmt.Sprintf(podmanRun, "", "cat /etc/resolv.conf"))
	for _, want := range []string{"nameserver " + netset.ResolverIPv4.String(), "search " + lab.BaseDomain} {
		if !strings.Contains(resolv, want) {
			t.Errorf("the container's resolv.conf lacks %q:\n%s", want, resolv)
		}
	}
	other := w.daemon.Name + "." + lab.BaseDomain
	answer := w.host.root(fmt.Sprintf(podmanRun, "", "nslookup "+other))
	found := false
	for _, a := range labtest.TailnetAddrs(t, w.daemon.Node) {
		found = found || strings.Contains(answer, a.String())
	}
	if !found {
		t.Errorf("the container does not find %s:\n%s", other, answer)
	}
	asked := w.host.root(fmt.Sprintf(podmanRun, "--dns 192.0.2.53 --dns-search example.com", "cat /etc/resolv.conf"))
	if !strings.Contains(asked, "nameserver 192.0.2.53") || !strings.Contains(asked, "example.com") {
		t.Errorf("what the container was given by hand is not in its resolv.conf:\n%s", asked)
	}
	for _, p := range w.pods(t) {
		for _, a := range p.addrs {
			labtest.Eventually(t, fmt.Sprintf("from a container to %s at %s", p.name, a), func() error {
				_, err := w.host.try(labtest.Within(t), "root", fmt.Sprintf(podmanRun, "--cap-add NET_RAW", "ping -c 1 -W 5 "+a.String()))
				return err
			})
		}
	}
	if after := leases(w.host); after != before {
		t.Errorf("leases before:\n%safter podman's containers have ended:\n%s", before, after)
	}
	w.host.root("rm -f /etc/cni/net.d/cni.lock") // of podman's own
}
