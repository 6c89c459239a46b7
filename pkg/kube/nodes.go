package kube

import (
	"context"

	corev1 "k8s.io/api/core/v1"
)

// NodeStore is told of the Nodes of a cluster.
type NodeStore interface {
	// Trim copies of a Node only what the store needs of it.
	Trim(*corev1.Node) *corev1.Node
	// ReplaceNodes takes all Nodes, at the start and whenever events may have been missed.
	ReplaceNodes([]*corev1.Node)
	SetNode(*corev1.Node)
	RemoveNode(*corev1.Node)
	// Answered says how each request to list or to watch went.
	Answered(error)
}

// WatchNodes tells a store of all Nodes until ctx ends.
func WatchNodes(ctx context.Context, client Client, s NodeStore) {
	Follow(ctx, client, client.Nodes(), &corev1.Node{}, Feed[*corev1.Node, *corev1.Node]{
		Trim: s.Trim, Replace: s.ReplaceNodes, Set: s.SetNode, Remove: s.RemoveNode, Answered: s.Answered,
	})
}
