package kube_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/headcni/headcni/pkg/kube"
)

// TestFollow follows a server that streams what there is and then what changes, as API servers have done since 1.34, and one that
// only lists.
func TestFollow(t *testing.T) {
	for _, streams := range []bool{true, false} {
		t.Run(fmt.Sprintf("streams=%v", streams), func(t *testing.T) {
			s := httptest.NewServer(nodesServer(t, streams))
			defer s.Close()
			client, err := kube.NewClient(&rest.Config{Host: s.URL})
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			told := make(chan string)
			tell := func(what string) {
				select {
				case told <- what:
				case <-ctx.Done():
				}
			}
			var wg sync.WaitGroup
			wg.Go(func() {
				kube.Follow(ctx, client, client.Nodes(), &corev1.Node{}, kube.Feed[*corev1.Node, string]{
					Trim:     func(n *corev1.Node) string { return n.Name + n.Labels["is"] },
					Replace:  func(all []string) { tell(fmt.Sprint("all: ", all)) },
					Set:      func(n string) { tell("set: " + n) },
					Remove:   func(n string) { tell("removed: " + n) },
					Answered: func(error) {},
				})
			})
			defer wg.Wait()
			defer cancel()
			var got []string
			for range 3 {
				select {
				case what := <-told:
					got = append(got, what)
				case <-ctx.Done():
					t.Fatalf("told only of %q", got)
				}
			}
			if diff := cmp.Diff([]string{"all: [one]", "set: one changed", "removed: one changed"}, got); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
		})
	}
}

// nodesServer has one Node, which changes and goes.
func nodesServer(t *testing.T, streams bool) http.HandlerFunc {
	node := func(version, is string) *corev1.Node {
		return &corev1.Node{TypeMeta: metav1.TypeMeta{Kind: "Node", APIVersion: "v1"},
			ObjectMeta: metav1.ObjectMeta{Name: "one", ResourceVersion: version, Labels: map[string]string{"is": is}}}
	}
	synced := &corev1.Node{TypeMeta: metav1.TypeMeta{Kind: "Node", APIVersion: "v1"},
		ObjectMeta: metav1.ObjectMeta{ResourceVersion: "2", Annotations: map[string]string{metav1.InitialEventsAnnotationKey: "true"}}}
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		q := r.URL.Query()
		send := func(kind string, n any) {
			err := json.NewEncoder(w).Encode(map[string]any{"type": kind, "object": n})
			if err == nil {
				err = http.NewResponseController(w).Flush()
			}
			if err != nil {
				t.Error(err)
			}
		}
		switch {
		case q.Get("watch") == "" || q.Get("watch") == "0":
			list := corev1.NodeList{TypeMeta: metav1.TypeMeta{Kind: "NodeList", APIVersion: "v1"},
				ListMeta: metav1.ListMeta{ResourceVersion: "2"}, Items: []corev1.Node{*node("1", "")}}
			if err := json.NewEncoder(w).Encode(list); err != nil {
				t.Error(err)
			}
			return
		case q.Get("sendInitialEvents") == "true" && !streams:
			w.WriteHeader(http.StatusUnprocessableEntity)
			fmt.Fprint(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"Invalid","code":422}`)
			return
		case q.Get("sendInitialEvents") == "true":
			send("ADDED", node("1", ""))
			send("BOOKMARK", synced)
		}
		send("MODIFIED", node("3", " changed"))
		send("DELETED", node("4", " changed"))
		<-r.Context().Done()
	}
}
