package hostfirewall

import (
	"encoding/binary"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

func TestPlanAccepts(t *testing.T) {
	ours := func(texts ...string) (out []forwardRule) {
		for i, s := range texts {
			out = append(out, forwardRule{ours: true, text: s, handle: i + 1})
		}
		return out
	}
	foreign := []forwardRule{{text: "jump DOCKER", handle: 9}}
	want := []string{"a", "b"}
	for name, c := range map[string]struct {
		have   forward
		want   []string
		insert []string
		remove []forwardRule
	}{
		"no chain":           {forward{}, want, nil, nil},
		"open and empty":     {forward{exists: true}, want, nil, nil},
		"drops":              {forward{exists: true, drops: true}, want, want, nil},
		"rules of others":    {forward{exists: true, rules: foreign}, want, want, nil},
		"right":              {forward{exists: true, drops: true, rules: append(ours("a", "b"), foreign...)}, want, nil, nil},
		"not at the head":    {forward{exists: true, rules: append(foreign, ours("a", "b")...)}, want, want, ours("a", "b")},
		"other order":        {forward{exists: true, drops: true, rules: ours("b", "a")}, want, want, ours("b", "a")},
		"one is gone":        {forward{exists: true, drops: true, rules: ours("a")}, want, want, ours("a")},
		"one too many":       {forward{exists: true, drops: true, rules: ours("a", "b", "b")}, want, want, ours("a", "b", "b")},
		"earlier tun":        {forward{exists: true, drops: true, rules: ours("a", "c")}, want, want, ours("a", "c")},
		"not needed anymore": {forward{exists: true, rules: ours("a", "b")}, want, nil, ours("a", "b")},
		"remove":             {forward{exists: true, drops: true, rules: append(ours("a"), foreign...)}, nil, nil, ours("a")},
		"removed":            {forward{exists: true, drops: true, rules: foreign}, nil, nil, nil},
	} {
		insert, remove := planAccepts(c.have, c.want)
		if d := cmp.Diff(c.insert, insert) + cmp.Diff(c.remove, remove, cmp.AllowUnexported(forwardRule{})); d != "" {
			t.Errorf("%s: %s", name, d)
		}
	}
}

func TestParseLegacy(t *testing.T) {
	got := parseLegacy("-P FORWARD DROP\n-A FORWARD -i hc+ -m comment --comment headcni -j ACCEPT\n" +
		"-A FORWARD -m comment --comment \"headcni is bad\" -j DROP\n-A FORWARD -m comment --comment headcni2 -j DROP\n")
	want := forward{exists: true, drops: true, rules: []forwardRule{
		{ours: true, text: acceptRules("")[0].iptables()},
		{text: `-A FORWARD -m comment --comment "headcni is bad" -j DROP`},
		{text: `-A FORWARD -m comment --comment headcni2 -j DROP`},
	}}
	if d := cmp.Diff(want, got, cmp.AllowUnexported(forward{}, forwardRule{})); d != "" {
		t.Error(d)
	}
}

func TestRelevant(t *testing.T) {
	type attrs = map[int][]byte
	text := func(s string) []byte { return append([]byte(s), 0) }
	hook := func(n uint32) []byte {
		return nl.NewRtAttr(unix.NFTA_HOOK_HOOKNUM, binary.BigEndian.AppendUint32(nil, n)).Serialize()
	}
	for _, c := range []struct {
		what  string
		attrs attrs
		want  bool
	}{
		{"kube-proxy's rule", attrs{unix.NFTA_RULE_TABLE: text("filter"), unix.NFTA_RULE_CHAIN: text("KUBE-SERVICES")}, false},
		{"a FORWARD rule", attrs{unix.NFTA_RULE_TABLE: text("filter"), unix.NFTA_RULE_CHAIN: text("FORWARD")}, true},
		{"the FORWARD chain", attrs{unix.NFTA_CHAIN_TABLE: text("filter"), unix.NFTA_CHAIN_NAME: text("FORWARD")}, true},
		{"another table", attrs{unix.NFTA_TABLE_NAME: text("headcni2")}, false},
		{"generation", attrs{unix.NFTA_GEN_ID: {0, 0, 0, 7}}, false},
		{"nothing", nil, false},
		{"another's chain for forwarding", attrs{unix.NFTA_CHAIN_TABLE: text("firewalld"), unix.NFTA_CHAIN_HOOK: hook(hookForward)}, true},
		{"another's chain for input", attrs{unix.NFTA_CHAIN_TABLE: text("firewalld"), unix.NFTA_CHAIN_HOOK: hook(1)}, false},
		{"our own chain for forwarding", attrs{unix.NFTA_CHAIN_TABLE: text("headcni"), unix.NFTA_CHAIN_HOOK: hook(hookForward)}, false},
	} {
		if got := relevant(unix.NFT_MSG_NEWCHAIN, c.attrs); got != c.want {
			t.Errorf("%s: %v", c.what, got)
		}
	}
}

func TestTunName(t *testing.T) {
	if _, err := New().Sync(t.Context(), Config{TunName: `a" drop; accept`}); err == nil || !strings.Contains(err.Error(), "tun name") {
		t.Errorf("error %v", err)
	}
}
