package corefile

// Where CoreDNS' configuration stands in a cluster.
const (
	Namespace = "kube-system"
	// ConfigMap and Key are of CoreDNS itself.
	ConfigMap, Key = "coredns", "Corefile"
	// Custom is the ConfigMap that K3s and AKS leave to their users, ours in it CustomKey: there ConfigMap is rewritten.
	Custom, CustomKey = "coredns-custom", "headcni.server"
	// ServerKeys end the keys of Custom that CoreDNS reads as server blocks.
	ServerKeys = ".server"
	// ClusterDomain is what Kubernetes calls its own domain where nobody says otherwise.
	ClusterDomain = "cluster.local"
)
