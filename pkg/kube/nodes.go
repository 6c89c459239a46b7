package kube

import (
	"context"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"
)

const (
	// nodePage is how many Nodes are read at once where the server cannot stream them: one is 10 kB and more.
	nodePage = 100
	// listTimeout bounds the reading of one page.
	listTimeout = 30 * time.Second
)

// NodeStore is told of the Nodes of a cluster.
type NodeStore interface {
	// Trim copies of a Node only what the store needs of it: thousands of whole ones would be kept for a moment otherwise.
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
	// The library logs each failed try; the store hears of them.
	ctx = klog.NewContext(ctx, klog.New(nil))
	lw := &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			// In pages also where the library would take everything at once from the server's cache.
			if o.Limit = nodePage; o.ResourceVersion == "0" {
				o.ResourceVersion = ""
			}
			ctx, cancel := context.WithTimeout(ctx, listTimeout)
			defer cancel()
			list, err := client.Nodes().List(ctx, o)
			s.Answered(err)
			if err != nil {
				return nil, err
			}
			for i := range list.Items {
				list.Items[i] = *s.Trim(&list.Items[i])
			}
			return list, nil
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			events, err := client.Nodes().Watch(ctx, o)
			s.Answered(err)
			return events, err
		},
	}
	cache.NewReflectorWithOptions(cache.ToListWatcherWithWatchListSemantics(lw, client), &corev1.Node{}, nodeReflection{s},
		cache.ReflectorOptions{Name: "nodes"}).RunWithContext(ctx)
}

// nodeReflection is a NodeStore as the library wants it.
type nodeReflection struct{ store NodeStore }

func (r nodeReflection) Add(obj any) error    { return r.with(obj, r.store.SetNode) }
func (r nodeReflection) Update(obj any) error { return r.with(obj, r.store.SetNode) }
func (r nodeReflection) Delete(obj any) error { return r.with(obj, r.store.RemoveNode) }
func (r nodeReflection) Resync() error        { return nil }

func (r nodeReflection) with(obj any, do func(*corev1.Node)) error {
	n, ok := obj.(*corev1.Node)
	if !ok {
		return fmt.Errorf("a %T among Nodes", obj)
	}
	do(r.store.Trim(n))
	return nil
}

func (r nodeReflection) Replace(list []any, _ string) error {
	nodes := make([]*corev1.Node, 0, len(list))
	for _, obj := range list {
		if n, ok := obj.(*corev1.Node); ok {
			nodes = append(nodes, r.store.Trim(n))
		}
	}
	r.store.ReplaceNodes(nodes)
	return nil
}

// Transformer keeps small what the library gathers on its way to Replace.
func (r nodeReflection) Transformer() cache.TransformFunc {
	return func(obj any) (any, error) {
		if n, ok := obj.(*corev1.Node); ok {
			return r.store.Trim(n), nil
		}
		return obj, nil
	}
}
