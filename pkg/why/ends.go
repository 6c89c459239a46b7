package why

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/doctor"
	"github.com/headcni/headcni/pkg/kube/podexec"
)

// found is an end of a Kubernetes.
type found struct {
	End
	addrs []netip.Addr
	// node is where to ask, nil for nowhere of ours.
	node *doctor.Node
}

// book finds ends among the Nodes and pods of a Kubernetes.
type book struct {
	nodes []doctor.Node
	// pod reads a Pod of the API server.
	pod func(ctx context.Context, namespace, name string) (*corev1.Pod, error)
	// namespace is that of pods that are named without one.
	namespace string
}

// errService says why a service is no end.
var errService = errors.New("a service is no place: kube-proxy chooses one of the pods behind it, each of which can be asked about (kubectl get endpointslices)")

func (b book) find(ctx context.Context, text string) (found, error) {
	if a, err := netip.ParseAddr(text); err == nil {
		return b.at(a.Unmap()), nil
	}
	if strings.HasPrefix(text, "svc/") || strings.HasPrefix(text, "service/") {
		return found{}, fmt.Errorf("%s: %w", text, errService)
	}
	if name, ok := strings.CutPrefix(text, Self+"/"); ok {
		return b.node(name)
	}
	namespace, name, ok := strings.Cut(text, "/")
	if !ok {
		namespace, name = b.namespace, text
	}
	p, err := b.pod(ctx, namespace, name)
	switch {
	case apierrors.IsNotFound(err) && !ok && slices.ContainsFunc(b.nodes, func(n doctor.Node) bool { return n.Name == text }):
		return found{}, fmt.Errorf("there is no pod %s/%s; the node of that name is node/%s", namespace, name, text)
	case apierrors.IsNotFound(err) && !ok && namespace == b.namespace:
		// A device of the tailnet, as the near node's tailscaled knows it.
		return found{End: End{Name: text, Outside: true}}, nil
	case apierrors.IsNotFound(err):
		return found{}, fmt.Errorf("there is no pod %s/%s: kubectl get pods -n %s lists them", namespace, name, namespace)
	case apierrors.IsForbidden(err):
		return found{}, fmt.Errorf("%w; it needs the right to get pods in namespace %s, or the pod's address in place of its name", err, namespace)
	case err != nil:
		return found{}, fmt.Errorf("read pod %s/%s: %w", namespace, name, err)
	}
	return b.of(p)
}

func (b book) node(name string) (found, error) {
	i := slices.IndexFunc(b.nodes, func(n doctor.Node) bool { return n.Name == name })
	if i < 0 {
		var known []string
		for _, n := range b.nodes {
			known = append(known, n.Name)
		}
		return found{}, fmt.Errorf("there is no Node %q: there are %s", name, strings.Join(known, ", "))
	}
	return found{End: End{Name: Self + "/" + name, Node: name}, addrs: b.nodes[i].Addrs, node: &b.nodes[i]}, nil
}

// of is a pod. One on its node's network is its node.
func (b book) of(p *corev1.Pod) (found, error) {
	name := p.Namespace + "/" + p.Name
	if p.Spec.NodeName == "" {
		return found{}, fmt.Errorf("pod %s has no node yet: kubectl -n %s describe pod %s says why", name, p.Namespace, p.Name)
	}
	if p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed {
		return found{}, fmt.Errorf("pod %s has ended (%s)", name, p.Status.Phase)
	}
	f, err := b.node(p.Spec.NodeName)
	if err != nil {
		return f, fmt.Errorf("pod %s: %w", name, err)
	}
	f.Name = name
	if p.Spec.HostNetwork {
		return f, nil
	}
	f.Pod, f.addrs = true, nil
	for _, ip := range p.Status.PodIPs {
		if a, err := netip.ParseAddr(ip.IP); err == nil {
			f.addrs = append(f.addrs, a)
		}
	}
	if len(f.addrs) == 0 {
		return f, fmt.Errorf("pod %s has no address yet: kubectl -n %s describe pod %s says why", name, p.Namespace, p.Name)
	}
	return f, nil
}

// at is an address: of a node's pods, of a node, or somebody else's.
func (b book) at(a netip.Addr) found {
	f := found{End: End{Name: a.String()}, addrs: []netip.Addr{a}}
	for i, n := range b.nodes {
		pod := netset.Contains(n.PodCIDRs, a)
		if pod || slices.Contains(n.Addrs, a) {
			f.node, f.Node, f.Pod = &b.nodes[i], n.Name, pod
			return f
		}
	}
	f.Outside = true
	return f
}

// pair chooses addresses of one family.
func pair(from, to found) (src, dst string, err error) {
	if !from.Pod {
		src = Self
	}
	if len(to.addrs) == 0 { // a device of the tailnet
		if from.Pod {
			src = from.addrs[0].String()
		}
		return src, to.Name, nil
	}
	for _, d := range to.addrs {
		if a := ofFamily(from.addrs, d); a.IsValid() {
			if from.Pod {
				src = a.String()
			}
			return src, d.String(), nil
		}
	}
	return "", "", fmt.Errorf("%s and %s have no addresses of one family", from.Name, to.Name)
}

// Cluster asks the nodes of a Kubernetes.
type Cluster struct {
	doctor.Cluster
	// Pods is the namespace of pods that are named without one.
	Pods string
	// Stream runs a command in a pod, with what it reads and writes.
	Stream func(ctx context.Context, pod podexec.Pod, in io.Reader, out io.Writer, command ...string) error
}

// ends are both, and what q must say of them.
type ends struct {
	seen     doctor.Seen
	pages    book
	from, to found
	src, dst string
}

func (k Cluster) ends(ctx context.Context, a, b string) (e ends, err error) {
	if e.seen, err = k.Find(ctx); err != nil {
		return e, err
	}
	e.pages = book{nodes: e.seen.Nodes, namespace: k.Pods, pod: func(ctx context.Context, namespace, name string) (*corev1.Pod, error) {
		ctx, cancel := context.WithTimeout(ctx, k.Timeout)
		defer cancel()
		return k.Client.Pods(namespace).Get(ctx, name, metav1.GetOptions{})
	}}
	if e.from, err = e.pages.find(ctx, a); err != nil {
		return e, err
	}
	if e.to, err = e.pages.find(ctx, b); err != nil {
		return e, err
	}
	if e.from.node == nil {
		return e, fmt.Errorf("%s is no pod and no node of this cluster: it cannot be asked, and what it sends neither", a)
	}
	e.src, e.dst, err = pair(e.from, e.to)
	return e, err
}

// Ping asks the sender's node to.
func (k Cluster) Ping(ctx context.Context, a, b string, q Pings) (p Pinged, err error) {
	e, err := k.ends(ctx, a, b)
	if err != nil {
		return p, err
	}
	if err = e.from.node.Err; err == nil {
		one := k.Cluster
		one.Timeout += time.Duration(q.Count) * (pingInterval + time.Second)
		one.All(ctx, func(ctx context.Context) {
			err = one.Ask(ctx, e.from.node.Pod, &p, "headcnictl", "ping", "part", e.src, e.dst, "-c", fmt.Sprint(q.Count), "--size", fmt.Sprint(q.Size))
		})
	}
	if err != nil {
		err = fmt.Errorf("node %s: %w", e.from.Node, k.forbidden(err))
	}
	return p, err
}

// Look finds both ends and asks both nodes, and Headscale by the controller.
func (k Cluster) Look(ctx context.Context, a, b string, q Question) (Case, error) {
	e, err := k.ends(ctx, a, b)
	if err != nil {
		return Case{}, err
	}
	seen, pages, from, to := e.seen, e.pages, e.from, e.to
	q.Src, q.Dst = e.src, e.dst
	c := Case{From: from.End, To: to.End, Question: q, Now: time.Now()}
	if c.Near, err = k.side(ctx, from.node, q); err != nil {
		return Case{}, k.forbidden(err)
	}
	c.From.Addr, c.To.Addr = c.Near.Src, c.Near.Dst
	if to.node == nil && c.Near.Tailnet.Holder != nil {
		// The tailnet's address of a node.
		if n, err := pages.node(c.Near.Tailnet.Holder.Name); err == nil && slices.Contains(c.Near.Tailnet.Holder.IPs, c.Near.Dst) {
			to.node, c.To.Node, c.To.Outside = n.node, n.Node, false
		}
	}
	var ask []func(context.Context)
	if c.way() != local && to.node != nil {
		ask = append(ask, func(ctx context.Context) { c.askFar(ctx, to.node, k.side) })
	}
	if c.way() == tunnel {
		ask = append(ask, func(ctx context.Context) { k.headscale(ctx, seen, &c) })
	}
	k.All(ctx, ask...)
	if q.Live && ctx.Err() == nil {
		k.All(ctx, func(ctx context.Context) { k.live(ctx, &c, from.node, to.node) })
	}
	return c, ctx.Err()
}

// live has the one node send, and the other look on.
func (k Cluster) live(ctx context.Context, c *Case, from, to *doctor.Node) {
	ask := nodes{near: func(ctx context.Context, command []string) ([]byte, error) { return k.Exec(ctx, from.Pod, command...) }}
	if to != nil {
		ask.far = func(ctx context.Context, in io.Reader, out io.Writer, command []string) error {
			return k.Stream(ctx, to.Pod, in, out, command...)
		}
	}
	c.try(ctx, ask)
}

func (k Cluster) forbidden(err error) error {
	if right := k.Forbidden([]error{err}); right != nil {
		return right
	}
	return err
}

// askFar asks the node of who is sent to.
func (c *Case) askFar(ctx context.Context, n *doctor.Node, ask func(context.Context, *doctor.Node, Question) (Side, error)) {
	q, err := c.farQuestion()
	var s Side
	if err == nil {
		s, err = ask(ctx, n, q)
	}
	if err != nil {
		c.FarError = err.Error()
		return
	}
	c.Far = &s
}

// farQuestion is what the node of who is sent to is asked.
func (c *Case) farQuestion() (Question, error) {
	q := c.Question
	if !c.Near.SeenAs.IsValid() {
		return q, fmt.Errorf("the sender's node has no address to send to %s from", c.Near.Dst)
	}
	q.Far, q.Src, q.Dst = true, c.Near.SeenAs.String(), c.Near.Dst.String()
	return q, nil
}

// side asks one node.
func (k Cluster) side(ctx context.Context, n *doctor.Node, q Question) (s Side, err error) {
	if err = n.Err; err == nil {
		err = k.Ask(ctx, n.Pod, &s, append([]string{"headcnictl"}, q.Args()...)...)
	}
	if err != nil {
		away := ""
		if !n.Away.IsZero() {
			away = fmt.Sprintf(" (not ready since %s)", n.Away.Format(time.DateTime))
		}
		return s, fmt.Errorf("node %s%s: %w", n.Name, away, err)
	}
	return s, nil
}

// Args are the command that answers the question on a node.
func (q Question) Args() []string {
	side := "near"
	if q.Far {
		side = "far"
	}
	return []string{"why", "part", side, q.Src, q.Dst, "--proto", q.Protocol, "--port", fmt.Sprint(q.Port)}
}

// headscale asks by the first controller that answers: no node has the key.
func (k Cluster) headscale(ctx context.Context, seen doctor.Seen, c *Case) {
	c.HeadscaleError = "headcni-controller has no pod"
	for _, p := range seen.Controllers {
		err := p.Err
		if err == nil {
			var h Headscale
			if err = k.Ask(ctx, p.Pod, &h, "headcnictl", "why", "headscale"); err == nil {
				c.Headscale, c.HeadscaleError = &h, ""
				return
			}
		}
		c.HeadscaleError = err.Error()
	}
}
