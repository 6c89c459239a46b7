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

// Feed takes what Follow learns of objects T. It keeps a V of each: thousands of whole objects would be in memory for a moment
// otherwise. One call comes after the other but those of Answered.
type Feed[T, V any] struct {
	Keep func(T) V
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
	r := reflection[T, V]{feed: f, rest: &metav1.ObjectMeta{}}
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
			return r.keepList(list)
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

// kept is what is kept of an object, on its way through the library, which asks it for its name and its version.
type kept[V any] struct {
	metav1.Object // empty, and of all
	namespace     string
	name, version string
	of            V
}

func (k *kept[V]) GetNamespace() string             { return k.namespace }
func (k *kept[V]) GetName() string                  { return k.name }
func (k *kept[V]) GetResourceVersion() string       { return k.version }
func (k *kept[V]) GetObjectKind() schema.ObjectKind { return schema.EmptyObjectKind }
func (k *kept[V]) DeepCopyObject() runtime.Object   { return k }

// reflection is a Feed as the library wants it.
type reflection[T object, V any] struct {
	feed Feed[T, V]
	rest metav1.Object // what objects say of themselves that is not kept
}

func (r reflection[T, V]) keep(o T) *kept[V] {
	return &kept[V]{Object: r.rest, namespace: o.GetNamespace(), name: o.GetName(), version: o.GetResourceVersion(), of: r.feed.Keep(o)}
}

// keepList makes a list of what is kept of one page.
func (r reflection[T, V]) keepList(list runtime.Object) (runtime.Object, error) {
	from, err := meta.ListAccessor(list)
	if err != nil {
		return nil, err
	}
	out := &metav1.List{ListMeta: metav1.ListMeta{ResourceVersion: from.GetResourceVersion(), Continue: from.GetContinue()}}
	err = meta.EachListItem(list, func(o runtime.Object) error {
		if whole, ok := o.(T); ok {
			out.Items = append(out.Items, runtime.RawExtension{Object: r.keep(whole)})
		}
		return nil
	})
	return out, err
}

func (r reflection[T, V]) Add(obj any) error    { return r.with(obj, r.feed.Set) }
func (r reflection[T, V]) Update(obj any) error { return r.with(obj, r.feed.Set) }
func (r reflection[T, V]) Delete(obj any) error { return r.with(obj, r.feed.Remove) }
func (r reflection[T, V]) Resync() error        { return nil }

func (r reflection[T, V]) with(obj any, do func(V)) error {
	whole, ok := obj.(T)
	if !ok {
		return fmt.Errorf("a %T among others", obj)
	}
	do(r.feed.Keep(whole))
	return nil
}

func (r reflection[T, V]) Replace(list []any, _ string) error {
	all := make([]V, 0, len(list))
	for _, obj := range list {
		switch o := obj.(type) {
		case *kept[V]:
			all = append(all, o.of)
		case T:
			all = append(all, r.feed.Keep(o))
		}
	}
	r.feed.Replace(all)
	return nil
}

// Transformer keeps small what the library gathers of a stream on its way to Replace.
func (r reflection[T, V]) Transformer() cache.TransformFunc {
	return func(obj any) (any, error) {
		if whole, ok := obj.(T); ok {
			return r.keep(whole), nil
		}
		return obj, nil
	}
}
