package kube_test

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	appsv1 "k8s.io/api/apps/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"

	"github.com/headcni/headcni/pkg/kube"
)

// request is what an API server sees of one.
type request struct {
	Method, URL, Body string
	Accept, Type      string
}

// server answers what it is told to, and keeps the requests.
type server struct {
	mu     sync.Mutex
	seen   []request
	answer []byte
	config *rest.Config
}

func newServer(t *testing.T) *server {
	s := &server{}
	h := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		s.seen = append(s.seen, request{r.Method, r.URL.String(), string(body), r.Header.Get("Accept"), r.Header.Get("Content-Type")})
		w.Header().Set("Content-Type", "application/vnd.kubernetes.protobuf")
		if s.answer == nil {
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusNotFound)
			_, _ = io.WriteString(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"NotFound","code":404}`) // the client says what it got
			return
		}
		_, _ = w.Write(s.answer) // as above
	}))
	t.Cleanup(h.Close)
	s.config = &rest.Config{Host: h.URL, ContentConfig: rest.ContentConfig{
		ContentType: "application/vnd.kubernetes.protobuf", AcceptContentTypes: "application/vnd.kubernetes.protobuf,application/json",
	}}
	s.config.QPS, s.config.Burst = 1000, 1000
	return s
}

// take returns the requests since the last call.
func (s *server) take() []request {
	s.mu.Lock()
	defer s.mu.Unlock()
	seen := s.seen
	s.seen = nil
	return seen
}

// exercise makes each request that objects of a kind can make.
func exercise[T, L runtime.Object](ctx context.Context, o kube.Objects[T, L], object T) {
	seconds := int64(7)
	list := metav1.ListOptions{Limit: 3, LabelSelector: "a=b", TimeoutSeconds: &seconds}
	// Only what is asked counts; each answer is an error.
	_, _ = o.Get(ctx, "x", metav1.GetOptions{ResourceVersion: "3"})
	_, _ = o.List(ctx, list)
	_, _ = o.Watch(ctx, metav1.ListOptions{AllowWatchBookmarks: true})
	_, _ = o.Watch(ctx, list)
	_, _ = o.Create(ctx, object, metav1.CreateOptions{FieldManager: "m"})
	_, _ = o.Update(ctx, object, metav1.UpdateOptions{})
	_, _ = o.Patch(ctx, "x", types.StrategicMergePatchType, []byte(`{"a":1}`), metav1.PatchOptions{}, "status")
	_ = o.Delete(ctx, "x", metav1.DeleteOptions{PropagationPolicy: new(metav1.DeletePropagationForeground)})
}

// The API server cannot tell our client from client-go's.
func TestRequestsAreTheClientsets(t *testing.T) {
	s := newServer(t)
	ours, err := kube.NewClient(s.config)
	if err != nil {
		t.Fatal(err)
	}
	all, err := kubernetes.NewForConfig(s.config)
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	meta := metav1.ObjectMeta{Name: "x", Labels: map[string]string{"a": "b"}}
	secret := &corev1.Secret{ObjectMeta: meta, Data: map[string][]byte{"k": []byte("v")}}
	event := &eventsv1.Event{ObjectMeta: meta, EventTime: metav1.NewMicroTime(time.Unix(1, 0)), Note: "n"}
	for kind, does := range map[string][2]func(){
		"Node": {
			func() { exercise(ctx, ours.Nodes(), &corev1.Node{ObjectMeta: meta}) }, func() { exercise(ctx, all.CoreV1().Nodes(), &corev1.Node{ObjectMeta: meta}) },
		},
		"Secret": {func() { exercise(ctx, ours.Secrets("ns"), secret) }, func() { exercise(ctx, all.CoreV1().Secrets("ns"), secret) }},
		"ConfigMap": {
			func() { exercise(ctx, ours.ConfigMaps("ns"), &corev1.ConfigMap{ObjectMeta: meta}) },
			func() { exercise(ctx, all.CoreV1().ConfigMaps("ns"), &corev1.ConfigMap{ObjectMeta: meta}) },
		},
		"Pod": {
			func() { exercise(ctx, ours.Pods(""), &corev1.Pod{ObjectMeta: meta}) },
			func() { exercise(ctx, all.CoreV1().Pods(""), &corev1.Pod{ObjectMeta: meta}) },
		},
		"Namespace": {
			func() { exercise(ctx, ours.Namespaces(), &corev1.Namespace{ObjectMeta: meta}) },
			func() { exercise(ctx, all.CoreV1().Namespaces(), &corev1.Namespace{ObjectMeta: meta}) },
		},
		"NetworkPolicy": {
			func() { exercise(ctx, ours.NetworkPolicies("ns"), &networkingv1.NetworkPolicy{ObjectMeta: meta}) },
			func() {
				exercise(ctx, all.NetworkingV1().NetworkPolicies("ns"), &networkingv1.NetworkPolicy{ObjectMeta: meta})
			},
		},
		"Deployment": {
			func() { exercise(ctx, ours.Deployments("ns"), &appsv1.Deployment{ObjectMeta: meta}) },
			func() { exercise(ctx, all.AppsV1().Deployments("ns"), &appsv1.Deployment{ObjectMeta: meta}) },
		},
		"Lease": {
			func() { exercise(ctx, ours.Leases("ns"), &coordinationv1.Lease{ObjectMeta: meta}) },
			func() { exercise(ctx, all.CoordinationV1().Leases("ns"), &coordinationv1.Lease{ObjectMeta: meta}) },
		},
		"Event": {func() { exercise(ctx, ours.Events("ns"), event) }, func() { exercise(ctx, all.EventsV1().Events("ns"), event) }},
		"ServiceCIDR": {
			func() { exercise(ctx, ours.ServiceCIDRs(), &networkingv1.ServiceCIDR{ObjectMeta: meta}) },
			func() { exercise(ctx, all.NetworkingV1().ServiceCIDRs(), &networkingv1.ServiceCIDR{ObjectMeta: meta}) },
		},
	} {
		does[0]()
		got := s.take()
		does[1]()
		want := s.take()
		if len(want) != 8 {
			t.Errorf("%s: %d requests, want 8", kind, len(want))
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-client-go +ours):\n%s", kind, diff)
		}
	}
}

// What the server says arrives, errors among it.
func TestAnswers(t *testing.T) {
	s := newServer(t)
	client, err := kube.NewClient(s.config)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.Nodes().Get(t.Context(), "a", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("a Node that is not there: %v", err)
	}
	protobuf, ok := runtime.SerializerInfoForMediaType(scheme.Codecs.SupportedMediaTypes(), "application/vnd.kubernetes.protobuf")
	if !ok {
		t.Fatal("client-go speaks no protobuf")
	}
	node := corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "a", ResourceVersion: "5"}, Spec: corev1.NodeSpec{PodCIDRs: []string{"10.244.1.0/24"}}}
	for _, sent := range []runtime.Object{&node, &corev1.NodeList{ListMeta: metav1.ListMeta{Continue: "more"}, Items: []corev1.Node{node}}} {
		if s.answer, err = runtime.Encode(scheme.Codecs.EncoderForVersion(protobuf.Serializer, corev1.SchemeGroupVersion), sent); err != nil {
			t.Fatal(err)
		}
		var got runtime.Object
		if _, one := sent.(*corev1.Node); one {
			got, err = client.Nodes().Get(t.Context(), "a", metav1.GetOptions{})
		} else {
			got, err = client.Nodes().List(t.Context(), metav1.ListOptions{})
		}
		if diff := cmp.Diff(sent, got); err != nil || diff != "" {
			t.Errorf("%v, (-sent +got):\n%s", err, diff)
		}
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := client.Secrets("ns").Delete(ended, "x", metav1.DeleteOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("a request whose context has ended: %v", err)
	}
}
