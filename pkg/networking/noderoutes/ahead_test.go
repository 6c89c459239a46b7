package noderoutes

import (
	"strings"
	"testing"

	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/pkg/findings"
)

// Rules of others before ours are named where they lead elsewhere what pods send to other nodes' pods or the node to its own, and else nothing
// is said of them.
func TestAhead(t *testing.T) {
	ns := nstest.New(t)
	cfg := typical()
	ahead := func() (err error) {
		ns.Do(t, func() error { err = Ahead(cfg.Own, cfg.Cluster); return nil })
		return err
	}
	mustSync(t, ns, New(Saved{}, nil), cfg)
	ns.Run(t, "sh", "-c", "ip link add lan0 type veth peer name lan1; ip link set lan0 up; ip link set lan1 up; ip address add 192.0.2.2/24 dev lan0; ip route add default via 192.0.2.1; "+
		"ip route add default via 192.0.2.1 table 77; ip route add default via 192.0.2.1 table 76; ip route add throw 10.0.0.0/8 table 76; ip route add 198.51.100.0/24 via 192.0.2.1 table 78; ip link add hcaaaaaaaaaa type veth peer name peer0; "+
		"ip link set hcaaaaaaaaaa up; ip link set peer0 up; ip route add 10.244.1.9/32 dev hcaaaaaaaaaa table 79")
	if err := ahead(); err != nil {
		t.Error("with our own rules alone:", err)
	}
	for rule, found := range map[string]bool{
		"-4 pref 100 lookup 77":                                 true,
		"-4 pref 100 lookup main":                               true,
		"-4 pref 5184 to 10.244.9.0/24 lookup 77":               true,
		"-4 pref 100 from 10.244.0.0/16 lookup 77":              true,
		"-4 pref 100 iif hcaaaaaaaaaa lookup 77":                true,
		"-4 pref 100 to 10.244.0.0/16 blackhole":                true,
		"-6 pref 100 prohibit":                                  true,
		"-4 pref 5250 lookup 77":                                false, // behind ours
		"-4 pref 100 lookup 78":                                 false, // has no route there
		"-4 pref 100 lookup 79":                                 false, // leads to an own pod, as ours
		"-4 pref 100 lookup 52":                                 false, // tailscaled's
		"-4 pref 100 lookup local":                              false, // as Cilium has it
		"-4 pref 105 lookup main suppress_prefixlength 0":       true,  // as wg-quick and NetBird have it: our own unreachable route is there
		"-6 pref 105 lookup main suppress_prefixlength 0":       true,
		"-4 pref 100 not fwmark 0xca6c lookup 77":               true, // the VPN's part of it
		"-4 pref 100 not fwmark 0xca6c lookup 78":               false,
		"-4 pref 5185 lookup 77":                                true, // which has our number, and is not ours
		"-4 pref 100 lookup main suppress_prefixlength 16":      false,
		"-4 pref 100 lookup 76":                                 false, // which says that it has no way there
		"-4 pref 100 not from 10.244.0.0/16 lookup 77":          false,
		"-4 pref 100 fwmark 0x200/0xf00 lookup 77":              false,
		"-4 pref 100 from 192.0.2.2 lookup 77":                  true, // the node's own address, as where there are several uplinks
		"-4 pref 100 from 192.0.2.0/24 iif lo lookup 77":        true,
		"-4 pref 100 from 192.0.2.2 lookup main":                false, // pods are there
		"-4 pref 100 from 192.0.2.2 lookup 76":                  false,
		"-4 pref 100 from 192.0.2.3 lookup 77":                  false,
		"-4 pref 100 from 192.0.2.0/24 iif lan0 lookup 77":      false,
		"-4 pref 100 from 192.0.2.2 to 10.244.9.0/24 lookup 77": false,
		"-4 pref 100 to 203.0.113.0/24 lookup 77":               false,
		"-4 pref 100 iif lan0 lookup 77":                        false,
		"-4 pref 100 to 10.244.0.0/16 goto 32766":               false,
	} {
		family, words, _ := strings.Cut(rule, " ")
		ns.Run(t, "sh", "-c", "ip "+family+" rule add "+words)
		err := ahead()
		if (err != nil) != found || found && (findings.IDOf(err) != findings.RuleAhead || !strings.Contains(err.Error(), strings.Fields(words)[1]+":")) {
			t.Errorf("%s: %v, want an error: %v", rule, err, found)
		}
		ns.Run(t, "sh", "-c", "ip "+family+" rule del "+words)
	}
	// Whoever cannot give them another number leads pods' packets past them, as errors.md has it.
	ns.Run(t, "sh", "-ec", "ip rule add pref 90 to 10.244.1.0/24 lookup main; ip rule add pref 91 to 10.0.0.0/8 lookup 52; ip rule add pref 92 from 192.0.2.2 lookup 77; "+
		"ip rule add pref 105 lookup main suppress_prefixlength 0; ip rule add pref 110 not fwmark 0xca6c lookup 77")
	if err := ahead(); err != nil {
		t.Error("led past them:", err)
	}
	ns.Run(t, "ip", "rule", "del", "pref", "90")
	if err := ahead(); err == nil || !strings.Contains(err.Error(), "own pods") || strings.Contains(err.Error(), "other nodes") {
		t.Error("led past them, and the node is not:", err)
	}
}

// A link of the host's that nft's rules take for a pod's is named, and a pod's is not.
func TestNamedAsPods(t *testing.T) {
	ns := nstest.New(t)
	named := func() (err error) {
		ns.Do(t, func() error { err = NamedAsPods(); return nil })
		return err
	}
	ns.Run(t, "sh", "-ec", "ip link add hc0123456789 type veth peer name h0; ip link add wlhc0 type veth peer name eth0")
	if err := named(); err != nil {
		t.Error(err)
	}
	ns.Run(t, "sh", "-ec", "ip link add hcloud0 type veth peer name h1; ip link add hc01234567890 type veth peer name h2; ip link add hc-vpn type veth peer name h3")
	if err := named(); findings.IDOf(err) != findings.NamedAsPods || !strings.Contains(err.Error(), "hcloud0") || !strings.Contains(err.Error(), "hc01234567890") ||
		!strings.Contains(err.Error(), "hc-vpn") || strings.Contains(err.Error(), "hc0123456789,") {
		t.Error(err)
	}
}
