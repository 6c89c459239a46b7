package chaos

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/paths"
)

// kind is a way to break something.
type kind struct {
	name   string
	weight int // how often it strikes, beside the others
	// strike breaks it, mend ends what would not end by itself, and after is what is left when all faults of the round are over.
	// The last two may be nil.
	strike, mend, after func(*testing.T, *blow)

	// takes are the lines of defence that it takes away, bare tells that it takes all: see bared.
	takes line
	bare  bool
	// claims is what no other fault may break on the same node at the same time, on no node where everywhere is set.
	claims     string
	everywhere bool
	// alone keeps other faults away.
	alone bool
	// slow is what the daemon looks at each minute, or what waits for Headscale.
	slow bool
	// spoils tells that ADD and DEL may fail meanwhile.
	spoils bool
}

// blow is a fault at work.
type blow struct {
	w *world
	n *node
	s strike
	r round

	pending []*lab.Pod // whose DEL is still to succeed
	want    int        // pods that are still to be added
}

// kinds are all of them, in the order of the table.
func kinds() []*kind {
	return slices.Concat(programKinds(), headscaleKinds(), defenceKinds(), tunnelKinds(), linkKinds(), hostKinds(), fileKinds(), wireKinds(), podKinds(),
		[]*kind{{name: "power cut", weight: 3, alone: true, strike: cutPower}})
}

// near is one of the other nodes.
func (b *blow) near() *node { return b.w.nodes[(b.s.node+1+int(b.s.pick)%(nodes-1))%nodes] }

// shell runs a script on the node that is struck. In it PICK is the fault's number to choose by, and `pick` prints one line of its
// input, if there is any; TUN is the tun, LINK the host's end of the link of a pod, PORT the node's port of the switch, NEAR4 and NEAR6
// another node.
func (b *blow) shell(t *testing.T, at *lab.Machine, script string) {
	t.Helper()
	all := b.n.pods()
	near := b.near()
	script = strings.NewReplacer("PICK", fmt.Sprint(b.s.pick), "TUN", b.n.Tun, "LINK", all[int(b.s.pick)%len(all)].Link(), "PORT", b.n.Port,
		"NEAR4", near.Underlay[0].String(), "NEAR6", near.Underlay[1].String(),
		"GATEWAY4", labtest.ControlAddr(b.w.Lab, false).String(), "GATEWAY6", labtest.ControlAddr(b.w.Lab, true).String()).Replace(script)
	labtest.Sh(t, at, "%s", `pick() { local all; mapfile -t all; ((${#all[@]})) || return 0; printf '%s\n' "${all[`+fmt.Sprint(b.s.pick)+` % ${#all[@]}]}"; }
`+script)
}

// onNode is a script as a fault's part, nil where there is none.
func onNode(script string) func(*testing.T, *blow) {
	if script == "" {
		return nil
	}
	return func(t *testing.T, b *blow) {
		t.Helper()
		b.shell(t, b.n.Machine, script)
	}
}

// script is a kind whose parts are lines of shell on the node.
func script(weight int, name, strike, mend string) *kind {
	return &kind{name: name, weight: weight, strike: onNode(strike), mend: onNode(mend)}
}

// claiming sets what kinds have in common.
func claiming(claims string, ks ...*kind) []*kind {
	for _, k := range ks {
		k.claims = claims
	}
	return ks
}

// signal sends a signal to a process that is named when it strikes.
func signal(sig syscall.Signal, of func(*blow) *lab.Process) func(*testing.T, *blow) {
	return func(t *testing.T, b *blow) {
		t.Helper()
		if err := of(b).Signal(sig); err != nil {
			t.Fatal(err)
		}
	}
}

// process are the ways to break a process: two to end it, after which it is started as systemd would, and to stop it for a while.
func process(weight int, name string, of func(*blow) *lab.Process, start func(*testing.T, *blow)) []*kind {
	return []*kind{
		{name: name + ": kill -9", weight: weight, strike: signal(syscall.SIGKILL, of), mend: start},
		{name: name + ": SIGTERM", weight: weight, strike: signal(syscall.SIGTERM, of), mend: start},
		{name: name + ": SIGSTOP, then SIGCONT", weight: weight, strike: signal(syscall.SIGSTOP, of), mend: signal(syscall.SIGCONT, of)},
	}
}

func programKinds() []*kind {
	return slices.Concat(
		claiming("daemon", process(10, "daemon", func(b *blow) *lab.Process { return b.n.Daemon }, func(t *testing.T, b *blow) {
			if err := b.n.StartDaemon(); err != nil {
				t.Fatal(err)
			}
		})...),
		claiming("tunnel", process(8, "tailscaled", func(b *blow) *lab.Process { return b.n.Tailscaled }, startTailscaled)...),
	)
}

func startTailscaled(t *testing.T, b *blow) {
	t.Helper()
	labtest.StartTailscaled(t, b.n.Node)
}

// Headscale's return takes every node some seconds.
func headscaleKinds() []*kind {
	ks := process(2, "Headscale", func(b *blow) *lab.Process { return b.w.Control.Headscale }, func(t *testing.T, b *blow) {
		if err := b.w.Control.StartHeadscale(labtest.Within(t)); err != nil {
			t.Fatal(err)
		}
	})
	for _, k := range ks[:2] {
		k.after = func(t *testing.T, b *blow) {
			if err := b.w.Control.WaitConnected(labtest.Within(t), nodes); err != nil {
				t.Error(err)
			}
		}
	}
	for _, k := range ks {
		k.claims, k.everywhere, k.slow = "Headscale", true, true
	}
	relay := func(b *blow) *lab.Process { return b.w.Control.Relay }
	return append(ks,
		&kind{name: "relay: SIGSTOP, then SIGCONT", weight: 3, claims: "relay", everywhere: true, strike: signal(syscall.SIGSTOP, relay), mend: signal(syscall.SIGCONT, relay)},
		&kind{name: "Headscale: approve-routes -r ''", weight: 1, alone: true, slow: true, strike: func(t *testing.T, b *blow) {
			node, err := labtest.Registered(t, b.w.Lab, b.n.Node)
			if err != nil {
				t.Fatal(err)
			}
			labtest.Sh(t, b.w.Control.Machine, "headscale nodes approve-routes -i %s -r ''", node.ID)
			// Peers hear of it later: as long as none has, all looks as before.
			labtest.Eventually(t, "a peer hears of it, or the daemon has them approved again", func() error {
				if labtest.Sh(t, b.near().Machine, "ip route show table 52 %s", b.n.PodCIDRs[0]) == "" {
					return nil
				}
				if node, err = labtest.Registered(t, b.w.Lab, b.n.Node); err == nil && len(node.Approved) == 0 {
					err = errors.New("neither")
				}
				return err
			})
		}},
	)
}

// defenceKinds take what keeps packets from the wire away under a living daemon, which is to notice.
func defenceKinds() []*kind {
	anyTable := "f=$(printf '%s\\n' ip ip6 | pick)\n"
	nft := claiming("tables",
		script(6, "nft: table ip headcni deleted", "nft delete table ip headcni", ""),
		script(6, "nft: table ip6 headcni deleted", "nft delete table ip6 headcni", ""),
		script(6, "nft: both tables deleted", labtest.FlushTables, ""),
		script(6, "nft: both tables flushed", "nft flush table ip headcni; nft flush table ip6 headcni", ""),
		script(4, "nft flush ruleset", "nft flush ruleset", ""),
		script(8, "nft: one chain flushed", anyTable+`nft flush chain $f headcni $(nft list table $f headcni | sed -n 's/^\tchain \(.*\) {/\1/p' | pick)`, ""),
		script(8, "nft: one rule deleted", anyTable+`read -r c h < <(nft -a list table $f headcni |
	sed -n '/^\tchain/{s/^\tchain \([^ ]*\).*/\1/;h}; /^\t\t.* # handle/{s/.*# handle //;G;s/\(.*\)\n\(.*\)/\2 \1/p}' | pick)
nft delete rule $f headcni $c handle $h`, ""),
	)
	for _, k := range nft {
		k.takes = tables
	}
	rule := claiming("rules",
		script(10, "ip rule: all of ours deleted", labtest.FlushRules, ""),
		script(10, "ip rule: one of ours deleted", `f=$(printf '%s\n' -4 -6 | pick)
ip $f rule delete pref $(ip $f rule | sed -n 's/^\(51[89][0-9]\):.*/\1/p' | pick)`, ""),
	)
	for _, k := range rule {
		k.takes = rules
	}
	route := claiming("routes",
		script(6, "unreachable routes deleted", labtest.FlushRoutes, ""),
		script(4, "unreachable routes of one family deleted", "ip $(printf '%s\\n' -4 -6 | pick) route flush metric 4278 type unreachable", ""),
	)
	for _, k := range route {
		k.takes = routes
	}
	all := script(4, "tables, rules and unreachable routes at once", strings.Join([]string{labtest.FlushTables, labtest.FlushRules, labtest.FlushRoutes}, "\n"), "")
	all.bare, all.alone = true, true
	return slices.Concat(nft, rule, route, []*kind{all})
}

// tunnelKinds break what tailscaled made.
func tunnelKinds() []*kind {
	const v6off = "/proc/sys/net/ipv6/conf/TUN/disable_ipv6"
	gone := &kind{name: "tun deleted", weight: 4, strike: onNode("ip link delete TUN"), mend: func(t *testing.T, b *blow) {
		labtest.Kill(t, b.n.Tailscaled) // where it has not ended by itself
		startTailscaled(t, b)
	}}
	return append(claiming("tunnel",
		script(6, "tun down", "ip link set TUN down", ""),
		script(6, "tun down and up", "ip link set TUN down; ip link set TUN up", ""),
		script(6, "tun: its addresses deleted", "ip address flush dev TUN scope global", ""),
		script(3, "tun: MTU 1200, which ends IPv6", "ip link set TUN mtu 1200", "ip link set TUN mtu 1280"),
		script(3, "tun: IPv6 off", "echo 1 > "+v6off, "echo 0 > "+v6off),
		gone,
	),
		script(8, "table 52 emptied", "ip route flush table 52; ip -6 route flush table 52", ""),
		script(8, "table 52: one route deleted", `f=$(printf '%s\n' -4 -6 | pick)
ip $f route delete $(ip $f route show table 52 | awk '/ dev / { print $1 }' | pick) table 52 2>/dev/null || :`, ""),
	)
}

// linkKinds break the host's end of a pod's link.
func linkKinds() []*kind {
	const conf = "/proc/sys/net/ipv4/conf/LINK/"
	return slices.Concat(claiming("bridge",
		script(4, "a pod's link in a bridge", "ip link add chaos-bridge type bridge; ip link set chaos-bridge up; ip link set LINK master chaos-bridge", "ip link delete chaos-bridge"),
	), []*kind{
		script(8, "a pod's link down", "ip link set LINK down", ""),
		script(8, "a pod's link down and up", "ip link set LINK down; ip link set LINK up", ""),
		script(8, "a pod's link: routes flushed", "ip route flush dev LINK; ip -6 route flush dev LINK", ""),
		script(8, "a pod's link: addresses flushed", "ip address flush dev LINK", ""),
		script(4, "a pod's link: neighbours flushed", "ip neigh flush dev LINK nud permanent; ip -6 neigh flush dev LINK nud permanent", ""),
		script(4, "a pod's link: IPv6 off", "echo 1 > /proc/sys/net/ipv6/conf/LINK/disable_ipv6", ""),
		script(4, "a pod's link: forwarding=0", "echo 0 > "+conf+"forwarding", ""),
	}, claiming("settings",
		script(4, "a pod's link: rp_filter, arp_ignore and proxy_arp changed", "cd "+conf+`
echo $(cat rp_filter arp_ignore proxy_arp) > /run/chaos-LINK
echo 1 > rp_filter; echo 0 > arp_ignore; echo 1 > proxy_arp`, `f=$(echo /run/chaos-hc*); read -r a b c < $f; rm $f # LINK may be another's by now
cd /proc/sys/net/ipv4/conf/${f#/run/chaos-} 2>/dev/null || exit 0 # its pod is gone
echo $a > rp_filter; echo $b > arp_ignore; echo $c > proxy_arp`),
	))
}

// hostKinds break what belongs to the host.
func hostKinds() []*kind {
	return slices.Concat(
		[]*kind{
			script(5, "net.ipv4.ip_forward=0", "echo 0 > /proc/sys/net/ipv4/ip_forward", ""),
			script(5, "net.ipv6.conf.all.forwarding=0", "echo 0 > /proc/sys/net/ipv6/conf/all/forwarding", ""),
			script(8, "conntrack -F", "conntrack -F 2>/dev/null", ""),
		},
		claiming("default route",
			script(4, "default routes through another node", "ip route replace default via NEAR4; ip -6 route replace default via NEAR6",
				"ip route replace default via GATEWAY4; ip -6 route replace default via GATEWAY6"),
			script(4, "default routes deleted", "ip route delete default; ip -6 route delete default", "ip route add default via GATEWAY4; ip -6 route add default via GATEWAY6"),
		),
		claiming("wide routes",
			script(4, "10.0.0.0/8 and fd00::/8 through another node", "ip route add 10.0.0.0/8 via NEAR4; ip -6 route add fd00::/8 via NEAR6",
				"ip route delete 10.0.0.0/8; ip -6 route delete fd00::/8"),
		),
	)
}

// fileKinds break what is on disk and in /run.
func fileKinds() []*kind {
	conflist := paths.CNIConfDir + "/" + paths.ConflistName
	files := claiming("conflist",
		script(1, "conflist deleted", "rm "+conflist, ""),
		script(1, "conflist cut in half", "truncate -s $(($(stat -c %s "+conflist+") / 2)) "+conflist, ""),
	)
	for _, k := range files {
		k.slow, k.spoils = true, true
	}
	disk := claiming("disk",
		script(4, "/var/lib/headcni read-only", "mount --bind /var/lib/headcni /var/lib/headcni; mount -o remount,bind,ro /var/lib/headcni", "umount -l /var/lib/headcni"),
		script(4, "disk full", "mount -o remount,size=$(df --output=used -k /var/lib | tail -n 1 | tr -d ' ')k /var/lib", "mount -o remount,size=50% /var/lib"),
	)
	for _, k := range disk {
		k.spoils = true
	}
	// tailscaled's socket of daemon mode is in there, too, and tailscaled does not make it again.
	wiped := &kind{name: paths.RunDir + " wiped", weight: 4, claims: "tunnel", strike: onNode("rm -rf " + paths.RunDir + "/*"), mend: func(t *testing.T, b *blow) {
		if b.n.Mode == config.ModeDaemon {
			labtest.Stop(t, b.n.Tailscaled)
			startTailscaled(t, b)
		}
	}}
	return slices.Concat(files, disk, []*kind{wiped, script(5, "sockets for the plugin and for status removed", "rm -f "+paths.DaemonSocket+" "+paths.APISocket, "")})
}

// wireKinds break the underlay.
func wireKinds() []*kind {
	port := func(name, how, back string) *kind {
		set := func(how string) func(*testing.T, *blow) {
			return func(t *testing.T, b *blow) {
				t.Helper()
				b.shell(t, b.w.Control.Machine, "ip link set PORT "+how)
			}
		}
		return &kind{name: name, weight: 5, strike: set(how), mend: set(back)}
	}
	filter := func(name, what string) *kind {
		return script(5, name, `nft 'table inet chaos { chain in { type filter hook input priority -300; iifname "eth0" `+what+` drop; }; }'`,
			"nft delete table inet chaos 2>/dev/null || :") // somebody may have flushed the ruleset
	}
	return claiming("wire",
		port("cable pulled", "down", "up"),
		port("underlay silent", "nomaster", "master underlay"),
		filter("UDP of the underlay blocked", "meta l4proto udp"),
		filter("three of ten packets of the underlay lost", "numgen random mod 10 < 3"),
	)
}
