package hostfirewall

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
	"sigs.k8s.io/knftables"

	"github.com/headcni/headcni/internal/nfcmd"
	"github.com/headcni/headcni/internal/nfnl"
	"github.com/headcni/headcni/pkg/config/names"
)

// hookForward is NF_INET_FORWARD (include/uapi/linux/netfilter.h).
const hookForward = 2

// inet is the family of tables for both kinds of addresses. iptables has none there.
var inet = family{knftables.InetFamily, unix.NFPROTO_INET}

// Foreign is an error that says which firewalls of others drop what pods send and get, and what to do about it.
func (f *Firewall) Foreign(tun string) error {
	drops, err := f.ForeignDrops()
	if err != nil || len(drops) == 0 {
		return err
	}
	return fmt.Errorf("another program's firewall drops what pods send and get, which no rule of ours can change: %s; let %s* and %s "+
		"pass there, for instance `firewall-cmd --permanent --zone=trusted --add-interface=%[2]s+ --add-interface=%[3]s && "+
		"firewall-cmd --reload`", strings.Join(drops, ", "), names.PodLinkPrefix, tun)
}

// ForeignDrops names what in other programs' tables drops forwarded packets that nobody allowed there, such as
// firewalld's: a drop is final in nftables, so no accept of ours can help, and pods stay cut off until the owner lets
// them pass. A table with a rule about pods' links is taken for one whose owner has. The FORWARD chain of iptables is not
// among it, since Sync puts accepts there. A drop deeper than a base chain's policy or last rule is not found.
//
// While nobody changes any table it asks the kernel for no more than that: kube-proxy has a chain for each Service.
func (f *Firewall) ForeignDrops() ([]string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	gen, err := nfnl.Generation()
	if err != nil {
		return nil, nfcmd.Explain(err)
	}
	if f.dropsOK && f.dropsGen == gen {
		return f.drops, nil
	}
	f.drops, err = foreignDrops()
	f.dropsGen, f.dropsOK = gen, err == nil
	return f.drops, err
}

func foreignDrops() ([]string, error) {
	var out []string
	for _, f := range slices.Concat([]family{inet}, families) {
		chains, err := nfnl.Request(f.number, unix.NFT_MSG_GETCHAIN, unix.NLM_F_DUMP)
		if err != nil {
			return out, fmt.Errorf("list %s chains: %w", f.name, nfcmd.Explain(err))
		}
		for _, c := range chains {
			how, table, chain, err := foreignDrop(f.number, c)
			if err != nil {
				return out, fmt.Errorf("list %s chains: %w", f.name, nfcmd.Explain(err))
			}
			if how == "" {
				continue
			}
			knows, err := mentionsPods(f.number, table)
			if err != nil {
				return out, fmt.Errorf("list rules of table %s %s: %w", f.name, table, nfcmd.Explain(err))
			}
			if !knows {
				out = append(out, fmt.Sprintf("chain %s %s %s %s", f.name, table, chain, how))
			}
		}
	}
	return out, nil
}

// foreignDrop says how a chain drops, or "".
func foreignDrop(family uint8, msg []byte) (how, table, chain string, err error) {
	a, err := nfnl.Attributes(msg)
	if err != nil {
		return "", "", "", err
	}
	table, chain = nfnl.Text(a[unix.NFTA_CHAIN_TABLE]), nfnl.Text(a[unix.NFTA_CHAIN_NAME])
	if !hooksForward(a) || table == names.NFTTable ||
		table == filterTable && chain == forwardChain && family != unix.NFPROTO_INET {
		return "", "", "", nil
	}
	if p := a[unix.NFTA_CHAIN_POLICY]; len(p) == 4 && binary.BigEndian.Uint32(p) == nfDrop {
		return "has the policy drop", table, chain, nil
	}
	rules, err := nfnl.Request(family, unix.NFT_MSG_GETRULE, unix.NLM_F_DUMP,
		nfnl.Name(unix.NFTA_RULE_TABLE, table), nfnl.Name(unix.NFTA_RULE_CHAIN, chain))
	if err != nil || len(rules) == 0 {
		return "", "", "", err
	}
	last, err := readRule(rules[len(rules)-1])
	if err != nil {
		return "", "", "", err
	}
	if last.text == "drop" || last.text == "(reject)" {
		return "ends with a rule that drops the rest", table, chain, nil
	}
	return "", "", "", nil
}

// hooksForward reports whether a chain is in the forward hook.
func hooksForward(chain map[int][]byte) bool {
	hook, err := nfnl.Attributes(chain[unix.NFTA_CHAIN_HOOK])
	num := hook[unix.NFTA_HOOK_HOOKNUM]
	return err == nil && len(num) == 4 && binary.BigEndian.Uint32(num) == hookForward
}

// mentionsPods reports whether a rule of a table matches the links of pods.
func mentionsPods(family uint8, table string) (bool, error) {
	rules, err := nfnl.Request(family, unix.NFT_MSG_GETRULE, unix.NLM_F_DUMP, nfnl.Name(unix.NFTA_RULE_TABLE, table))
	if err != nil {
		return false, err
	}
	for _, r := range rules {
		rule, err := readRule(r)
		if err != nil {
			return false, err
		}
		if strings.Contains(rule.text, fmt.Sprintf("ifname %q", names.PodLinks)) {
			return true, nil
		}
	}
	return false, nil
}
