// Package names holds the names in the kernel that more than one package must know.
package names

const (
	// PodLinkPrefix begins the host name of every pod's veth. It must never begin a tun's name, nor a tun's name it:
	// tailscaled's nft chains and ours match by prefix.
	PodLinkPrefix = "hc"
	// NFTTable is our table in the families ip and ip6. The gate of ADD asks for both.
	NFTTable = "headcni"
	// RuleComment marks the few rules of ours that stand in someone else's chain.
	RuleComment = "headcni"
)

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
