package main

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/headcni/headcni/pkg/doctor"
)

// said is what a node answered.
type said[T any] struct {
	Node   string
	Answer T
}

// askDaemons runs headcnictl in the pods of the daemons of these nodes, nil for all that l looks at, and returns what those said that answered.
// The error names each of the others.
func askDaemons[T any](ctx context.Context, l looker, only []string, args ...string) (answered []said[T], err error) {
	seen, err := l.cluster.Find(ctx)
	if err != nil {
		return nil, err
	}
	command := append([]string{"headcnictl"}, append(args, "-o", "json")...)
	nodes := slices.DeleteFunc(seen.Nodes, func(n doctor.Node) bool { return only != nil && !slices.Contains(only, n.Name) })
	answers, errs := make([]T, len(nodes)), make([]error, len(nodes))
	var ask []func(context.Context)
	for i, n := range nodes {
		if errs[i] = n.Err; n.Err == nil {
			ask = append(ask, func(ctx context.Context) { errs[i] = l.cluster.Ask(ctx, n.Pod, &answers[i], command...) })
		}
	}
	l.cluster.All(ctx, ask...)
	if ctx.Err() != nil {
		return nil, errInterrupted
	}
	if err := l.cluster.Forbidden(errs); err != nil {
		return nil, err
	}
	for i, n := range nodes {
		if errs[i] != nil {
			errs[i] = fmt.Errorf("node %s: %w", n.Name, errs[i])
			continue
		}
		answered = append(answered, said[T]{n.Name, answers[i]})
	}
	return answered, errors.Join(errs...)
}
