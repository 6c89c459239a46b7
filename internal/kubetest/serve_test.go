package kubetest_test

import (
	"context"
	"net/http/httptest"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/headcni/headcni/internal/kubetest"
	"github.com/headcni/headcni/pkg/kube"
)

// What our programs ask over HTTP arrives in the imitated API server, and its answers arrive in them.
func TestServe(t *testing.T) {
	fake := kubetest.New(&networkingv1.ServiceCIDR{ObjectMeta: metav1.ObjectMeta{Name: "kubernetes"}, Spec: networkingv1.ServiceCIDRSpec{CIDRs: []string{"10.96.0.0/12"}}})
	s := httptest.NewServer(fake)
	defer s.Close()
	client, err := kube.NewClient(&rest.Config{Host: s.URL, ContentConfig: rest.ContentConfig{ContentType: "application/vnd.kubernetes.protobuf"}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	if ranges, err := kube.ServiceRanges(ctx, client); err != nil || len(ranges) != 1 {
		t.Errorf("ranges of services: %v, %v", ranges, err)
	}
	if _, err := client.Nodes().Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "a", Labels: map[string]string{"l": "1"}}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Nodes().Get(ctx, "b", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("a Node that is not there: %v", err)
	}
	secrets := client.Secrets("ns")
	secret, err := secrets.Create(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "s", Namespace: "ns"}, Data: map[string][]byte{"k": []byte("v")}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	secret.Data["k"] = []byte("w")
	if _, err := secrets.Update(ctx, secret, metav1.UpdateOptions{}); err != nil {
		t.Error(err)
	}
	if got, err := secrets.Get(ctx, "s", metav1.GetOptions{}); err != nil || string(got.Data["k"]) != "w" {
		t.Errorf("%v, %v", got, err)
	}
	if err := secrets.Delete(ctx, "s", metav1.DeleteOptions{}); err != nil {
		t.Error(err)
	}

	seen := make(chan string, 100)
	done := make(chan struct{})
	go func() {
		defer close(done)
		kube.WatchNodes(ctx, client, store(seen))
	}()
	expect := func(want string) {
		t.Helper()
		for {
			select {
			case got := <-seen:
				if got == want {
					return
				}
			case <-time.After(20 * time.Second):
				t.Fatalf("not told of %s", want)
			}
		}
	}
	expect("all")
	for want, patch := range map[string]string{"a 2": `{"metadata":{"labels":{"l":"2"}}}`, "a ": `{"metadata":{"labels":{"l":null}}}`} {
		if _, err := client.Nodes().Patch(ctx, "a", "application/merge-patch+json", []byte(patch), metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
		expect(want)
	}
	if _, err := client.Nodes().Patch(ctx, "a", "application/strategic-merge-patch+json", []byte(`{"status":{"conditions":[{"type":"Ready","status":"True"}]}}`),
		metav1.PatchOptions{}, "status"); err != nil {
		t.Error(err)
	}
	if err := client.Nodes().Delete(ctx, "a", metav1.DeleteOptions{}); err != nil {
		t.Error(err)
	}
	expect("a has gone")
	cancel()
	<-done
}

// store tells of what it is told.
type store chan string

func (s store) Trim(n *corev1.Node) *corev1.Node { return n }
func (s store) ReplaceNodes([]*corev1.Node)      { s <- "all" }
func (s store) SetNode(n *corev1.Node)           { s <- n.Name + " " + n.Labels["l"] }
func (s store) RemoveNode(n *corev1.Node)        { s <- n.Name + " has gone" }
func (s store) Answered(error)                   {}
