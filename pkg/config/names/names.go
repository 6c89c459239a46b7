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
