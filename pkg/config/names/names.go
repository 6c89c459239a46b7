// Package names holds the names and numbers, in the kernel and in the CNI protocol, that more than one package must know.
package names

import (
	"fmt"
	"strings"
)

const (
	// PodLinkPrefix begins the host name of every pod's veth. It must never begin a tun's name, nor a tun's name it:
	// tailscaled's nft chains and ours match by prefix.
	PodLinkPrefix = "hc"
	// PodLinks matches the host names of all pods' veths in nft's rules.
	PodLinks = PodLinkPrefix + "*"
	// NFTTable is our table in the families ip and ip6. The gate of ADD asks both for NFTChain, which comes with all rules, while sets are there before.
	NFTTable = "headcni"
	NFTChain = "guard"
	// PolicyTable is our table in family inet that enforces NetworkPolicies. Where they are enforced the gate of ADD asks for PolicyChain, which comes last.
	PolicyTable = "headcni-policy"
	PolicyChain = "ingress"
	// FastTable is our table in family inet by which flows between pods of the node go past the rules.
	FastTable = "headcni-fast"
	// PolicyLinkGroup is the group (IFLA_GROUP) of the host's end of a pod whose policies are in force. A new link is in group 0.
	PolicyLinkGroup = 4278
	// RuleComment marks the few rules of ours that stand in someone else's chain.
	RuleComment = "headcni"

	// DaemonTun is what the dedicated tailscaled calls its interface unless told otherwise, HostTun what a host's own does.
	DaemonTun = "headcni01"
	HostTun   = "tailscale0"
	// TunMTU is tailscaled's own MTU in bytes, for as long as there is no tun to ask.
	TunMTU = 1280
	// BypassMark is the fwmark bit that tailscaled sets on its own packets: they must not enter its tunnel, and follow the
	// host's routes as if neither it nor we were there.
	BypassMark = 0x80000
)

// CheckTun keeps a name of a tun out of firewall rules that could end its quotes, match other links or be one of our pods'.
// Nothing is fine: there is no tun yet.
func CheckTun(name string) error {
	if name == "" {
		return nil
	}
	const ifnamsiz = 16 // linux/if.h: IFNAMSIZ, with the final zero
	bad := strings.IndexFunc(name, func(r rune) bool {
		return r <= ' ' || r > '~' || strings.ContainsRune(`"\/*:;{}`, r)
	}) >= 0
	if bad || len(name) >= ifnamsiz {
		return fmt.Errorf("tun name %q: want up to %d characters, only letters, digits and - _ . among them", name, ifnamsiz-1)
	}
	if strings.HasPrefix(name, PodLinkPrefix) {
		return fmt.Errorf("tun name %q: must not begin with %q, which begins the names of pods' links", name, PodLinkPrefix)
	}
	return nil
}

// Valid holds for what the specification calls alphanumeric with special characters: container IDs and network names.
func Valid(s string) bool {
	for i := range len(s) {
		c := s[i]
		alnum := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		if !alnum && (i == 0 || c != '_' && c != '.' && c != '-') {
			return false
		}
	}
	return s != ""
}

// IsPodLink reports whether a link has a name as a pod's veth on the host.
func IsPodLink(name string) bool {
	hash, ok := strings.CutPrefix(name, PodLinkPrefix)
	return ok && len(hash) == 10 && strings.Trim(hash, "0123456789abcdef") == ""
}

// CountsAsPodLink reports whether nft's rules take a link for a pod's that is none.
func CountsAsPodLink(name string) bool {
	return strings.HasPrefix(name, PodLinkPrefix) && !IsPodLink(name)
}
