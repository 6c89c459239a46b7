package nft

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
	"sigs.k8s.io/knftables"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/internal/nfcmd"
	"github.com/headcni/headcni/internal/nfnl"
	"github.com/headcni/headcni/pkg/config/names"
)

// Who may reach a network behind a device of the tailnet is a set of pods' links for each such network. A link's index comes once in the
// life of a network namespace, so that nobody inherits what another pod was allowed, and a pod that forges a source gains nothing.
// Sets of intervals of more than one field need kernel 5.6; these need none.

// consentSets are those of the named subnets.
func consentSets(family knftables.Family, cfg Config) (out []set) {
	for _, p := range namedOf(family, cfg) {
		out = append(out, set{name: consentName(p), keys: linkType})
	}
	return out
}

// namedOf are the named subnets of a family. One may lie in another.
func namedOf(family knftables.Family, cfg Config) []netip.Prefix {
	if cfg.TunName == "" || cfg.Subnets.Open {
		return nil
	}
	named := netset.OfFamily(cfg.Subnets.Named, family == knftables.IPv6Family)
	slices.SortFunc(named, netip.Prefix.Compare)
	return slices.Compact(named)
}

func consentName(p netip.Prefix) string {
	return consentPrefix + strings.ReplaceAll(p.String(), ":", "_")
}

// namedBy is the subnet of a set that consentName has named.
func namedBy(set string) (netip.Prefix, error) {
	return netip.ParsePrefix(strings.ReplaceAll(strings.TrimPrefix(set, consentPrefix), "_", ":"))
}

// consentNames are those of the sets that the kernel has.
func consentNames(f knftables.Family) (out []string, err error) {
	sets, err := nfnl.Request(nfproto[f], unix.NFT_MSG_GETSET, unix.NLM_F_DUMP, nfnl.Name(unix.NFTA_SET_TABLE, names.NFTTable))
	if err != nil {
		return nil, err
	}
	for _, s := range sets {
		a, err := nfnl.Attributes(s)
		if err != nil {
			return nil, err
		}
		if name := nfnl.Text(a[unix.NFTA_SET_NAME]); nfnl.Text(a[unix.NFTA_SET_TABLE]) == names.NFTTable && strings.HasPrefix(name, consentPrefix) {
			out = append(out, name)
		}
	}
	return out, nil
}

// refuse ends what matches at once: a connection by a reset, anything else by an error that says why.
func refuse(family knftables.Family, match, reason string) []string {
	icmp := "icmp"
	if family == knftables.IPv6Family {
		icmp = "icmpv6"
	}
	return []string{
		rule(`%s meta l4proto tcp counter name "%s" reject with tcp reset`, match, reason),
		rule(`%s counter name "%s" reject with %s type admin-prohibited`, match, reason, icmp),
	}
}

// toSubnets: by the tunnel a pod reaches the cluster, devices, of which the guard judges, subnets that its Namespace may use, and who has called it.
func toSubnets(family knftables.Family, cfg Config) (rules []string) {
	fam := string(family)
	if cfg.TunName != "" {
		out := rule(`oifname "%s"`, cfg.TunName)
		if cfg.Subnets.Open {
			rules = append(rules, out+" accept")
		} else {
			rules = append(rules, rule(`%s %s daddr @%s accept`, out, fam, setKeepSource), rule(`%s %s daddr %s accept`, out, fam, tailnet[family]))
			for _, p := range namedOf(family, cfg) {
				rules = append(rules, rule(`%s %s daddr %s iif @%s ct direction original accept`, out, fam, p, consentName(p)))
			}
			rules = append(rules, out+" ct direction reply accept")
			if cfg.Subnets.Exit {
				rules = append(rules, rule(`%s %s daddr != @%s accept`, out, fam, setAbroad))
			}
			// To answer what belongs to no connection would end one that is right.
			rules = append(rules, out+" ct state invalid "+drop(DropTailnetSubnet))
			rules = append(rules, refuse(family, out, DropTailnetSubnet)...)
		}
	}
	if len(netset.OfFamily(cfg.Subnets.Known, family == knftables.IPv6Family)) == 0 {
		return rules
	}
	// Routing rules would not have it so. A host may have networks of its own inside.
	beside := rule(`oifname != "%s" %s daddr @%s %[2]s daddr != @%[4]s`, names.PodLinks, fam, setSubnets, setBeside)
	return append(rules, refuse(family, beside, DropSubnetClear)...)
}

// forwardTunnel notes and lets in what the tunnel brings, but for answers to pods that must not have asked (any more).
func forwardTunnel(family knftables.Family, cfg Config) []string {
	if cfg.TunName == "" {
		return nil
	}
	rules := []string{noteTunnel}
	if cfg.Subnets.Open {
		return rules
	}
	rules = append(rules,
		rule(`oifname != "%s" accept`, names.PodLinks), rule(`%s saddr @%s accept`, family, setKeepSource),
		rule(`%s saddr %s accept`, family, tailnet[family]), "ct direction original accept",
	)
	for _, p := range namedOf(family, cfg) {
		rules = append(rules, rule(`%s saddr %s oif @%s ct direction reply accept`, family, p, consentName(p)))
	}
	rules = append(rules, "ct state related accept") // an error about a connection, by a router on its way
	if cfg.Subnets.Exit {
		rules = append(rules, rule(`%s saddr != @%s accept`, family, setAbroad))
	}
	return append(rules, rule(`meta l4proto tcp ct state established counter name "%s" reject with tcp reset`, DropTailnetSubnet), drop(DropTailnetSubnet))
}

// Consent says which pods' links, by index, may reach which of the named subnets; all others may not. It returns what it changed. What
// another process has said stays in force until the first call. A subnet that Sync has not had yet is written by the next Sync.
func (t *Tables) Consent(want map[netip.Prefix][]int) (changed int, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.consent = want
	return t.writeConsent()
}

func (t *Tables) writeConsent() (changed int, err error) {
	if t.consent == nil {
		return 0, nil
	}
	var errs []error
	for _, f := range families {
		n, err := t.writeConsentOf(f)
		changed += n
		if err != nil {
			errs = append(errs, fmt.Errorf("write who may reach subnets to table %s %s: %w", f, names.NFTTable, nfcmd.Explain(err)))
		}
	}
	return changed, errors.Join(errs...)
}

func (t *Tables) writeConsentOf(f knftables.Family) (changed int, err error) {
	sets, err := consentNames(f)
	if errors.Is(err, unix.ENOENT) {
		return 0, nil // the table comes with the next Sync
	}
	if err != nil {
		return 0, err
	}
	links := map[string][]int{}
	for p, l := range t.consent {
		links[consentName(p)] = l
	}
	batch := nfnl.NewBatch(nfproto[f])
	for _, name := range sets {
		want := map[string]bool{}
		for _, i := range links[name] {
			want[string(indexKey(i))] = true
		}
		n, err := fill(batch, f, name, want)
		if err != nil {
			return 0, err
		}
		changed += n
	}
	return changed, t.conn.Run(batch)
}

// ConsentChanges is Changes for what Consent writes.
func (t *Tables) ConsentChanges(ctx context.Context) (<-chan struct{}, error) {
	ch, err := nfnl.Watch(ctx, ofConsent)
	if err != nil {
		return nil, fmt.Errorf("subscribe to nf_tables events: %w", nfcmd.Explain(err))
	}
	return ch, nil
}

// ofConsent: an element of such a set has come or gone.
func ofConsent(msg int, attrs map[int][]byte) bool {
	return (msg == unix.NFT_MSG_NEWSETELEM || msg == unix.NFT_MSG_DELSETELEM) &&
		nfnl.Text(attrs[unix.NFTA_SET_ELEM_LIST_TABLE]) == names.NFTTable && strings.HasPrefix(nfnl.Text(attrs[unix.NFTA_SET_ELEM_LIST_SET]), consentPrefix)
}

// stale are the sets of subnets that nobody names any more.
func stale(t table, have listing) (out []string) {
	for key := range have {
		name, ok := strings.CutPrefix(key, "set ")
		if ok && strings.HasPrefix(name, consentPrefix) && !slices.ContainsFunc(t.sets, func(s set) bool { return s.name == name }) {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}
