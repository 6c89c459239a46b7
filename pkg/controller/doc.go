// Package controller does the cluster-wide part: it approves in Headscale exactly the routes that Kubernetes gives its
// nodes, mints the key they join with, removes stale nodes, gives pod CIDRs where Kubernetes gives none, and checks
// Headscale's policy. Nothing on a node waits for it except a node's first join and the approval of its routes.
//
// # Rights
//
// What the service account headcni-controller needs, for `run` and `uninstall` alike. In the cluster:
//
//	""             nodes    list, watch, patch   metadata.annotations; spec.podCIDRs of Nodes that have none; uninstall
//	events.k8s.io  events   create               about Nodes in the namespace default, about the controller in its own
//
// In its own namespace:
//
//	""                   secrets     headcni-join        get, update, delete
//	""                   configmaps  headcni-controller  get, patch, delete
//	coordination.k8s.io  leases      headcni-controller  get, update, delete
//	coordination.k8s.io  leases      (any name)          create
//	""                   pods        (any name)          list   uninstall: which nodes have a daemon that can answer
//
// The chart makes the Secret headcni-join (type Opaque, without data) and the ConfigMap headcni-controller (without data),
// so that no right to create either is needed: who may create Secrets in kube-system can have the token of any service
// account there put into one. Where that right is given all the same, missing ones are made.
//
// The controller reads no Secret but headcni-join: the credential for Headscale is a mounted file.
package controller
