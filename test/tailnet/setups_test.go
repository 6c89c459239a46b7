package tailnet

import (
	"cmp"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
	"github.com/headcni/headcni/pkg/findings"
)

// patience is how long a finding may take, or to be gone: tailscaled and the daemon try again after some seconds, and this machine may be busy.
const patience = 2 * labtest.Soon

// setup is a way to break a node, what doctor is to find then, and how to mend it.
type setup struct {
	name string
	// at is the node of the lab of setups.
	at int
	// sh and mend are lines of shell on it; do and undo what is no shell.
	sh, mend string
	do, undo func(*testing.T, *lab.Lab, *lab.Node)
	// back is a line of shell that must succeed where nothing is to be found: what was broken is right again by itself.
	back string
	// restart starts the daemon anew after both: what it reads or asks once.
	restart bool
	want    findings.ID
	// says is a word of the cause.
	says string
}

const (
	keepKey  = "mv " + lab.KeyFile + " /etc/headcni/kept; "
	backKey  = "mv /etc/headcni/kept " + lab.KeyFile
	keepYAML = "cp /etc/headcni/daemon.yaml /etc/headcni/kept.yaml; "
	backYAML = "mv /etc/headcni/kept.yaml /etc/headcni/daemon.yaml"
	// newLink makes a network of the host's own; its name and its address are to be filled in.
	newLink = "ip link add %s type veth peer name other0; ip address add %s dev %[1]s; ip link set %[1]s up"
	// netBirdPast has what errors.md says to do beside NetBird.
	netBirdPast = "ip rule add pref 103 to N.0/24 lookup main; ip rule add pref 104 to 10.244.0.0/16 lookup 52; ip rule add pref 105 lookup main suppress_prefixlength 0; " +
		"ip rule add pref 110 not fwmark 0x1bd00 lookup 7120"
	readOnly = "mount --bind /proc/sys /proc/sys; mount -o remount,bind,ro /proc/sys"
)

// broken are set-ups of a running node. N is its pod range without the last number.
var brokenSetups = []setup{
	{name: "tailscaled is dead", at: ownHost, do: endTailscaled, undo: startTailscaled, want: findings.TailscaledSilent, says: "answer"},
	{name: "the dedicated tailscaled is dead", at: ownDaemon, do: endTailscaled, undo: startTailscaled, want: findings.TailscaledSilent, says: "headcni-tailscaled"},
	{name: "tailscaled's state is zeros", at: ownHost, do: zeroState, undo: keptState, want: findings.TailscaledState, says: "tailscaled.state"},
	{name: "tailscaled writes the host's resolver", at: ownHost, sh: "tailscale set --accept-dns=true", mend: "tailscale set --accept-dns=false", want: findings.NamesRisk, says: "accept-dns"},
	{name: "tailscale down", at: ownHost, sh: "tailscale down", mend: "tailscale up", want: findings.TailscaledStopped, says: "tailscale up"},
	{name: "tailscaled's shields are up", at: ownHost, sh: "tailscale set --shields-up", mend: "tailscale set --shields-up=false", want: findings.ShieldsUp, says: "shields-up=false"},
	{name: "the API key is wrong", at: ownHost, sh: keepKey + "(umask 077; echo " + wrongKey + " >" + lab.KeyFile + ")", mend: backKey, restart: true, want: findings.APIKeyRefused, says: "refused"},
	{name: "the API key has ended", at: ownDaemon, do: expiredKey, mend: backKey, restart: true, want: findings.APIKeyRefused, says: "refused"},
	{name: "there is no key", at: ownHost, sh: keepKey, mend: backKey, restart: true, want: findings.NoKey, says: "api-key"},
	{name: "all can read the key", at: ownHost, sh: "chmod 0644 " + lab.KeyFile, mend: "chmod 0600 " + lab.KeyFile, restart: true, want: findings.KeyExposed, says: "chmod 0600"},
	{name: "Headscale is out of reach", at: ownDaemon, sh: "nft 'table ip away { chain out { type filter hook output priority 0; tcp dport 8080 drop; }; }'", mend: "nft delete table ip away", restart: true,
		want: findings.HeadscaleUnreached, says: "cannot reach Headscale"},
	{name: "the LAN is inside the pods' range", at: ownHost, sh: fmt.Sprintf(newLink, "lan0", "N.2/28"), mend: "ip link del lan0", want: findings.RangeOverlapsHost, says: "10.244.1.0/28"},
	{name: "docker0 is inside the pods' range", at: ownDaemon, sh: "ip link add docker0 type bridge; ip address add N.1/25 dev docker0; ip link set docker0 up", mend: "ip link del docker0",
		want: findings.RangeOverlapsHost, says: "10.244.2.0/25"},
	{name: "a network of the host in 100.64.0.0/10", at: ownHost, sh: fmt.Sprintf(newLink, "cloud0", "100.99.0.1/24"), mend: "ip link del cloud0", want: findings.HostInTailnet, says: "disable-linux-cgnat-drop-rule"},
	{name: "a link named as pods' links are", at: ownDaemon, sh: fmt.Sprintf(newLink, "hcloud0", "192.0.2.1/24"), mend: "ip link del hcloud0", restart: true, want: findings.NamedAsPods, says: "hcloud0"},
	{name: "another CNI comes first", at: ownHost, sh: "echo '{}' >/etc/cni/net.d/05-flannel.conflist", mend: "rm /etc/cni/net.d/05-flannel.conflist", want: findings.OtherCNI, says: "05-flannel.conflist"},
	{name: "the plugin is missing", at: ownHost, sh: "mv /opt/cni/bin/headcni /opt/cni/bin/away", mend: "mv /opt/cni/bin/away /opt/cni/bin/headcni", restart: true, want: findings.PluginMissing, says: "headcni-daemon install"},
	{name: "the plugin cannot be run", at: ownDaemon, sh: "mv /opt/cni/bin/headcni /opt/cni/bin/away; install -m 0644 /dev/null /opt/cni/bin/headcni", mend: "mv /opt/cni/bin/away /opt/cni/bin/headcni", restart: true,
		want: findings.PluginMissing, says: "cannot be run"},
	{name: "the plugin's folder is mounted noexec", at: ownDaemon, sh: "mkdir /run/was; cp -aL /opt/cni/bin/. /run/was; mount -t tmpfs -o noexec tmpfs /opt/cni/bin; cp -a /run/was/. /opt/cni/bin",
		mend: "umount /opt/cni/bin; rm -r /run/was", restart: true, want: findings.PluginMissing, says: "noexec"},
	{name: "a mesh was taken off and its entry left", at: ownHost, sh: `cp /etc/cni/net.d/10-headcni.conflist /run/was.conflist; sed -i 's#^  "plugins": \[#&{"type": "istio-cni"},#' /etc/cni/net.d/10-headcni.conflist`,
		mend: "cp /run/was.conflist /etc/cni/net.d/10-headcni.conflist", restart: true, want: findings.PluginMissing, says: "names istio-cni, not in /opt/cni/bin"},
	{name: "the IPAM plugin is not there", at: ownDaemon, sh: keepYAML + `sed -i 's#^{#{"ipam":{"type":"host-local"},#' /etc/headcni/daemon.yaml`, mend: backYAML,
		restart: true, want: findings.PluginMissing, says: "names host-local, not in /opt/cni/bin"},
	{name: "a firewall drops pods' packets", at: ownHost, sh: "nft 'table inet strict { chain fw { type filter hook forward priority 10; policy drop; }; }'", mend: "nft delete table inet strict",
		want: findings.ForeignFirewall, says: "inet strict fw"},
	{name: "a rule of a VPN before ours", at: ownHost, sh: "ip route add default via 192.168.77.1 table 77; ip rule add pref 100 lookup 77", mend: "ip rule del pref 100; ip route flush table 77",
		want: findings.RuleAhead, says: "100:"},
	{name: "a rule that sends pods nowhere", at: ownDaemon, sh: "ip -6 rule add pref 90 to fd00:244::/32 unreachable", mend: "ip -6 rule del pref 90", want: findings.RuleAhead, says: "fd00:244::/32"},
	{name: "a rule for other packets before ours", at: ownHost, sh: "ip route add default via 192.168.77.1 table 77; ip rule add pref 100 from 192.168.99.0/24 lookup 77", mend: "ip rule del pref 100; ip route flush table 77",
		restart: true, want: nothing},
	{name: "a rule for the node's own address before ours", at: ownHost, sh: "ip route add default via 192.168.77.1 table 77; ip rule add pref 100 from 192.168.77.0/24 lookup 77",
		mend: "ip rule del pref 100; ip route flush table 77", want: findings.RuleAhead, says: "own pods"},
	{name: "NetBird's rules", at: ownDaemon, sh: "for f in -4 -6; do ip $f rule add pref 105 lookup main suppress_prefixlength 0; ip $f rule add pref 110 not fwmark 0x1bd00 lookup 7120; done",
		mend: "for f in -4 -6; do ip $f rule del pref 105; ip $f rule del pref 110; done", want: findings.RuleAhead, says: "105:"},
	{name: "NetBird's rules, and pods are led past them", at: ownDaemon, sh: netBirdPast, mend: "for p in 103 104 105 110; do ip rule del pref $p; done", restart: true, want: nothing},
	{name: "a VPN of wg-quick", at: ownHost, sh: "ip link add wg0 type veth peer name wg1; ip link set wg0 up; ip link set wg1 up; ip route add default dev wg0 table 51820; ip rule add not fwmark 51820 table 51820; ip rule add table main suppress_prefixlength 0",
		mend: "ip rule del not fwmark 51820 table 51820; ip rule del table main suppress_prefixlength 0; ip link del wg0", want: findings.RuleAhead, says: "51820"},
	{name: "forwarding is off", at: ownHost, sh: "echo 0 >/proc/sys/net/ipv4/ip_forward; echo 0 >/proc/sys/net/ipv6/conf/all/forwarding", want: nothing, back: "grep -q 1 /proc/sys/net/ipv4/ip_forward && grep -q 1 /proc/sys/net/ipv6/conf/all/forwarding"},
	{name: "forwarding is off, and cannot be set", at: ownHost, sh: "echo 0 >/proc/sys/net/ipv4/ip_forward; " + readOnly, mend: "umount /proc/sys", want: findings.RoutingRules, says: "forward"},
	{name: "rp_filter is strict", at: ownDaemon, sh: "for f in /proc/sys/net/ipv4/conf/*/rp_filter; do echo 1 >$f; done", restart: true, want: nothing},
	{name: "our nftables are deleted", at: ownHost, sh: labtest.FlushTables, want: nothing, back: "nft list chain ip headcni guard && nft list chain ip6 headcni guard"},
	{name: "our rules are deleted", at: ownDaemon, sh: labtest.FlushRules, want: nothing, back: "ip rule | grep -q ^5191: && ip -6 rule | grep -q ^5191:"},
	{name: "table 52 is flushed", at: ownHost, sh: "ip route flush table 52; ip -6 route flush table 52", want: nothing, back: "ip route show table 52 | grep -q ^10.244.2.0/24"},
	{name: "the tun is down", at: ownDaemon, sh: "ip link set headcni01 down", want: nothing, back: "ip route show table 52 | grep -q ^10.244.1.0/24"},
	{name: "the disk is full", at: ownDaemon, sh: "mkdir -p /run/was; cp -a /var/lib/headcni/. /run/was; mount -t tmpfs -o size=2m,mode=0700 tmpfs /var/lib/headcni; cp -a /run/was/. /var/lib/headcni; " +
		"rm -f /var/lib/headcni/daemon.json; dd if=/dev/zero of=/var/lib/headcni/fill bs=4k 2>/dev/null || :", mend: "umount /var/lib/headcni", restart: true, want: findings.StateNotKept, says: "no space left"},
	{name: "no UDP gets out", at: ownHost, sh: "nft 'table inet closed { chain in { type filter hook input priority -500; udp dport 41641 drop; }; chain out { type filter hook output priority -500; udp sport 41641 drop; }; }'",
		mend: "nft delete table inet closed", want: findings.UDPBlocked, says: "node-2"},
	{name: "tailscaled is in another tailnet", at: ownHost, sh: keepYAML + "sed -i 's#http://192.168.77.1:8080#http://192.168.77.9:8080#' /etc/headcni/daemon.yaml", mend: backYAML, restart: true,
		want: findings.OtherControl, says: "192.168.77.9"},
	{name: "the node's range is another's", at: ownDaemon, sh: keepYAML + `sed -i 's#10.244.2.0/24#10.244.1.0/24#' /etc/headcni/daemon.yaml`, mend: backYAML, restart: true, want: findings.RangeTaken, says: "10.244.1.0/24"},
}

// Doctor names each of these set-ups, with cause and remedy, and is silent before and after.
func TestBrokenSetups(t *testing.T) {
	l := setups.Enter(t)
	labtest.Sh(t, l.Nodes[ownHost].Machine, "tailscale set --accept-dns=false") // the only thing that is found on a new lab
	for _, n := range l.Nodes[:untouched] {
		silentOn(t, n)
	}
	for _, s := range brokenSetups {
		n := l.Nodes[s.at]
		t.Run(strings.ReplaceAll(s.name, " ", "_"), func(t *testing.T) {
			began := time.Now()
			defer func() {
				found := time.Now()
				s.apply(t, l, n, s.mend, s.undo)
				for _, n := range l.Nodes[:untouched] {
					silentOn(t, n)
				}
				t.Logf("%s after %.1f s, right again %.1f s later", cmp.Or(string(s.want), "right"), found.Sub(began).Seconds(), time.Since(found).Seconds())
			}()
			s.apply(t, l, n, s.sh, s.do)
			switch {
			case s.want != nothing:
				finds(t, n, s.want, s.says)
			case s.back != "":
				labtest.EventuallyWithin(t, patience, "right again by itself", func() error {
					_, err := n.Run(labtest.Within(t), "bash", "-c", s.back)
					return err
				})
				silentOn(t, n)
			default:
				silentOn(t, n)
			}
		})
	}
}

func (s setup) apply(t *testing.T, l *lab.Lab, n *lab.Node, sh string, do func(*testing.T, *lab.Lab, *lab.Node)) {
	t.Helper()
	if s.restart {
		labtest.Stop(t, n.Daemon)
	}
	if sh != "" {
		labtest.Sh(t, n.Machine, "%s", strings.ReplaceAll(sh, "N.", strings.TrimSuffix(n.PodCIDRs[0].Addr().String(), "0")))
	}
	if do != nil {
		do(t, l, n)
	}
	if s.restart {
		if err := n.StartDaemon(); err != nil {
			t.Fatal(err)
		}
	}
}

// silentOn waits until doctor finds nothing.
func silentOn(t *testing.T, n *lab.Node) {
	t.Helper()
	labtest.EventuallyWithin(t, patience, "doctor is silent on "+n.Name, func() error {
		r, _, err := examined(t, n, "")
		if err == nil && (len(r.Findings) > 0 || !r.Nodes[0].Status.Ready) {
			err = fmt.Errorf("%+v", r.Findings)
		}
		return err
	})
}

// finds waits until doctor names the finding, with a word of its cause, and with what to do.
func finds(t *testing.T, n *lab.Node, want findings.ID, says string) {
	t.Helper()
	labtest.EventuallyWithin(t, patience, "doctor finds "+string(want)+" on "+n.Name, func() error {
		r, code, err := examined(t, n, "")
		if err != nil {
			return err
		}
		return named(r, code, want, says)
	})
}

func endTailscaled(t *testing.T, _ *lab.Lab, n *lab.Node) { labtest.Stop(t, n.Tailscaled) }

func startTailscaled(t *testing.T, _ *lab.Lab, n *lab.Node) { labtest.StartTailscaled(t, n) }

// zeroState is what a power failure leaves on some file systems.
func zeroState(t *testing.T, l *lab.Lab, n *lab.Node) {
	endTailscaled(t, l, n)
	labtest.Sh(t, n.Machine, "cd /var/lib/tailscale; cp tailscaled.state kept; head -c 2048 /dev/zero >tailscaled.state")
	startTailscaled(t, l, n)
}

func keptState(t *testing.T, l *lab.Lab, n *lab.Node) {
	endTailscaled(t, l, n)
	labtest.Sh(t, n.Machine, "cd /var/lib/tailscale; mv kept tailscaled.state")
	startTailscaled(t, l, n)
}

// newKey makes an API key with Headscale's own client.
func newKey(t *testing.T, l *lab.Lab) string {
	t.Helper()
	return labtest.LastWord(t, labtest.Sh(t, l.Control.Machine, "headscale apikeys create"))
}

func expiredKey(t *testing.T, l *lab.Lab, n *lab.Node) {
	key := newKey(t, l)
	labtest.Sh(t, n.Machine, keepKey+"(umask 077; echo %s >%s)", key, lab.KeyFile)
	labtest.Sh(t, l.Control.Machine, "headscale apikeys expire --prefix %s", strings.TrimPrefix(key, "hskey-api-")[:12])
}
