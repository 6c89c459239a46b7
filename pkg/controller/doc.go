// Package controller does the cluster-wide part: it approves in Headscale exactly the routes that Kubernetes gives its
// nodes, mints the key they join with, removes stale nodes, gives pod CIDRs where Kubernetes gives none, and checks
// Headscale's policy. Nothing on a node waits for it except a node's first join and the approval of its routes.
//
// # Rights
//
// What `headcni-controller run` asks of the API server:
//
//	""                   nodes       list, watch, patch   annotations; spec.podCIDRs of Nodes that have none
//	""                   services    list, watch          which want a name in the tailnet
//	networking.k8s.io    servicecidrs list                where network.advertiseServices chooses Nodes
//	events.k8s.io        events      create               about Nodes, Services and its own Deployment
//
// and in its own namespace:
//
//	""                   secrets     headcni-join: get, update
//	""                   configmaps  headcni-controller, headcni-dns-records: get, update
//	coordination.k8s.io  leases      create; headcni-controller: get, update
//
// and in kube-system:
//
//	""                   configmaps  coredns: get, update; coredns-custom: get, update, delete; create on K3s
//	""                   configmaps  kubeadm-config: get, where the ServiceCIDRs cannot be read
//	""                   services    kube-dns: get, by `headcnictl dns`
//
// What `headcni-controller uninstall` asks: nodes list and patch; and in its own namespace
//
//	apps                 deployments headcni-controller: get, patch
//	""                   secrets     headcni-join: delete
//	""                   configmaps  headcni-controller: get, delete
//	""                   pods        headcni-test: delete
//	coordination.k8s.io  leases      headcni-controller: delete
//
// and in kube-system what `run` asks there, but for create.
//
// The chart makes the Secret headcni-join and the ConfigMap headcni-controller, empty: who may create Secrets in kube-system
// can have the token of any service account there put into one. Where that right is given all the same, missing ones are
// made. The credential for Headscale is a mounted file, never read through the API server.
package controller
