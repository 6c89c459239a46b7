package nodeview

import (
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/findings"
	"github.com/headcni/headcni/pkg/kube"
	"github.com/headcni/headcni/pkg/reconcile"
)

// View is the cluster at one moment.
type View struct {
	// Synced is true once the API server has sent everything.
	Synced bool
	// Err is why the API server cannot be asked, nil while it can.
	Err error
	// Node is our Node, nil where Kubernetes has none of that name.
	Node *corev1.Node
	// PodCIDRs cover the pod CIDRs of all Nodes in as few prefixes as possible.
	PodCIDRs []netip.Prefix
	// ServiceCIDRs are nil while they are not known.
	ServiceCIDRs []netip.Prefix

	name  string
	cidrs map[string][]netip.Prefix
}

// View returns what is known now. It returns nil for a nil Watch, which a node without Kubernetes has.
func (w *Watch) View() *View {
	if w == nil {
		return nil
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	v := &View{
		Synced: w.synced, Err: w.denied.judge(w.err, time.Now()), Node: w.own, ServiceCIDRs: w.services, name: w.node, cidrs: map[string][]netip.Prefix{},
	}
	var all []netip.Prefix
	for name, cidrs := range w.cidrs {
		v.cidrs[name] = cidrs
		all = append(all, cidrs...)
	}
	v.PodCIDRs = netset.Aggregate(all)
	return v
}

// Node is what other nodes need of one: who is it, and which pods are its?
type Node struct {
	Name string
	// Addrs are those that its Node object and its daemon name. The latter may only be the tailnet's.
	Addrs    []netip.Addr
	PodCIDRs []netip.Prefix
}

// Nodes returns all Nodes by name, and whether they are all: false until the API server has sent everything. It is the same list until one
// of them changes.
func (w *Watch) Nodes() (nodes []Node, all bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.list == nil {
		w.list = make([]Node, 0, len(w.addrs))
		for _, name := range slices.Sorted(maps.Keys(w.addrs)) {
			w.list = append(w.list, Node{Name: name, Addrs: w.addrs[name], PodCIDRs: w.cidrs[name]})
		}
	}
	return w.list, w.synced
}

// addrsOf are all addresses of a Node, sorted.
func addrsOf(n *corev1.Node) (out []netip.Addr) {
	for _, a := range n.Status.Addresses {
		if ip, err := netip.ParseAddr(a.Address); err == nil { // or a name
			out = append(out, ip.Unmap().WithZone(""))
		}
	}
	for _, text := range strings.Split(n.Annotations[kube.TailnetIPs], ",") {
		if ip, err := netip.ParseAddr(text); err == nil && (netset.TailnetIPv4.Contains(ip) || netset.TailnetIPv6.Contains(ip)) {
			out = append(out, ip)
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out)
}

// Holder names another Node that has a pod CIDR overlapping p, "" where there is none.
func (v *View) Holder(p netip.Prefix) string {
	for name, cidrs := range v.cidrs {
		if name != v.name && slices.ContainsFunc(cidrs, p.Overlaps) {
			return name
		}
	}
	return ""
}

// Controller returns the controller's view of the node with this key, nil where there is none.
func (v *View) Controller(nodeKey string) (*kube.View, error) {
	if v == nil || v.Node == nil {
		return nil, nil
	}
	said, ok, err := kube.ViewOf(v.Node)
	if err != nil || !ok || said.NodeKey != nodeKey {
		return nil, err
	}
	return &said, nil
}

// Runtime is our Node's container runtime, as kubelet says: containerd://2.1.0. It is "" while nobody says.
func (v *View) Runtime() string {
	if v.Node == nil {
		return ""
	}
	return v.Node.Status.NodeInfo.ContainerRuntimeVersion
}

// UninstallAsked reports whether an annotation of our Node asks the daemon to uninstall.
func (v *View) UninstallAsked() bool {
	return v.Node != nil && v.Node.Annotations[kube.Uninstall] == "true"
}

// PluginNotReady returns kubelet's message where the missing network plugin keeps our Node from being ready, else "".
func (v *View) PluginNotReady() string {
	if v.Node == nil {
		return ""
	}
	if i := slices.IndexFunc(v.Node.Status.Conditions, pluginNotReady); i >= 0 {
		return v.Node.Status.Conditions[i].Message
	}
	return ""
}

// ErrNoCIDR says why the node has no pod CIDR. It is a reconcile.Waiting until cidrPatience has passed.
func (v *View) ErrNoCIDR(waited time.Duration) error {
	var err error
	switch {
	case v.Err != nil:
		return findings.Errorf(findings.NoPodCIDR, "no pod CIDR is known yet and the API server cannot be asked: %w", v.Err)
	case !v.Synced:
		return reconcile.Waiting("asks the API server for this node's pod CIDR")
	case v.Node == nil:
		err = findings.Errorf(findings.NoPodCIDR, "Kubernetes has no Node %s: kubelet makes it; set kubernetes.nodeName or NODE_NAME if it is called otherwise", v.name)
	default:
		err = findings.Errorf(findings.NoPodCIDR, "Kubernetes has given Node %s no pod CIDR yet; kube-controller-manager does so with --allocate-node-cidrs and "+
			"--cluster-cidr, headcni-controller where network.clusterCIDRs is set", v.name)
	}
	if waited < cidrPatience {
		return reconcile.Waiting(err.Error())
	}
	return err
}

// pluginNotReady reports whether the missing network plugin keeps the Node from being ready. kubelet's message is that of the CRI (RuntimeCondition NetworkReady, reason NetworkPluginNotReady), then the runtime's own: containerd's
// "cni plugin not initialized", CRI-O's "No CNI configuration file in ...".
func pluginNotReady(c corev1.NodeCondition) bool {
	return c.Type == corev1.NodeReady && c.Status == corev1.ConditionFalse &&
		(strings.Contains(c.Message, "NetworkPluginNotReady") || strings.Contains(c.Message, "cni plugin not initialized"))
}
