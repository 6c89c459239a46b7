package hostfirewall

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
	"sigs.k8s.io/knftables"

	"github.com/headcni/headcni/internal/nfcmd"
	"github.com/headcni/headcni/internal/nfnl"
	"github.com/headcni/headcni/pkg/config/names"
)

// An accept in our own table cannot overrule a drop in another one, so where the host's FORWARD chain drops, our accepts
// must stand in it, above its drops. iptables-nft keeps that chain in nft's `ip filter` and `ip6 filter`, where nft can
// put rules that iptables shows as its own; iptables-legacy keeps it elsewhere (legacy.go).

const (
	filterTable  = "filter"
	forwardChain = "FORWARD"
)

// accept is one rule of ours in a FORWARD chain: everything that comes in by, or goes out to, a link.
type accept struct {
	out  bool   // goes out to
	link string // a name, or a prefix with *
}

// acceptRules says what must stand in a FORWARD chain that drops.
func acceptRules(tun string) []accept {
	links := []string{names.PodLinks}
	if tun != "" {
		links = append(links, tun)
	}
	var out []accept
	for _, l := range links {
		out = append(out, accept{false, l}, accept{true, l})
	}
	return out
}

// nft is the rule for nft.
func (a accept) nft() string {
	if a.out {
		return fmt.Sprintf(`oifname "%s" accept`, a.link)
	}
	return fmt.Sprintf(`iifname "%s" accept`, a.link)
}

// forward is a FORWARD chain as far as accepts are concerned.
type forward struct {
	exists bool
	drops  bool // its policy
	rules  []forwardRule
}

type forwardRule struct {
	ours   bool   // carries our comment
	text   string // as accept.nft or accept.iptables has it; "" when it is of another shape
	handle int    // nft only
}

// planAccepts says what to do to a chain: put all of want at its head, and take out these rules of it. Both empty: the
// chain needs no change.
func planAccepts(have forward, want []string) (insert []string, remove []forwardRule) {
	foreign, head := 0, 0
	for i, r := range have.rules {
		if !r.ours {
			foreign++
			continue
		}
		remove = append(remove, r)
		if i == head && head < len(want) && r.text == want[i] {
			head++
		}
	}
	if !have.exists || !have.drops && foreign == 0 {
		return nil, remove // nothing there can drop
	}
	if head == len(want) && len(remove) == head {
		return nil, nil
	}
	return want, remove
}

func (f *Firewall) syncForward(ctx context.Context, fam family, want []accept) ([]string, error) {
	have, err := readForward(fam)
	if err != nil {
		return nil, nfcmd.Explain(err)
	}
	var texts []string
	for _, a := range want {
		texts = append(texts, a.nft())
	}
	insert, remove := planAccepts(have, texts)
	if len(insert)+len(remove) == 0 {
		return nil, nil
	}
	err = f.nft.Write(ctx, func(tx *knftables.Transaction) {
		in := knftables.Rule{Family: fam.name, Table: filterTable, Chain: forwardChain}
		for i := range insert { // each goes to the head: the last one first
			r := in
			r.Rule, r.Comment = insert[len(insert)-1-i], knftables.PtrTo(names.RuleComment)
			tx.Insert(&r)
		}
		for _, old := range remove {
			r := in
			r.Handle = &old.handle
			tx.Delete(&r)
		}
	})
	if err != nil {
		return nil, err
	}
	return describeAccepts(fmt.Sprintf("%s %s %s", fam.name, filterTable, forwardChain), insert, remove), nil
}

func describeAccepts(chain string, insert []string, remove []forwardRule) []string {
	var out []string
	if len(insert) > 0 {
		out = append(out, fmt.Sprintf("insert at the head of chain %s: %s", chain, strings.Join(insert, "; ")))
	}
	if len(remove) > 0 {
		out = append(out, fmt.Sprintf("delete %d former rules of ours from chain %s", len(remove), chain))
	}
	return out
}

// readForward reads the FORWARD chain of iptables-nft.
func readForward(fam family) (forward, error) {
	var f forward
	res, err := nfnl.Request(fam.number, unix.NFT_MSG_GETCHAIN, 0,
		nfnl.Name(unix.NFTA_CHAIN_TABLE, filterTable), nfnl.Name(unix.NFTA_CHAIN_NAME, forwardChain))
	if errors.Is(err, unix.ENOENT) {
		return f, nil
	}
	if err != nil {
		return f, fmt.Errorf("read chain: %w", err)
	}
	for _, r := range res {
		a, err := nfnl.Attributes(r)
		if err != nil {
			return f, err
		}
		f.exists = true
		p := a[unix.NFTA_CHAIN_POLICY]
		f.drops = len(p) == 4 && binary.BigEndian.Uint32(p) == nfDrop
	}
	rules, err := nfnl.Request(fam.number, unix.NFT_MSG_GETRULE, unix.NLM_F_DUMP,
		nfnl.Name(unix.NFTA_RULE_TABLE, filterTable), nfnl.Name(unix.NFTA_RULE_CHAIN, forwardChain))
	if err != nil {
		return f, fmt.Errorf("read rules: %w", err)
	}
	for _, r := range rules {
		rule, err := readRule(r)
		if err != nil {
			return f, err
		}
		f.rules = append(f.rules, rule)
	}
	return f, nil
}

const (
	nfDrop, nfAccept = 0, 1
	// The comment in a rule's user data: type 0, length, text (libnftnl's udata).
	udataComment = 0
	// The name of the data of the iptables comment match in an nft "match" expression, behind which the text stands.
	xtComment = "comment"
)

func readRule(msg []byte) (forwardRule, error) {
	a, err := nfnl.Attributes(msg)
	if err != nil {
		return forwardRule{}, err
	}
	var r forwardRule
	if h := a[unix.NFTA_RULE_HANDLE]; len(h) == 8 {
		r.handle = int(binary.BigEndian.Uint64(h))
	}
	if u := a[unix.NFTA_RULE_USERDATA]; len(u) > 2 && u[0] == udataComment {
		r.ours = nfnl.Text(u[2:]) == names.RuleComment
	}
	exprs, err := nfnl.List(a[unix.NFTA_RULE_EXPRESSIONS])
	if err != nil {
		return r, fmt.Errorf("read a rule's expressions: %w", err)
	}
	var parts []string
	for _, e := range exprs {
		x, err := nfnl.Attributes(e.Value)
		if err != nil {
			return r, err
		}
		name := nfnl.Text(x[unix.NFTA_EXPR_NAME])
		data, err := nfnl.Attributes(x[unix.NFTA_EXPR_DATA])
		if err != nil {
			return r, err
		}
		switch {
		case name == "counter", name == "log": // iptables adds a counter to each rule it restores
		case name == "match" && nfnl.Text(data[unix.NFTA_MATCH_NAME]) == xtComment:
			// After iptables-save and -restore our comment is an iptables match.
			r.ours = r.ours || nfnl.Text(data[unix.NFTA_MATCH_INFO]) == names.RuleComment
		default:
			parts = append(parts, exprText(name, data))
		}
	}
	r.text = strings.Join(parts, "")
	return r, nil
}

// exprText renders the three expressions that accepts are made of, and a drop, and anything else by its name.
func exprText(name string, data map[int][]byte) string {
	num := func(b []byte) uint32 {
		if len(b) != 4 {
			return ^uint32(0)
		}
		return binary.BigEndian.Uint32(b)
	}
	switch name {
	case "meta":
		switch num(data[unix.NFTA_META_KEY]) {
		case unix.NFT_META_IIFNAME:
			return "iifname "
		case unix.NFT_META_OIFNAME:
			return "oifname "
		}
	case "cmp":
		value, err := nfnl.Attributes(data[unix.NFTA_CMP_DATA])
		if err == nil && num(data[unix.NFTA_CMP_OP]) == unix.NFT_CMP_EQ {
			link := value[unix.NFTA_DATA_VALUE]
			if bytes.IndexByte(link, 0) < 0 { // not the whole name: a prefix
				return fmt.Sprintf(`"%s*" `, link)
			}
			return fmt.Sprintf(`"%s" `, nfnl.Text(link))
		}
	case "immediate":
		value, err := nfnl.Attributes(data[unix.NFTA_IMMEDIATE_DATA])
		if err != nil {
			break
		}
		verdict, err := nfnl.Attributes(value[unix.NFTA_DATA_VERDICT])
		if err != nil {
			break
		}
		switch num(verdict[unix.NFTA_VERDICT_CODE]) {
		case nfAccept:
			return "accept"
		case nfDrop:
			return "drop"
		}
	}
	return "(" + name + ")"
}
