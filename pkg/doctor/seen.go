// Package doctor looks at all nodes and judges what they say: is all well, and what is to be done?
package doctor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/headcni/headcni/pkg/kube"
	"github.com/headcni/headcni/pkg/kube/podexec"
	"github.com/headcni/headcni/pkg/nodestatus"
	"github.com/headcni/headcni/pkg/reconcile"
)

// atOnce is how many pods are asked at the same time.
const atOnce = 16

// Seen is what a look has seen.
type Seen struct {
	// Kubernetes is false where one node was asked by its own socket.
	Kubernetes bool
	// Nodes are in the order of their names.
	Nodes []Node
	// Controllers are pods of headcni-controller.
	Controllers []Controller
}

// Node is what was seen of a node.
type Node struct {
	Name string
	// PodCIDRs are those of the Node object.
	PodCIDRs []netip.Prefix
	// Addrs are its internal ones. Away is since when it is not ready, zero where it is.
	Addrs []netip.Addr
	Away  time.Time
	// Pod is the daemon's, the zero Pod where the node has none.
	Pod podexec.Pod
	// Tailscaled is the dedicated tailscaled's pod, the zero Pod where the node has none.
	Tailscaled podexec.Pod
	// Status is nil where Err says why.
	Status *nodestatus.Status
	Err    error
	// Skew is how far the node's clock is ahead of ours, at least: what the answer's own time can explain is not counted.
	Skew time.Duration
}

// Controller is what was seen of a pod of headcni-controller.
type Controller struct {
	Pod   podexec.Pod
	Node  string
	Parts []reconcile.Status
	Err   error
}

// leads reports whether it says how Headscale stands: only the one that leads asks.
func (c Controller) leads() bool {
	return slices.ContainsFunc(c.Parts, func(p reconcile.Status) bool { return p.Name == "leader" })
}

// Local looks at this node by its daemon's socket.
func Local(ctx context.Context, socket string) (Seen, error) {
	name, err := os.Hostname()
	if err != nil {
		name = "this node"
	}
	began := time.Now()
	s, err := nodestatus.Ask(ctx, socket)
	if err != nil {
		return Seen{}, err
	}
	return Seen{Nodes: []Node{{Name: name, Status: &s, Skew: skew(began, time.Now(), s.Time)}}}, nil
}

// skew is what is left of the difference between two clocks when the time between question and answer is taken off.
func skew(began, ended, said time.Time) time.Duration {
	switch {
	case said.IsZero(): // an older daemon
	case said.Before(began):
		return said.Sub(began)
	case said.After(ended):
		return said.Sub(ended)
	}
	return 0
}

// Cluster is where the nodes of a Kubernetes are asked.
type Cluster struct {
	Client    kube.Client
	Namespace string
	// Exec runs a command in a pod.
	Exec func(ctx context.Context, pod podexec.Pod, command ...string) ([]byte, error)
	// Timeout bounds what one node may take.
	Timeout time.Duration
	// Node is the only one to look at, "" = all.
	Node string
}

// Components of the chart, by the label app.kubernetes.io/component, whose containers are called as below.
const (
	// Labels select all our pods.
	Labels    = "app.kubernetes.io/name=headcni"
	component = "app.kubernetes.io/component"
	// DaemonLabels and TailscaledLabels select those of one component.
	DaemonLabels     = Labels + "," + component + "=" + daemon
	TailscaledLabels = Labels + "," + component + "=" + tailscaled

	daemon     = "daemon"
	tailscaled = "tailscaled"
	controller = "controller"
)

var containers = map[string]string{daemon: "headcni-daemon", tailscaled: "tailscaled", controller: "headcni-controller"}

// Look finds nodes and our pods and asks each, all at once.
func (c Cluster) Look(ctx context.Context) (Seen, error) {
	s, err := c.Find(ctx)
	if err != nil {
		return Seen{}, err
	}
	var ask []func(context.Context)
	for i := range s.Nodes {
		if n := &s.Nodes[i]; n.Err == nil {
			ask = append(ask, func(ctx context.Context) { c.askNode(ctx, n) })
		}
	}
	for i := range s.Controllers {
		if p := &s.Controllers[i]; p.Err == nil {
			ask = append(ask, func(ctx context.Context) { c.askController(ctx, p) })
		}
	}
	c.All(ctx, ask...)
	if err := ctx.Err(); err != nil {
		return Seen{}, err
	}
	var errs []error
	for _, n := range s.Nodes {
		errs = append(errs, n.Err)
	}
	return s, c.Forbidden(errs)
}

// All asks at the same time, not more than a few at once, each for Timeout at most.
func (c Cluster) All(ctx context.Context, ask ...func(context.Context)) {
	var wg sync.WaitGroup
	free := make(chan struct{}, atOnce)
	for _, one := range ask {
		wg.Go(func() {
			free <- struct{}{}
			defer func() { <-free }()
			ctx, cancel := context.WithTimeout(ctx, c.Timeout)
			defer cancel()
			one(ctx)
		})
	}
	wg.Wait()
}

// Forbidden is an error, with the right that is lacking, where it kept all nodes from being asked.
func (c Cluster) Forbidden(errs []error) error {
	i := slices.IndexFunc(errs, func(err error) bool { return errors.Is(err, podexec.ErrForbidden) })
	if i < 0 || slices.Contains(errs, nil) {
		return nil
	}
	return fmt.Errorf("%w; asking a node needs the right to create pods/exec in namespace %s", errs[i], c.Namespace)
}

// ErrNoPods means that HeadCNI's chart is not in the namespace.
var ErrNoPods = errors.New("no pod of HeadCNI's daemon")

// Find lists nodes and our pods without asking any.
func (c Cluster) Find(ctx context.Context) (s Seen, err error) {
	ctx, cancel := context.WithTimeout(ctx, c.Timeout)
	defer cancel()
	nodes, err := c.Client.Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return s, fmt.Errorf("list the Nodes: %w", err)
	}
	pods, err := c.Client.Pods(c.Namespace).List(ctx, metav1.ListOptions{LabelSelector: Labels})
	if err != nil {
		return s, fmt.Errorf("list HeadCNI's pods in namespace %s: %w", c.Namespace, err)
	}
	spec, err := c.daemons(ctx)
	if err != nil {
		return s, err
	}
	byNode := map[string]map[string]corev1.Pod{}
	for _, p := range pods.Items {
		name := p.Labels[component]
		if name == controller {
			s.Controllers = append(s.Controllers, Controller{Pod: c.pod(p), Node: p.Spec.NodeName, Err: notRunning(p)})
			continue
		}
		if byNode[p.Spec.NodeName] == nil {
			byNode[p.Spec.NodeName] = map[string]corev1.Pod{}
		}
		// After a rollout an old pod may still be there, on its way out.
		if before, ok := byNode[p.Spec.NodeName][name]; !ok || notRunning(before) != nil {
			byNode[p.Spec.NodeName][name] = p
		}
	}
	if !slices.ContainsFunc(pods.Items, func(p corev1.Pod) bool { return p.Labels[component] == daemon }) {
		return s, fmt.Errorf("%w in namespace %s: where it is installed elsewhere, name that by --namespace", ErrNoPods, c.Namespace)
	}
	var names []string
	for _, n := range nodes.Items {
		names = append(names, n.Name)
		if c.Node != "" && n.Name != c.Node || skipped(n) || !chosen(spec, &n) && byNode[n.Name][daemon].Name == "" {
			continue
		}
		out := Node{Name: n.Name}
		out.PodCIDRs, _ = kube.PodCIDRs(&n) // a malformed one is the daemon's to report
		for _, a := range n.Status.Addresses {
			if addr, err := netip.ParseAddr(a.Address); err == nil && a.Type == corev1.NodeInternalIP {
				out.Addrs = append(out.Addrs, addr)
			}
		}
		for _, c := range n.Status.Conditions {
			if c.Type == corev1.NodeReady && c.Status != corev1.ConditionTrue {
				out.Away = c.LastTransitionTime.Time
			}
		}
		p, ok := byNode[n.Name][daemon]
		if ok {
			out.Pod, out.Err = c.pod(p), notRunning(p)
		} else {
			out.Err = errNoDaemon
		}
		if p, ok := byNode[n.Name][tailscaled]; ok {
			out.Tailscaled = c.pod(p)
		}
		s.Nodes = append(s.Nodes, out)
	}
	if c.Node != "" && !slices.Contains(names, c.Node) {
		slices.Sort(names)
		return s, fmt.Errorf("there is no Node %q: there are %s", c.Node, strings.Join(names, ", "))
	}
	slices.SortFunc(s.Nodes, func(a, b Node) int { return strings.Compare(a.Name, b.Name) })
	s.Kubernetes = true
	return s, nil
}

// skipped are Nodes that HeadCNI is not for, and those that it has left.
func skipped(n corev1.Node) bool {
	os := n.Labels[corev1.LabelOSStable]
	return os != "" && os != "linux" || n.Annotations[kube.Uninstalled] != ""
}

func (c Cluster) pod(p corev1.Pod) podexec.Pod {
	return podexec.Pod{Namespace: p.Namespace, Name: p.Name, Container: containers[p.Labels[component]]}
}

var errNoDaemon = errors.New("no pod of the DaemonSet headcni is on this Node")

// notRunning says what keeps a pod from being asked.
func notRunning(p corev1.Pod) error {
	for _, s := range slices.Concat(p.Status.InitContainerStatuses, p.Status.ContainerStatuses) {
		if w := s.State.Waiting; w != nil && w.Reason != "" && w.Reason != "PodInitializing" {
			return fmt.Errorf("pod %s: container %s: %s", p.Name, s.Name, strings.TrimSpace(w.Reason+" "+w.Message))
		}
	}
	if p.Status.Phase != corev1.PodRunning {
		return fmt.Errorf("pod %s is %s", p.Name, p.Status.Phase)
	}
	return nil
}

func (c Cluster) askNode(ctx context.Context, n *Node) {
	began := time.Now()
	var s nodestatus.Status
	if n.Err = c.Ask(ctx, n.Pod, &s, "headcni-daemon", "status", "-o", "json"); n.Err == nil {
		n.Status, n.Skew = &s, skew(began, time.Now(), s.Time)
	}
}

func (c Cluster) askController(ctx context.Context, p *Controller) {
	var answer struct {
		Parts []reconcile.Status `json:"parts"`
	}
	p.Err = c.Ask(ctx, p.Pod, &answer, "headcni-controller", "health", "-o", "json")
	p.Parts = answer.Parts
}

// Ask decodes what a command prints. One that says that something is not right exits with 1 and has answered all the same.
func (c Cluster) Ask(ctx context.Context, pod podexec.Pod, answer any, command ...string) error {
	out, err := c.Exec(ctx, pod, command...)
	if len(out) > 0 && (err == nil || errors.As(err, new(podexec.Exit))) {
		if bad := json.Unmarshal(out, answer); bad == nil {
			return nil
		} else if err == nil {
			err = bad
		}
	}
	if err == nil {
		err = errors.New("it said nothing")
	}
	return fmt.Errorf("ask pod %s: %w", pod.Name, err)
}
