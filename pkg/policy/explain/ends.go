package explain

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/headcni/headcni/internal/nearest"
	"github.com/headcni/headcni/pkg/policy"
	"github.com/headcni/headcni/pkg/policy/report"
)

// Kinds of ends.
const (
	kindPod     = "pod"
	kindNode    = "node"
	kindAddress = "address"
)

// pod finds the pod that is asked about.
func (st *State) pod(text, namespace string) (*report.End, error) {
	name := text
	if !strings.Contains(text, "/") {
		name = namespace + "/" + text
	}
	if p := st.find(name); p != nil {
		return st.podEnd(p), nil
	}
	if st.waiting(name) != nil {
		return &report.End{Kind: kindPod, Name: name, Node: st.Snapshot.Node}, nil
	}
	return nil, errors.New(st.missing(name))
}

// find returns a pod by its name: of several the one that is not over.
func (st *State) find(name string) (found *policy.Pod) {
	for _, p := range st.Snapshot.Pods {
		if nameOf(p) == name && (found == nil || found.Done || found.Terminating) {
			found = p
		}
	}
	return found
}

func (st *State) missing(name string) string {
	namespace, _, _ := strings.Cut(name, "/")
	var known []string
	for _, p := range st.Snapshot.Pods {
		if p.Namespace == namespace {
			known = append(known, nameOf(p))
		}
	}
	if len(known) == 0 {
		return fmt.Sprintf("there is no pod %s: namespace %s has no pods at all; -n names another", name, namespace)
	}
	if meant := nearest.Key(name, known); meant != "" {
		return fmt.Sprintf("there is no pod %s: is %s meant?", name, meant)
	}
	return fmt.Sprintf("there is no pod %s: see kubectl get pods -n %s; -n names another namespace", name, namespace)
}

func (st *State) podEnd(p *policy.Pod) *report.End {
	e := &report.End{Kind: kindPod, Name: nameOf(p), Node: p.Node, Addrs: p.IPs}
	switch {
	case p.HostNetwork:
		e.Note = "it is in its node's network: policies are not for it, and its addresses are its node's"
		for _, n := range st.Snapshot.Nodes {
			if n.Name == p.Node {
				e.Addrs = n.Addrs
			}
		}
	case p.Done:
		e.Addrs, e.Note = nil, "it has ended, and has no address any more"
	case len(p.IPs) == 0:
		e.Note = "it has no address yet"
	case p.Terminating:
		e.Note = "it is terminating: policies hold until it is gone"
	}
	return e
}

// end finds another end: an address, a node or a pod.
func (st *State) end(text, namespace string) (*report.End, error) {
	if a, err := netip.ParseAddr(text); err == nil {
		return st.addrEnd(a.Unmap()), nil
	}
	name, isNode := strings.CutPrefix(text, "node/")
	for _, n := range st.Snapshot.Nodes {
		if n.Name == name && (isNode || st.find(namespace+"/"+text) == nil) {
			return &report.End{Kind: kindNode, Name: n.Name, Addrs: n.Addrs}, nil
		}
	}
	if isNode && st.find(text) == nil {
		var known []string
		for _, n := range st.Snapshot.Nodes {
			known = append(known, n.Name)
		}
		slices.Sort(known)
		return nil, fmt.Errorf("there is no node %s: known are %s", name, strings.Join(known, ", "))
	}
	e, err := st.pod(text, namespace)
	if err != nil && !strings.Contains(text, "/") {
		err = fmt.Errorf("%s is no address, no node and no pod: %w", text, err)
	}
	return e, err
}

func (st *State) addrEnd(a netip.Addr) *report.End {
	s := narrow(st.Snapshot, a)
	for _, n := range s.Nodes {
		if slices.Contains(n.Addrs, a) {
			return &report.End{Kind: kindNode, Name: n.Name, Addrs: []netip.Addr{a}}
		}
	}
	for _, p := range s.Pods {
		if !p.Done && !p.HostNetwork {
			e := st.podEnd(p)
			e.Addrs = []netip.Addr{a}
			return e
		}
	}
	e := &report.End{Kind: kindAddress, Addrs: []netip.Addr{a}, Note: "it is neither a pod's nor a node's: an ipBlock alone can stand for it, and if it is a service's, ask about the pods behind"}
	if slices.ContainsFunc(s.PodCIDRs, func(p netip.Prefix) bool { return p.Contains(a) }) {
		e.Note = "it is in the cluster's pod ranges, and no pod has it"
	}
	return e
}

// port is the port that was asked about.
type port struct {
	name     string // "" where it is a number
	number   uint16
	protocol policy.Protocol
	icmp     bool
}

// ICMP's numbers by family.
const icmpv4, icmpv6 policy.Protocol = 1, 58

// parsePort returns nil for no port.
func parsePort(text string) (*port, error) {
	if text == "" {
		return nil, nil
	}
	number, protocol, _ := strings.Cut(strings.ToLower(text), "/")
	if number == "icmp" && protocol == "" {
		return &port{icmp: true}, nil
	}
	p := &port{}
	switch protocol {
	case "", "tcp":
		p.protocol = policy.TCP
	case "udp":
		p.protocol = policy.UDP
	case "sctp":
		p.protocol = policy.SCTP
	default:
		return nil, fmt.Errorf("--port %s: want a number or a port's name with /tcp, /udp or /sctp behind it, or icmp", text)
	}
	n, err := strconv.ParseUint(number, 10, 16)
	switch {
	case err == nil && n > 0:
		p.number = uint16(n)
	case err != nil && strings.Trim(number, "0123456789") != "":
		p.name = number
	default:
		return nil, fmt.Errorf("--port %s: want a number from 1 to 65535", text)
	}
	return p, nil
}

// resolve finds what the destination calls a port by its name.
func (p *port) resolve(s *policy.Snapshot, to *report.End) error {
	if p.name == "" {
		return nil
	}
	var known []string
	for _, pod := range s.Pods {
		if to.Kind != kindPod || nameOf(pod) != to.Name {
			continue
		}
		for _, named := range pod.Ports {
			if named.Name == p.name && named.Protocol == p.protocol {
				p.number = named.Port
				return nil
			}
			known = append(known, named.Name+"/"+named.Protocol.String())
		}
	}
	if len(known) == 0 {
		return fmt.Errorf("--port %s: the destination names no ports: give the number", p.name)
	}
	return fmt.Errorf("--port %s/%s: the destination does not name such a port; it names %s", p.name, p.protocol, strings.Join(known, ", "))
}

func (p *port) String() string {
	switch {
	case p.icmp:
		return "icmp"
	case p.name != "":
		return fmt.Sprintf("%d/%s (%s)", p.number, p.protocol, p.name)
	}
	return fmt.Sprintf("%d/%s", p.number, p.protocol)
}

// flow is a connection to the port.
func (p *port) flow(src, dst netip.Addr) policy.Flow {
	f := policy.Flow{Src: src, Dst: dst, Protocol: p.protocol, Port: p.number}
	if p.icmp {
		f.Protocol = icmp(dst)
	}
	return f
}

// icmp is the protocol that no policy can name: what allows it allows everything.
func icmp(a netip.Addr) policy.Protocol {
	if a.Is6() {
		return icmpv6
	}
	return icmpv4
}

func portText(f policy.Flow) string {
	if f.Protocol == icmpv4 || f.Protocol == icmpv6 {
		return "icmp"
	}
	return fmt.Sprintf("%d/%s", f.Port, f.Protocol)
}
