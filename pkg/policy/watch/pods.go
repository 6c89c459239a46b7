package watch

import (
	"hash/maphash"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"sync"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/headcni/headcni/pkg/policy"
)

// pod is what is kept of a Pod.
type pod struct {
	*policy.Pod
	static types.UID // of a static pod: kubelet's own UID, else ""
}

func nameOfPod(p *policy.Pod) types.NamespacedName {
	return types.NamespacedName{Namespace: p.Namespace, Name: p.Name}
}

// trimPod takes from a Pod what policies can ask. Of one with its node's addresses they ask nothing; one that is done has none, but its
// link may still be there. UIDs are for finding links, which the pods of this node alone have here.
func trimPod(p *corev1.Pod, node string) pod {
	out := pod{Pod: &policy.Pod{
		Namespace: p.Namespace, Name: p.Name, Node: p.Spec.NodeName, HostNetwork: p.Spec.HostNetwork,
		Done:        p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed,
		Terminating: p.DeletionTimestamp != nil,
	}}
	if out.Node == node {
		out.UID, out.static = p.UID, types.UID(p.Annotations[corev1.MirrorPodAnnotationKey])
	}
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
	list []*policy.Pod
	at   map[types.NamespacedName]int32
	// placed are the pods at the same places with the addresses that count, nil where that is not known yet.
	placed []*policy.Pod
	// beside are the addresses of pods that are in no Node's range, and static kubelet's UIDs of static pods.
	beside map[*policy.Pod][]netip.Prefix
	static map[*policy.Pod]types.UID
	shared *shared
}

func newPods() pods {
	return pods{at: map[types.NamespacedName]int32{}, beside: map[*policy.Pod][]netip.Prefix{}, static: map[*policy.Pod]types.UID{}, shared: newShared()}
}

// replace keeps the pods that are as they were.
func (s *pods) replace(all []pod) {
	s.list, s.placed = slices.Grow(s.list, max(0, len(all)-len(s.list))), slices.Grow(s.placed, max(0, len(all)-len(s.placed)))
	now := make(map[types.NamespacedName]bool, len(all))
	for _, p := range all {
		now[nameOfPod(p.Pod)] = true
		s.put(p)
	}
	for i := len(s.list) - 1; i >= 0; i-- { // what takes the place of one that goes has been looked at
		if name := nameOfPod(s.list[i]); !now[name] {
			s.remove(name)
		}
	}
}

// set reports whether anything changed that policies ask.
func (s *pods) set(p pod) bool {
	s.shared.prune(len(s.list))
	return s.put(p)
}

func (s *pods) put(p pod) bool {
	i, had := s.at[nameOfPod(p.Pod)]
	if had && equalPods(s.list[i], p.Pod) && s.static[s.list[i]] == p.static {
		return false
	}
	if had {
		s.forget(s.list[i])
		s.list[i], s.placed[i] = p.Pod, nil
	} else {
		s.at[nameOfPod(p.Pod)] = int32(len(s.list))
		s.list, s.placed = append(s.list, p.Pod), append(s.placed, nil)
	}
	if p.static != "" {
		s.static[p.Pod] = p.static
	}
	return true
}

func (s *pods) forget(p *policy.Pod) {
	delete(s.beside, p)
	delete(s.static, p)
}

func (s *pods) remove(name types.NamespacedName) bool {
	i, had := s.at[name]
	if !had {
		return false
	}
	s.forget(s.list[i])
	delete(s.at, name)
	last := len(s.list) - 1
	if int(i) != last {
		s.list[i], s.placed[i] = s.list[last], s.placed[last]
		s.at[nameOfPod(s.list[i])] = i
	}
	s.list[last], s.placed[last] = nil, nil
	s.list, s.placed = s.list[:last], s.placed[:last]
	return true
}

func equalPods(a, b *policy.Pod) bool {
	return a.UID == b.UID && a.Node == b.Node && a.HostNetwork == b.HostNetwork && a.Done == b.Done && a.Terminating == b.Terminating &&
		slices.Equal(a.IPs, b.IPs) && slices.Equal(a.Ports, b.Ports) && equalLabels(a.Labels, b.Labels)
}

func equalLabels(a, b map[string]string) bool { return maps.Equal(a, b) }

// shared holds what many pods have alike, once: the labels of a Deployment's pods, its ports, names of nodes and namespaces. Labels are by
// far the most of a pod. It is safe for concurrent use: objects are cut down by those who read them, one for each kind.
type shared struct {
	mu     sync.Mutex
	texts  map[string]string
	labels map[uint64][]map[string]string // by a sum of hashes
	ports  map[uint64][][]policy.NamedPort
	n      int // how many of all
	seed   maphash.Seed
}

func newShared() *shared {
	s := &shared{seed: maphash.MakeSeed()}
	s.clear()
	return s
}

func (s *shared) clear() {
	s.texts, s.labels, s.ports, s.n = map[string]string{}, map[uint64][]map[string]string{}, map[uint64][][]policy.NamedPort{}, 0
}

func (s *shared) pod(p *policy.Pod) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p.Namespace, p.Node, p.Labels, p.Ports = s.text(p.Namespace), s.text(p.Node), s.labelsOf(p.Labels), s.portsOf(p.Ports)
}

// labelsOf returns the one copy of labels, nil for none.
func (s *shared) labelsOf(l map[string]string) map[string]string {
	if len(l) == 0 {
		return nil
	}
	var sum uint64 // the same in any order
	for k, v := range l {
		sum += maphash.Comparable(s.seed, [2]string{k, v})
	}
	for _, have := range s.labels[sum] {
		if equalLabels(have, l) {
			return have
		}
	}
	own := make(map[string]string, len(l))
	for k, v := range l {
		own[s.text(k)] = v
	}
	s.labels[sum] = append(s.labels[sum], own)
	s.n++
	return own
}

// portsOf returns the one copy of ports, nil for none.
func (s *shared) portsOf(l []policy.NamedPort) []policy.NamedPort {
	if len(l) == 0 {
		return nil
	}
	var sum uint64
	for _, p := range l {
		sum += maphash.Comparable(s.seed, p)
	}
	for _, have := range s.ports[sum] {
		if slices.Equal(have, l) {
			return have
		}
	}
	own := slices.Clone(l)
	for i := range own {
		own[i].Name = s.text(own[i].Name)
	}
	s.ports[sum] = append(s.ports[sum], own)
	s.n++
	return own
}

// policy does so for the labels that a policy's selectors ask for: a map takes more memory than all else of a peer.
func (s *shared) policy(p *networkingv1.NetworkPolicy) {
	s.mu.Lock()
	defer s.mu.Unlock()
	share := func(sel *metav1.LabelSelector) {
		if sel != nil {
			sel.MatchLabels = s.labelsOf(sel.MatchLabels)
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

// text returns the one copy of a short text.
func (s *shared) text(t string) string {
	if have, ok := s.texts[t]; ok {
		return have
	}
	s.texts[t] = t
	s.n++
	return t
}

// prune forgets everything once there is more than so many pods and policies could need: what is used by then stays with them.
func (s *shared) prune(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.n > 4*n+1024 {
		s.clear()
	}
}

// trimPolicy leaves out what others write about a policy.
func trimPolicy(p *networkingv1.NetworkPolicy) *networkingv1.NetworkPolicy {
	return &networkingv1.NetworkPolicy{
		ObjectMeta: metav1.ObjectMeta{Namespace: p.Namespace, Name: p.Name, UID: p.UID, Generation: p.Generation}, Spec: p.Spec,
	}
}

func equalSpecs(a, b *networkingv1.NetworkPolicy) bool { return reflect.DeepEqual(a.Spec, b.Spec) }
