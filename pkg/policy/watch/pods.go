package watch

import (
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/headcni/headcni/pkg/policy"
)

// pod is what is kept of a Pod.
type pod struct {
	policy.Pod
	static types.UID // of a static pod: kubelet's own UID, else ""
	// placed is the pod with the addresses that count, nil until that is known, and beside are those in no Node's range.
	placed *policy.Pod
	beside []netip.Prefix
}

func (p *pod) name() types.NamespacedName {
	return types.NamespacedName{Namespace: p.Namespace, Name: p.Name}
}

// trimPod takes from a Pod what policies can ask. Of one with its node's addresses they ask nothing; one that is done has none, but its
// link may still be there.
func trimPod(p *corev1.Pod) pod {
	out := pod{Pod: policy.Pod{
		Namespace: p.Namespace, Name: p.Name, UID: p.UID, Node: p.Spec.NodeName, HostNetwork: p.Spec.HostNetwork,
		Done:        p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed,
		Terminating: p.DeletionTimestamp != nil,
	}, static: types.UID(p.Annotations[corev1.MirrorPodAnnotationKey])}
	if out.HostNetwork {
		return out
	}
	out.Labels = p.Labels
	for _, c := range p.Spec.Containers {
		out.Ports = appendPorts(out.Ports, c.Ports)
	}
	for _, c := range p.Spec.InitContainers {
		if c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways { // it runs as long as the others
			out.Ports = appendPorts(out.Ports, c.Ports)
		}
	}
	if out.Done {
		return out
	}
	for _, ip := range p.Status.PodIPs {
		if a, err := netip.ParseAddr(ip.IP); err == nil {
			out.IPs = append(out.IPs, a.Unmap().WithZone(""))
		}
	}
	if a, err := netip.ParseAddr(p.Status.PodIP); err == nil && len(out.IPs) == 0 {
		out.IPs = append(out.IPs, a.Unmap().WithZone(""))
	}
	return out
}

var protocols = map[corev1.Protocol]policy.Protocol{"": policy.TCP, corev1.ProtocolTCP: policy.TCP, corev1.ProtocolUDP: policy.UDP, corev1.ProtocolSCTP: policy.SCTP}

func appendPorts(out []policy.NamedPort, ports []corev1.ContainerPort) []policy.NamedPort {
	for _, c := range ports {
		protocol, known := protocols[c.Protocol]
		if c.Name != "" && known && c.ContainerPort > 0 && c.ContainerPort <= 65535 {
			out = append(out, policy.NamedPort{Name: c.Name, Protocol: protocol, Port: uint16(c.ContainerPort)})
		}
	}
	return out
}

// pods are those of the cluster. What is in a snapshot does not change any more: a pod that changes is another one.
type pods struct {
	list   []*pod
	at     map[types.NamespacedName]int
	shared shared
}

func newPods() pods { return pods{at: map[types.NamespacedName]int{}, shared: shared{}} }

// replace keeps the pods that are as they were.
func (s *pods) replace(all []pod) {
	now := make(map[types.NamespacedName]bool, len(all))
	for _, p := range all {
		now[p.name()] = true
		s.set(p)
	}
	for i := len(s.list) - 1; i >= 0; i-- { // what takes the place of one that goes has been looked at
		if name := s.list[i].name(); !now[name] {
			s.remove(name)
		}
	}
}

// set reports whether anything changed that policies ask.
func (s *pods) set(p pod) bool {
	i, had := s.at[p.name()]
	if had && equalPods(&s.list[i].Pod, &p.Pod) && s.list[i].static == p.static {
		return false
	}
	s.shared.prune(len(s.list))
	s.shared.share(&p.Pod)
	if had {
		s.list[i] = &p
		return true
	}
	s.at[p.name()] = len(s.list)
	s.list = append(s.list, &p)
	return true
}

func (s *pods) remove(name types.NamespacedName) bool {
	i, had := s.at[name]
	if !had {
		return false
	}
	delete(s.at, name)
	last := len(s.list) - 1
	if i != last {
		s.list[i] = s.list[last]
		s.at[s.list[i].name()] = i
	}
	s.list[last] = nil
	s.list = s.list[:last]
	return true
}

func equalPods(a, b *policy.Pod) bool {
	return a.UID == b.UID && a.Node == b.Node && a.HostNetwork == b.HostNetwork && a.Done == b.Done && a.Terminating == b.Terminating &&
		slices.Equal(a.IPs, b.IPs) && slices.Equal(a.Ports, b.Ports) && equalLabels(a.Labels, b.Labels)
}

func equalLabels(a, b map[string]string) bool { return maps.Equal(a, b) }

// shared holds what many pods have alike, once: the labels of a Deployment's pods, names of nodes and namespaces. Labels are by far the
// most of a pod.
type shared map[string]any

func (s shared) share(p *policy.Pod) {
	p.Namespace, p.Node = s.text(p.Namespace), s.text(p.Node)
	for i := range p.Ports {
		p.Ports[i].Name = s.text(p.Ports[i].Name)
	}
	p.Labels = s.labels(p.Labels)
}

// labels returns the one copy of labels, nil for none.
func (s shared) labels(l map[string]string) map[string]string {
	if len(l) == 0 {
		return nil
	}
	var key strings.Builder
	for _, k := range slices.Sorted(maps.Keys(l)) {
		key.WriteString(k + "\x00" + l[k] + "\x00")
	}
	if have, ok := s[key.String()].(map[string]string); ok {
		return have
	}
	own := make(map[string]string, len(l))
	for k, v := range l {
		own[s.text(k)] = v
	}
	s[key.String()] = own
	return own
}

// sharePolicy does so for the labels that a policy's selectors ask for: a map takes more memory than all else of a peer.
func (s shared) sharePolicy(p *networkingv1.NetworkPolicy) {
	share := func(sel *metav1.LabelSelector) {
		if sel != nil {
			sel.MatchLabels = s.labels(sel.MatchLabels)
		}
	}
	peers := func(list []networkingv1.NetworkPolicyPeer) {
		for _, peer := range list {
			share(peer.PodSelector)
			share(peer.NamespaceSelector)
		}
	}
	p.Namespace = s.text(p.Namespace)
	share(&p.Spec.PodSelector)
	for _, r := range p.Spec.Ingress {
		peers(r.From)
	}
	for _, r := range p.Spec.Egress {
		peers(r.To)
	}
}

// text returns the one copy of a short text. Labels' keys end with a zero, texts do not.
func (s shared) text(t string) string {
	if have, ok := s[t].(string); ok {
		return have
	}
	s[t] = t
	return t
}

// prune forgets everything once there is more than so many pods and policies could need: what is used by then stays with them.
func (s shared) prune(n int) {
	if len(s) > 4*n+1024 {
		clear(s)
	}
}

// trimPolicy leaves out what others write about a policy.
func trimPolicy(p *networkingv1.NetworkPolicy) *networkingv1.NetworkPolicy {
	return &networkingv1.NetworkPolicy{
		ObjectMeta: metav1.ObjectMeta{Namespace: p.Namespace, Name: p.Name, UID: p.UID, Generation: p.Generation}, Spec: p.Spec,
	}
}

func equalSpecs(a, b *networkingv1.NetworkPolicy) bool { return reflect.DeepEqual(a.Spec, b.Spec) }
