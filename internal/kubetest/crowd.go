package kubetest

import (
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer/streaming"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/scheme"
)

const protobuf = "application/vnd.kubernetes.protobuf"

// namespaces is how many a Crowd has.
const namespaces = 100

// Crowd is a large cluster. It streams its Nodes, Pods, Namespaces and NetworkPolicies in protobuf, as an API server does, and has the rest answered by Client,
// whose Nodes it has too. Objects are about as large as they are: 5 kB a pod, 10 kB a Node.
type Crowd struct {
	Client
	NodeCount, PodCount, PolicyCount int
	// Heartbeat is how often each Node's status is written, as kubelets do: 5 minutes by their default. Zero is never.
	Heartbeat time.Duration
	// Churn is how often a pod changes. Zero is never.
	Churn time.Duration
	// Sent counts bytes of what is streamed.
	Sent atomic.Int64
}

// CrowdRanges are the pod CIDRs of a Crowd's Node, one after the other as kube-controller-manager hands them out.
func CrowdRanges(node int) []string {
	return []string{fmt.Sprintf("10.%d.%d.0/24", 100+node/256, node%256), fmt.Sprintf("fd01:0:0:%x::/64", node)}
}

// ServeHTTP implements http.Handler.
func (c *Crowd) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	q, ok := parse(r.URL.Path)
	if !ok || r.Method != http.MethodGet || q.name != "" || r.URL.Query().Get("sendInitialEvents") != "true" {
		c.Client.ServeHTTP(w, r)
		return
	}
	s := newStream(counter{w, &c.Sent}, r)
	w.Header().Set("Content-Type", protobuf+";stream=watch")
	bookmark := metav1.ObjectMeta{ResourceVersion: "9", Annotations: map[string]string{metav1.InitialEventsAnnotationKey: "true"}}
	var end runtime.Object
	var next func(int) runtime.Object
	var every time.Duration
	switch q.resource {
	case "pods":
		for i := range c.PodCount {
			s.send("ADDED", c.pod(i))
		}
		end, every = &corev1.Pod{ObjectMeta: bookmark}, c.Churn
		next = func(i int) runtime.Object { return c.changed(i) }
	case "namespaces":
		for i := range namespaces {
			s.send("ADDED", &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprint("team-", i), Labels: map[string]string{"team": fmt.Sprint(i)}}})
		}
		end = &corev1.Namespace{ObjectMeta: bookmark}
	case "networkpolicies":
		for i := range c.PolicyCount {
			s.send("ADDED", crowdPolicy(i))
		}
		end = &networkingv1.NetworkPolicy{ObjectMeta: bookmark}
	case "nodes":
		list, err := c.Client.Nodes().List(r.Context(), metav1.ListOptions{})
		if err == nil {
			for i := range list.Items {
				s.send("ADDED", &list.Items[i])
			}
		}
		for i := range c.NodeCount {
			s.send("ADDED", crowdNode(i, time.Time{}))
		}
		end = &corev1.Node{ObjectMeta: bookmark}
		if c.NodeCount > 0 {
			every = c.Heartbeat / time.Duration(c.NodeCount)
		}
		next = func(i int) runtime.Object { return crowdNode(i%c.NodeCount, time.Now()) }
	default:
		c.Client.ServeHTTP(w, r)
		return
	}
	s.send("BOOKMARK", end)
	s.follow(every, next)
}

// counter counts what is written.
type counter struct {
	http.ResponseWriter
	n *atomic.Int64
}

func (c counter) Write(b []byte) (int, error) {
	n, err := c.ResponseWriter.Write(b)
	c.n.Add(int64(n))
	return n, err
}

// stream is a watch.
type stream struct {
	w   counter
	r   *http.Request
	out streaming.Encoder
	raw runtime.Serializer
}

func newStream(w counter, r *http.Request) *stream {
	info, _ := runtime.SerializerInfoForMediaType(scheme.Codecs.SupportedMediaTypes(), protobuf)
	return &stream{
		w: w, r: r, raw: info.Serializer,
		out: streaming.NewEncoder(info.StreamSerializer.NewFrameWriter(w), scheme.Codecs.EncoderForVersion(info.StreamSerializer.Serializer, corev1.SchemeGroupVersion)),
	}
}

func (s *stream) send(kind string, o runtime.Object) {
	version := schema.GroupVersion{Version: "v1"}
	if _, ok := o.(*networkingv1.NetworkPolicy); ok {
		version = networkingv1.SchemeGroupVersion
	}
	raw, err := runtime.Encode(scheme.Codecs.EncoderForVersion(s.raw, version), o)
	if err == nil {
		err = s.out.Encode(&metav1.WatchEvent{Type: kind, Object: runtime.RawExtension{Raw: raw}})
	}
	if err != nil && s.r.Context().Err() == nil {
		panic(err)
	}
}

// follow sends a change each time, until the client goes.
func (s *stream) follow(every time.Duration, next func(int) runtime.Object) {
	flush := func() { s.w.ResponseWriter.(http.Flusher).Flush() }
	flush()
	if every <= 0 {
		<-s.r.Context().Done()
		return
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	for i := 0; ; i++ {
		select {
		case <-s.r.Context().Done():
			return
		case <-tick.C:
			s.send("MODIFIED", next(i))
			flush()
		}
	}
}

func crowdNode(i int, beat time.Time) *corev1.Node {
	cidrs := CrowdRanges(i)
	n := &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{
			Name: fmt.Sprint("node-", i), UID: types.UID(fmt.Sprintf("5be5a08a-17ba-4ab0-ac38-%012d", i)), ResourceVersion: "5",
			Labels:      map[string]string{"kubernetes.io/hostname": fmt.Sprint("node-", i), "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64"},
			Annotations: map[string]string{"headcni.io/tailnet-ips": fmt.Sprintf("100.64.%d.%d", 10+i/250, i%250)},
		},
		Spec:   corev1.NodeSpec{PodCIDR: cidrs[0], PodCIDRs: cidrs},
		Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: fmt.Sprintf("172.20.%d.%d", i/250, i%250)}}},
	}
	for image := range 50 {
		n.Status.Images = append(n.Status.Images, corev1.ContainerImage{
			Names:     []string{fmt.Sprintf("registry.example.com/shop/app-%d@sha256:%s", image, strings.Repeat("0123456789abcdef", 4)), fmt.Sprintf("registry.example.com/shop/app-%d:v1.2.3", image)},
			SizeBytes: 10 << 20,
		})
	}
	for _, kind := range []corev1.NodeConditionType{corev1.NodeReady, corev1.NodeMemoryPressure, corev1.NodeDiskPressure, corev1.NodePIDPressure} {
		n.Status.Conditions = append(n.Status.Conditions, corev1.NodeCondition{Type: kind, Status: corev1.ConditionTrue, LastHeartbeatTime: metav1.NewTime(beat), Reason: "Kubelet", Message: "as kubelet says"})
	}
	return n
}

// perNode is how many pods a Node has.
func (c *Crowd) perNode() int {
	if c.NodeCount == 0 {
		return 110
	}
	return max(1, c.PodCount/c.NodeCount)
}

func (c *Crowd) pod(i int) *corev1.Pod {
	app, node := fmt.Sprint("app-", i/5%600), i/c.perNode()
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: fmt.Sprint("team-", i%namespaces), Name: fmt.Sprintf("%s-7d9c6b8f5d-%05d", app, i), ResourceVersion: "5", UID: types.UID(fmt.Sprintf("4be5a08a-17ba-4ab0-ac38-%012d", i)),
			Labels:        map[string]string{"app.kubernetes.io/name": app, "app.kubernetes.io/part-of": "shop", "team": fmt.Sprint(i % namespaces), "pod-template-hash": "7d9c6b8f5d"},
			Annotations:   map[string]string{"checksum/config": strings.Repeat("0123456789abcdef", 4)},
			ManagedFields: []metav1.ManagedFieldsEntry{{Manager: "kubelet", FieldsV1: metav1.NewFieldsV1(`{"f:status":"` + strings.Repeat("x", 2000) + `"}`)}},
		},
		Spec: corev1.PodSpec{NodeName: fmt.Sprint("node-", node)},
		Status: corev1.PodStatus{
			Phase: corev1.PodRunning, PodIPs: []corev1.PodIP{{IP: fmt.Sprintf("10.%d.%d.%d", 100+node/256, node%256, 2+i%c.perNode())}, {IP: fmt.Sprintf("fd01:0:0:%x::%x", node, 2+i%c.perNode())}},
		},
	}
	main := corev1.Container{
		Name: "main", Image: "registry.example.com/shop/" + app + "@sha256:" + strings.Repeat("0123456789abcdef", 4),
		Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: 8080}},
	}
	for e := range 20 {
		main.Env = append(main.Env, corev1.EnvVar{Name: fmt.Sprint("SETTING_", e), Value: "some value of it"})
	}
	p.Spec.Containers = []corev1.Container{main}
	return p
}

// changed is a pod that has lost its addresses, or has them back.
func (c *Crowd) changed(i int) *corev1.Pod {
	p := c.pod(i / 2 * 7 % c.PodCount)
	if i%2 == 0 {
		p.Status.Phase, p.Status.PodIPs = corev1.PodSucceeded, nil
	}
	return p
}

func crowdPolicy(i int) *networkingv1.NetworkPolicy {
	return &networkingv1.NetworkPolicy{
		ObjectMeta: metav1.ObjectMeta{Namespace: fmt.Sprint("team-", i%namespaces), Name: fmt.Sprint("policy-", i), UID: types.UID(fmt.Sprint("p-", i)), Generation: 1, ResourceVersion: "6"},
		Spec: networkingv1.NetworkPolicySpec{
			PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app.kubernetes.io/name": fmt.Sprint("app-", i%600)}},
			Ingress: []networkingv1.NetworkPolicyIngressRule{{From: []networkingv1.NetworkPolicyPeer{
				{PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app.kubernetes.io/name": fmt.Sprint("app-", (i+1)%600)}}},
				{NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"team": fmt.Sprint(i % namespaces)}}, PodSelector: &metav1.LabelSelector{}},
			}}},
		},
	}
}
