package connectivity

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
)

const (
	// Namespace holds everything that a test makes. It is made by it and removed at its end.
	Namespace = "headcni-test"
	// HostPort of the pods that answer: not in the range of NodePorts, nor a service's that is known.
	HostPort = 18247

	// label marks a namespace as ours; alive is an annotation that changes as long as the test runs.
	label = "headcni.io/connectivity-test"
	alive = "headcni.io/connectivity-test-alive"
	role  = "headcni.io/role"
	// Roles of pods: those that answer, those that ask, and those in the node's own network.
	answers, asks, inNode = "answers", "asks", "node"

	container = "test"
	program   = "/usr/local/bin/headcnictl"
	service   = "answers"

	// podLife ends a pod whose test was killed.
	podLife = time.Hour
)

var (
	// beatEvery is how often alive changes; who does not change it for deadAfter has gone.
	beatEvery, deadAfter = 3 * time.Second, 10 * time.Second
	// removeFor bounds the removal of the namespace, startFor the start of the pods.
	removeFor, startFor = 2 * time.Minute, 2 * time.Minute
	poll                = 200 * time.Millisecond
)

// Rights are what a test needs, in words.
const Rights = "the test needs the rights to get, create, patch and delete namespaces; in namespace " + Namespace +
	" to create and list pods, to create pods/exec and services, and to create and delete networkpolicies"

// rights names what is missing where that is the fault.
func rights(err error) error {
	if apierrors.IsForbidden(err) {
		return fmt.Errorf("%w; %s", err, Rights)
	}
	return err
}

// every polls until done says so or ctx ends.
func every(ctx context.Context, done func() (bool, error)) error {
	for {
		if ok, err := done(); ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(poll):
		}
	}
}

// claim makes the namespace, after it has removed what a test that was killed has left.
func (t *test) claim(ctx context.Context) error {
	spaces := t.Client.Namespaces()
	was, err := spaces.Get(ctx, Namespace, metav1.GetOptions{})
	switch {
	case err == nil && was.Labels[label] == "":
		return fmt.Errorf("namespace %s is not of a test like this: look at what is in it, and remove or rename it", Namespace)
	case err == nil:
		if err := t.dead(ctx, was); err != nil {
			return err
		}
		t.Say("removing what an earlier test has left in namespace %s", Namespace)
		if err := t.remove(ctx); err != nil {
			return err
		}
	case !apierrors.IsNotFound(err):
		return rights(err)
	}
	_, err = spaces.Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{
		Name: Namespace,
		// Privileged is for the hostPort alone: all else is as restricted as can be.
		Labels: map[string]string{label: "true", "pod-security.kubernetes.io/enforce": "privileged"},
	}}, metav1.CreateOptions{})
	return rights(err)
}

// dead reports an error where the test that made the namespace still runs.
func (t *test) dead(ctx context.Context, was *corev1.Namespace) error {
	if was.DeletionTimestamp != nil {
		return nil
	}
	limit, cancel := context.WithTimeout(ctx, deadAfter)
	defer cancel()
	err := every(limit, func() (bool, error) {
		now, err := t.Client.Namespaces().Get(ctx, Namespace, metav1.GetOptions{})
		return err != nil || now.Annotations[alive] != was.Annotations[alive] || now.UID != was.UID, nil
	})
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err == nil:
		return fmt.Errorf("another test runs in namespace %s: wait for its end", Namespace)
	}
	return nil
}

// beat says that this test runs, until ctx ends.
func (t *test) beat(ctx context.Context) {
	for i := 0; ; i++ {
		patch := fmt.Sprintf(`{"metadata":{"annotations":{%q:"%d"}}}`, alive, i)
		_, _ = t.Client.Namespaces().Patch(ctx, Namespace, types.MergePatchType, []byte(patch), metav1.PatchOptions{}) // the next one counts as well
		select {
		case <-ctx.Done():
			return
		case <-time.After(beatEvery):
		}
	}
}

// remove removes the namespace and waits until it has gone.
func (t *test) remove(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, removeFor, errors.New("it is still there"))
	defer cancel()
	spaces := t.Client.Namespaces()
	err := spaces.Delete(ctx, Namespace, metav1.DeleteOptions{})
	if err == nil || apierrors.IsConflict(err) { // being removed already
		err = every(ctx, func() (bool, error) {
			_, err := spaces.Get(ctx, Namespace, metav1.GetOptions{})
			return apierrors.IsNotFound(err), nil
		})
	}
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("remove namespace %s: %w; `kubectl delete namespace %[1]s` does so, or the next test", Namespace, rights(err))
	}
	return nil
}

// podName is the node's name where that is a label (RFC 1123) that is short enough, since a pod's name is its host name too; else what fits of
// it, and a hash: two nodes never share one.
func podName(role, node string) string {
	const longest = 63
	name := role + "-" + node
	if len(name) <= longest && !strings.Contains(name, ".") {
		return name
	}
	hash := fnv.New32a()
	hash.Write([]byte(node))
	name = strings.ReplaceAll(name, ".", "-")
	return fmt.Sprintf("%s-%08x", name[:min(len(name), longest-9)], hash.Sum32())
}

// pod is one that complies with Pod Security "restricted", but for the hostPort, and for the node's own network where it is in that.
func (t *test) pod(who, node string, hostPort int32) *corev1.Pod {
	yes, no, nobody, life, now := true, false, int64(65532), int64(podLife/time.Second), int64(0)
	c := corev1.Container{
		Name: container, Image: t.Image, ImagePullPolicy: corev1.PullIfNotPresent,
		Command: []string{program, "probe", "answer"},
		Env:     []corev1.EnvVar{{Name: "NODE_NAME", ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{FieldPath: "spec.nodeName"}}}},
		SecurityContext: &corev1.SecurityContext{
			AllowPrivilegeEscalation: &no, ReadOnlyRootFilesystem: &yes, RunAsNonRoot: &yes, RunAsUser: &nobody,
			Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}}, SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
		},
		// For namespaces with a quota.
		Resources: corev1.ResourceRequirements{
			Requests: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("10m"), corev1.ResourceMemory: resource.MustParse("24Mi")},
			Limits:   corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("128Mi")},
		},
	}
	if hostPort != 0 {
		c.Ports = []corev1.ContainerPort{{ContainerPort: Port, HostPort: hostPort, Protocol: corev1.ProtocolTCP}}
	}
	if t.perf {
		c.Command = []string{program, "probe", "answer-perf"}
		if n := t.byNode[node]; who == inNode { // not at each address of the machine
			for _, a := range slices.Concat(n.Addrs, n.Tailnet) {
				c.Command = append(c.Command, a.String())
			}
		}
	}
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: podName(who, node), Namespace: Namespace, Labels: map[string]string{role: who}},
		Spec: corev1.PodSpec{
			NodeName: node, Containers: []corev1.Container{c}, RestartPolicy: corev1.RestartPolicyAlways, HostNetwork: who == inNode,
			Tolerations:                  []corev1.Toleration{{Operator: corev1.TolerationOpExists}}, // also where others may not run
			AutomountServiceAccountToken: &no, EnableServiceLinks: &no, ActiveDeadlineSeconds: &life, TerminationGracePeriodSeconds: &now,
		},
	}
}

// createPods makes the pods. Where the cluster's rules allow no hostPort, those that answer have none, and where they allow no pod in the node's
// own network there is none.
func (t *test) createPods(ctx context.Context) error {
	port := int32(HostPort)
	if t.perf {
		port = 0
	}
	for _, n := range t.Nodes {
		for _, who := range t.roles {
			hostPort := int32(0)
			if who == answers {
				hostPort = port
			}
			err := t.create(ctx, t.pod(who, n.Name, hostPort))
			if refused := apierrors.APIStatus(nil); apierrors.IsForbidden(err) && errors.As(err, &refused) {
				switch {
				case who == inNode:
					t.noInNode = refused.Status().Message
					continue
				case hostPort != 0:
					port = 0
					if err = t.create(ctx, t.pod(who, n.Name, 0)); err == nil {
						t.noHostPort = refused.Status().Message
					}
				}
			}
			if err != nil {
				return err
			}
			t.made++
		}
	}
	return nil
}

// create makes a pod, which is refused until the namespace has its service account.
func (t *test) create(ctx context.Context, p *corev1.Pod) error {
	ctx, cancel := context.WithTimeoutCause(ctx, startFor, errors.New("the namespace gets no service account"))
	defer cancel()
	var last error
	err := every(ctx, func() (bool, error) {
		_, last = t.Client.Pods(Namespace).Create(ctx, p, metav1.CreateOptions{})
		if last != nil && strings.Contains(last.Error(), "looking up service account") {
			return false, nil
		}
		return true, nil
	})
	if last == nil {
		return err
	}
	return fmt.Errorf("make test pod %s: %w", p.Name, rights(last))
}

// createService makes a Service of the pods that answer, with a ClusterIP of each family that there is and a port of every node.
func (t *test) createService(ctx context.Context) (*corev1.Service, error) {
	families := corev1.IPFamilyPolicyPreferDualStack
	s, err := t.Client.Services(Namespace).Create(ctx, &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: service, Namespace: Namespace},
		Spec: corev1.ServiceSpec{
			Type: corev1.ServiceTypeNodePort, Selector: map[string]string{role: answers}, IPFamilyPolicy: &families,
			Ports: []corev1.ServicePort{{Name: "http", Port: 80, TargetPort: intstr.FromInt32(Port), Protocol: corev1.ProtocolTCP}},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		return nil, fmt.Errorf("make a Service: %w", rights(err))
	}
	return s, nil
}

// waitPods waits until the pods run. What does not is said of its node, which is then left out.
func (t *test) waitPods(ctx context.Context) error {
	limit, cancel := context.WithTimeout(ctx, startFor)
	defer cancel()
	var waiting map[string]string
	err := every(limit, func() (bool, error) {
		list, err := t.Client.Pods(Namespace).List(ctx, metav1.ListOptions{})
		if err != nil {
			return false, rights(err)
		}
		waiting = map[string]string{}
		for _, p := range list.Items {
			n := t.byNode[p.Spec.NodeName]
			if n == nil {
				continue
			}
			var addrs []netip.Addr
			for _, ip := range p.Status.PodIPs {
				if a, err := netip.ParseAddr(ip.IP); err == nil {
					addrs = append(addrs, a)
				}
			}
			if p.Status.Phase != corev1.PodRunning || len(addrs) == 0 {
				waiting[p.Spec.NodeName] = podState(p)
				if p.Status.Phase == corev1.PodFailed {
					continue
				}
			}
			switch p.Labels[role] {
			case asks:
				n.asks = addrs
			case answers:
				n.answers = addrs
			}
		}
		return len(list.Items) == t.made && len(waiting) == 0, nil
	})
	if err != nil && limit.Err() == nil || ctx.Err() != nil {
		return err
	}
	for _, n := range t.byNode {
		if text := waiting[n.Name]; text != "" {
			n.away = true
			t.fail(pods, n.Name, "the test pod does not run: %s", text)
		}
	}
	return nil
}

func podState(p corev1.Pod) string {
	for _, s := range p.Status.ContainerStatuses {
		if w := s.State.Waiting; w != nil && w.Reason != "" {
			return strings.TrimSpace(w.Reason + " " + w.Message)
		}
	}
	return strings.TrimSpace(string(p.Status.Phase) + " " + p.Status.Reason + " " + p.Status.Message)
}

// policy makes a NetworkPolicy for the pods that answer.
func (t *test) policy(ctx context.Context, name string, from ...networkingv1.NetworkPolicyIngressRule) error {
	_, err := t.Client.NetworkPolicies(Namespace).Create(ctx, &networkingv1.NetworkPolicy{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: Namespace},
		Spec: networkingv1.NetworkPolicySpec{
			PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{role: answers}},
			PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress}, Ingress: from,
		},
	}, metav1.CreateOptions{})
	if err != nil {
		return fmt.Errorf("make a NetworkPolicy: %w", rights(err))
	}
	return nil
}
