package kube

import (
	"context"
	"fmt"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"
)

const (
	// page is how many objects are read at once where the server cannot stream them: a Node or a Pod is 10 kB and more.
	page = 100
	// listTimeout bounds the reading of one page.
	listTimeout = 30 * time.Second
)

// Feed takes what Follow learns of objects T. It keeps a V of each: otherwise thousands of whole objects would be in memory for a moment.
// Calls come one after the other, except those of Answered.
type Feed[T, V any] struct {
	// Trim copies of an object only what is kept.
	Trim func(T) V
	// Replace takes all there are, at the start and whenever events may have been missed.
	Replace func([]V)
	// Set is told of an object that is new or has changed, Remove of one that has gone, as it was last.
	Set, Remove func(V)
	// Answered says how each request to list or to watch went.
	Answered func(error)
}

// Follow tells of all objects of a kind until ctx ends. empty is one of the kind.
func Follow[T object, L runtime.Object, V any](ctx context.Context, client Client, objects Objects[T, L], empty T, f Feed[T, V]) {
	// The library logs each failed try; the feed hears of them.
	ctx = klog.NewContext(ctx, klog.New(nil))
	r := reflectorStore[T, V]{feed: f, meta: &metav1.ObjectMeta{}}
	lw := &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			// In pages also where the library would take everything at once from the server's cache.
			if o.Limit = page; o.ResourceVersion == "0" {
				o.ResourceVersion = ""
			}
			ctx, cancel := context.WithTimeout(ctx, listTimeout)
			defer cancel()
			list, err := objects.List(ctx, o)
			f.Answered(err)
			if err != nil {
				return nil, err
			}
			return r.trimList(list)
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			events, err := objects.Watch(ctx, o)
			f.Answered(err)
			return events, err
		},
	}
	cache.NewReflectorWithOptions(cache.ToListWatcherWithWatchListSemantics(lw, client), empty, r,
		cache.ReflectorOptions{Name: fmt.Sprintf("%T", empty)}).RunWithContext(ctx)
}

// trimmed is what is kept of an object, in the form that client-go passes around: it asks for name and version.
type trimmed[V any] struct {
	metav1.Object // empty, and of all
	namespace     string
	name, version string
	value         V
}

func (k *trimmed[V]) GetNamespace() string             { return k.namespace }
func (k *trimmed[V]) GetName() string                  { return k.name }
func (k *trimmed[V]) GetResourceVersion() string       { return k.version }
func (k *trimmed[V]) GetObjectKind() schema.ObjectKind { return schema.EmptyObjectKind }
func (k *trimmed[V]) DeepCopyObject() runtime.Object   { return k }

// reflectorStore is a Feed in the form that client-go's Reflector writes to.
type reflectorStore[T object, V any] struct {
	feed Feed[T, V]
	meta metav1.Object // the metadata of every trimmed object, but for name, namespace and version
}

func (r reflectorStore[T, V]) trim(o T) *trimmed[V] {
	return &trimmed[V]{Object: r.meta, namespace: o.GetNamespace(), name: o.GetName(), version: o.GetResourceVersion(), value: r.feed.Trim(o)}
}

// trimList trims the objects of one page.
func (r reflectorStore[T, V]) trimList(list runtime.Object) (runtime.Object, error) {
	from, err := meta.ListAccessor(list)
	if err != nil {
		return nil, err
	}
	out := &metav1.List{ListMeta: metav1.ListMeta{ResourceVersion: from.GetResourceVersion(), Continue: from.GetContinue()}}
	err = meta.EachListItem(list, func(o runtime.Object) error {
		if whole, ok := o.(T); ok {
			out.Items = append(out.Items, runtime.RawExtension{Object: r.trim(whole)})
		}
		return nil
	})
	return out, err
}

func (r reflectorStore[T, V]) Add(obj any) error    { return r.with(obj, r.feed.Set) }
func (r reflectorStore[T, V]) Update(obj any) error { return r.with(obj, r.feed.Set) }
func (r reflectorStore[T, V]) Delete(obj any) error { return r.with(obj, r.feed.Remove) }
func (r reflectorStore[T, V]) Resync() error        { return nil }

func (r reflectorStore[T, V]) with(obj any, do func(V)) error {
	whole, ok := obj.(T)
	if !ok {
		return fmt.Errorf("a %T among others", obj)
	}
	do(r.feed.Trim(whole))
	return nil
}

func (r reflectorStore[T, V]) Replace(list []any, _ string) error {
	all := make([]V, 0, len(list))
	for _, obj := range list {
		switch o := obj.(type) {
		case *trimmed[V]:
			all = append(all, o.value)
		case T:
			all = append(all, r.feed.Trim(o))
		}
	}
	r.feed.Replace(all)
	return nil
}

// Transformer trims objects of a stream while client-go gathers them for Replace.
func (r reflectorStore[T, V]) Transformer() cache.TransformFunc {
	return func(obj any) (any, error) {
		if whole, ok := obj.(T); ok {
			return r.trim(whole), nil
		}
		return obj, nil
	}
}
