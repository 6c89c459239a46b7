package policy

import (
	"fmt"

	"github.com/headcni/headcni/pkg/config/names"
)

// The objects of the table that are always there. A digit after a name is the family.
const (
	// Table is the table's name, in family inet.
	Table = names.PolicyTable
	// PriorityEgress and PriorityIngress are the priorities of the base chains, on hook forward.
	PriorityEgress, PriorityIngress = 10, 11
	// MapIn and MapOut dispatch an isolated local pod's address to its class chain (type addr : verdict, goto).
	MapIn, MapOut = "in", "out"
	// SetIsolated holds the addresses of both maps, SetSelf each of them twice (addr . addr), SetRecheck those of local pods whose
	// flows that were let through must be judged again.
	SetIsolated, SetSelf, SetRecheck = "isolated", "self", "recheck"
	// MapState says what becomes of a packet by its connection's state (type ct_state : verdict): see StateVerdicts.
	MapState = "state"
	// SetDeniedIn and SetDeniedOut count what was denied, by the local pod's address: the kernel adds the elements.
	SetDeniedIn, SetDeniedOut = "denied-in", "denied-out"
	// CounterUnknown counts the packets of pods whose policies are not known yet.
	CounterUnknown = "unknown"
	// CounterStateless counts the packets from and to isolated pods that belong to no connection.
	CounterStateless = "stateless"

	chainEgress, chainIngress, chainStateless = "egress", names.PolicyChain, "stateless"
	chainJudged, chainDoubt                   = "judged", "doubt"
	chainDenyIn, chainDenyOut                 = "deny-in", "deny-out"

	// LogGroup is the NFLOG group of what is denied. The prefix is the direction's word, behind LogUnknown where the pod's policies are
	// not known yet, behind LogStateless where the packet belongs to no connection, and before LogAnswer where it is none of who began
	// the connection.
	LogGroup     = 4278
	LogUnknown   = "unknown-"
	LogStateless = "stateless-"
	LogAnswer    = "-answer"
)

// Options are how the table judges what policies do not say.
type Options struct {
	// Strict: a pod whose policies are not known yet reaches its own node and nobody else.
	Strict bool
	// Log: packets that are denied go to NFLOG group LogGroup, at most ten a second each way, as many for pods whose policies are not known, and
	// for what belongs to no connection.
	Log bool
}

// FixedChain is a chain that is the same whatever policies say.
type FixedChain struct {
	Name string
	// Priority is that of a base chain of type filter on hook forward with policy accept, nil otherwise.
	Priority *int
	Rules    []string
}

// FixedChains are the chains that are always there, in nft's syntax, each after those that it names.
//
// A flow passes both base chains: accept ends one direction and not the other. Ends of connections are compared and not a packet's
// addresses (ct original saddr is the one who began, before source translation; ct reply saddr the one who answers, after destination
// translation), so that each packet of a flow can be judged, answers and ICMP errors too.
func FixedChains(opt Options) []FixedChain {
	egress, ingress := PriorityEgress, PriorityIngress
	pods := names.PodLinks
	elsewhere := fmt.Sprintf(`iifname != "%s" oifname != "%[1]s" accept`, pods)
	var gate []string
	if opt.Strict {
		for _, side := range []struct {
			word string
			dir  Direction
		}{{"iif", Egress}, {"oif", Ingress}} {
			// The group first: nearly all packets are done with by that number, and no name is copied and compared.
			unknown := fmt.Sprintf(`%sgroup != %d %[1]sname "%[3]s" `, side.word, names.PolicyLinkGroup, pods)
			gate = append(gate, opt.log(unknown, LogUnknown+side.dir.String())...)
			gate = append(gate, unknown+"counter name "+CounterUnknown+" drop")
		}
	}
	both := func(format string) []string {
		return []string{fmt.Sprintf(format, "4", "ip"), fmt.Sprintf(format, "6", "ip6")}
	}
	return []FixedChain{
		{Name: chainStateless, Rules: join(
			opt.stateless("4", "ip", "saddr", Egress), opt.stateless("6", "ip6", "saddr", Egress),
			opt.stateless("4", "ip", "daddr", Ingress), opt.stateless("6", "ip6", "daddr", Ingress),
		)},
		// A connection is tracked from the packet on that both base chains let through.
		{Name: chainJudged, Rules: []string{"ct status confirmed accept"}},
		{Name: chainDoubt, Rules: both("ct original %[2]s saddr != @" + SetRecheck + "%[1]s ct reply %[2]s saddr != @" + SetRecheck + "%[1]s accept")},
		{Name: chainDenyIn, Rules: deny(opt, Ingress, SetDeniedIn)},
		{Name: chainDenyOut, Rules: deny(opt, Egress, SetDeniedOut)},
		{Name: chainEgress, Priority: &egress, Rules: join(
			[]string{elsewhere}, gate,
			[]string{"ct state vmap @" + MapState},
			both("ct original %[2]s saddr vmap @"+MapOut+"%[1]s"),
		)},
		{Name: chainIngress, Priority: &ingress, Rules: join(
			[]string{"ct state vmap @" + MapState},
			both("ct reply %[2]s saddr vmap @"+MapIn+"%[1]s"),
		)},
	}
}

// StateVerdicts are the elements of MapState. A packet of a connection that stands goes the short way, and so does one of a connection
// that nobody has answered, as of UDP that goes one way only, from the second packet on. While any pod is under recheck the first go two
// look-ups longer, and the others are judged: nearly always none is.
func StateVerdicts(recheck bool) map[State]string {
	verdicts := map[State]string{
		Established: "accept", Related: "accept", New: "jump " + chainJudged,
		Invalid: "goto " + chainStateless, Untracked: "goto " + chainStateless,
	}
	if recheck {
		verdicts[Established], verdicts[Related] = "jump "+chainDoubt, "jump "+chainDoubt
		delete(verdicts, New)
	}
	return verdicts
}

// State is a connection's, as nf_tables has it (include/uapi/linux/netfilter/nf_conntrack_common.h: NF_CT_STATE_BIT).
type State uint32

// The states that a packet may have. New: none of who answers has come yet.
const (
	Invalid     State = 1 << 0
	Established State = 1 << 1
	Related     State = 1 << 2
	New         State = 1 << 3
	Untracked   State = 1 << 6
)

// String returns the name, as nft has it.
func (s State) String() string {
	return map[State]string{Invalid: "invalid", Established: "established", Related: "related", New: "new", Untracked: "untracked"}[s]
}

// deny is where a packet ends that no rule accepted.
func deny(opt Options, dir Direction, denied string) []string {
	end := end(dir.Opposite())
	rules := []string{
		// A pod reaches itself by its own service.
		fmt.Sprintf("ct original ip saddr . ct reply ip saddr @%s4 accept", SetSelf),
		fmt.Sprintf("ct original ip6 saddr . ct reply ip6 saddr @%s6 accept", SetSelf),
		// Rules with ports cannot see an error about an allowed flow. One about a flow that is not allowed has none to answer.
		"ct state related meta l4proto { icmp, ipv6-icmp } accept",
		fmt.Sprintf("update @%s4 { ct %s ip saddr counter }", denied, end),
		fmt.Sprintf("update @%s6 { ct %s ip6 saddr counter }", denied, end),
	}
	rules = append(rules, opt.log("ct direction original ", dir.String())...)
	rules = append(rules, opt.log("ct direction reply ", dir.String()+LogAnswer)...)
	return append(rules,
		// A flow that was allowed once ends at once instead of stalling for minutes.
		"meta l4proto tcp ct state established reject with tcp reset",
		"drop",
	)
}

// stateless drops what comes from or goes to isolated pods and belongs to no connection.
func (o Options) stateless(family, ip, end string, dir Direction) []string {
	match := fmt.Sprintf("%s %s @%s%s ", ip, end, SetIsolated, family)
	return append(o.log(match, LogStateless+dir.String()), match+"counter name "+CounterStateless+" drop")
}

// log logs some of the packets that match, where that is asked for.
func (o Options) log(match, prefix string) []string {
	if !o.Log {
		return nil
	}
	return []string{fmt.Sprintf(`%slimit rate 10/second burst 20 packets log prefix "%s " group %d snaplen 96`, match, prefix, LogGroup)}
}

// Opposite returns the other direction.
func (d Direction) Opposite() Direction { return d ^ 1 }

// end is the connection's end that a direction's rules ask about: who began it, or who answers.
func end(d Direction) string {
	if d == Ingress {
		return "original"
	}
	return "reply"
}

func join(lists ...[]string) (out []string) {
	for _, l := range lists {
		out = append(out, l...)
	}
	return out
}

// Text returns the chain's rules in nft's syntax.
func (c *Chain) Text() (rules []string) {
	for _, r := range c.Rules {
		ip := "ip"
		if r.IPv6 {
			ip = "ip6"
		}
		switch r.Kind {
		case PeerIn:
			rules = append(rules, fmt.Sprintf("ct %s %s saddr @%s accept", end(c.Dir), ip, r.Ref))
		case EndpointIn:
			rules = append(rules,
				fmt.Sprintf("ct direction original ct reply %s saddr . meta l4proto . th dport @%s accept", ip, r.Ref),
				fmt.Sprintf("ct direction reply ct reply %s saddr . meta l4proto . th sport @%s accept", ip, r.Ref))
		case PortsOf:
			rules = append(rules,
				fmt.Sprintf("ct direction original meta l4proto . th dport vmap @%s", r.Ref),
				fmt.Sprintf("ct direction reply meta l4proto . th sport vmap @%s", r.Ref))
		case RangesOf:
			rules = append(rules,
				fmt.Sprintf("ct direction original %s dport vmap @%s", r.Protocol, r.Ref),
				fmt.Sprintf("ct direction reply %s sport vmap @%s", r.Protocol, r.Ref))
		}
	}
	if c.Class {
		rules = append(rules, "goto deny-"+c.Dir.String())
	}
	return rules
}
