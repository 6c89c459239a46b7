// Package controller does the cluster-wide part: it approves in Headscale exactly the routes that Kubernetes gives its
// nodes, mints the key they join with, removes stale nodes, gives pod CIDRs where Kubernetes gives none, and checks
// Headscale's policy. Nothing on a node waits for it except a node's first join and the approval of its routes.
package controller

import (
	_ "github.com/tailscale/hujson"
	_ "k8s.io/client-go/informers"
	_ "k8s.io/client-go/kubernetes"
	_ "k8s.io/client-go/kubernetes/fake"
	_ "k8s.io/client-go/tools/cache"
	_ "k8s.io/client-go/tools/events"
	_ "k8s.io/client-go/tools/leaderelection"
	_ "k8s.io/client-go/metadata"
)
