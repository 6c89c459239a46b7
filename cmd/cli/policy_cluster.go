package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/headcni/headcni/pkg/kube/podexec"
	"github.com/headcni/headcni/pkg/policy/report"
)

// nodesOf are the nodes of a pod and of whom it speaks with, where that is a pod too.
func (f *policyFlags) nodesOf(ctx context.Context, l looker, pod, other string) (nodes []string, err error) {
	ctx, cancel := context.WithTimeout(ctx, f.timeout)
	defer cancel()
	for i, ref := range []string{pod, other} {
		namespace, name, ok := strings.Cut(ref, "/")
		if !ok {
			namespace, name = f.pods, ref
		}
		if ref == "" || namespace == "node" {
			continue
		}
		p, err := l.cluster.Client.Pods(namespace).Get(ctx, name, metav1.GetOptions{})
		switch {
		case i == 1 && (apierrors.IsNotFound(err) || apierrors.IsInvalid(err)): // an address or a node, or the pod's node says that there is none
		case apierrors.IsNotFound(err):
			return nil, fmt.Errorf("there is no pod %s in namespace %s", name, namespace)
		case err != nil:
			return nil, fmt.Errorf("look for pod %s/%s: %w", namespace, name, err)
		case p.Spec.NodeName == "":
			return nil, fmt.Errorf("pod %s/%s is on no node yet", namespace, name)
		case !slices.Contains(nodes, p.Spec.NodeName):
			nodes = append(nodes, p.Spec.NodeName)
		}
	}
	return nodes, nil
}

// bothSides is what both ends' nodes say in one: of each side what the node says whose kernel was asked.
func bothSides(nodes []said[report.Explanation]) report.Explanation {
	one := nodes[0].Answer
	for _, other := range nodes[1:] {
		for i, a := range one.Answers {
			for j := range a.Sides {
				if i >= len(other.Answer.Answers) || j >= len(other.Answer.Answers[i].Sides) {
					continue // pods have changed between the two answers
				}
				if side := other.Answer.Answers[i].Sides[j]; a.Sides[j].Kernel.Asked == 0 && side.Kernel.Asked > 0 && side.Of == a.Sides[j].Of {
					a.Sides[j] = side
				}
			}
		}
	}
	return one
}

// printAll prints the answers of several nodes: as text each below the node's name, where there are several.
func printAll[T any](f *policyFlags, out io.Writer, all []said[T], text func(T) error) error {
	if f.output == "json" {
		answers := []T{}
		for _, a := range all {
			answers = append(answers, a.Answer)
		}
		return printJSON(out, answers)
	}
	for i, a := range all {
		if len(all) > 1 {
			fmt.Fprintf(out, "%snode %s\n\n", strings.Repeat("\n", min(i, 1)), a.Node)
		}
		if err := text(a.Answer); err != nil {
			return err
		}
	}
	return nil
}

// nodeDrop is a packet that was denied on a node.
type nodeDrop struct {
	Node string `json:"node"`
	report.Drop
}

// followAll prints a line for each packet that any node denies, until ctx ends or no node answers any more.
func (f *policyFlags) followAll(ctx context.Context, l looker, out, notes io.Writer, pod string) error {
	seen, err := l.cluster.Find(ctx)
	if err != nil {
		return err
	}
	command := []string{"headcnictl", "drops", "-f", "-o", "json", "-n", f.pods}
	if pod != "" {
		command = append(command, "--pod", pod)
	}
	var wg sync.WaitGroup
	lines := &dropLines{out: out, text: f.output != "json", named: len(seen.Nodes) > 1}
	errs := make([]error, len(seen.Nodes))
	for i, n := range seen.Nodes {
		if errs[i] = n.Err; n.Err != nil {
			fmt.Fprintf(notes, "node %s: %v\n", n.Name, n.Err)
			continue
		}
		wg.Go(func() {
			// It ends there by the end of its standard input, which is when ctx ends.
			in, end := io.Pipe()
			defer context.AfterFunc(ctx, func() { end.Close() })()
			errs[i] = podexec.Stream(ctx, l.config, n.Pod, in, &nodeLines{node: n.Name, to: lines}, command...)
			if ctx.Err() == nil {
				errs[i] = fmt.Errorf("node %s: %w", n.Name, cmp.Or(errs[i], errEnded))
				fmt.Fprintln(notes, errs[i])
			}
		})
	}
	fmt.Fprintf(notes, "%d nodes log what policies deny, at most ten packets a second of each kind; Ctrl-C ends it\n", len(seen.Nodes))
	wg.Wait()
	if ctx.Err() != nil {
		return lines.err
	}
	return errors.Join(lines.err, l.cluster.Forbidden(errs), noneAnswered(errs))
}

var errEnded = errors.New("its daemon ended or went away; begin anew when it is back")

// dropLines prints what nodes say, a line at a time.
type dropLines struct {
	mu    sync.Mutex
	out   io.Writer
	text  bool
	named bool // the node is said
	err   error
}

func (d *dropLines) print(node string, line []byte) error {
	drop := nodeDrop{Node: node}
	if err := json.Unmarshal(line, &drop.Drop); err != nil {
		return fmt.Errorf("what node %s says cannot be read: %w", node, err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.err != nil:
	case !d.text:
		d.err = json.NewEncoder(d.out).Encode(drop)
	case d.named:
		_, d.err = fmt.Fprintf(d.out, "%s  %s\n", node, drop.Text())
	default:
		_, d.err = fmt.Fprintln(d.out, drop.Text())
	}
	return d.err
}

// nodeLines is where one node writes.
type nodeLines struct {
	node string
	to   *dropLines
	half []byte
}

func (n *nodeLines) Write(p []byte) (int, error) {
	n.half = append(n.half, p...)
	for {
		line, rest, ok := bytes.Cut(n.half, []byte("\n"))
		if !ok {
			return len(p), nil
		}
		n.half = rest
		if err := n.to.print(n.node, line); err != nil {
			return 0, err
		}
	}
}
