package chart

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// apiServer knows nodes and no more than helm has to know to ask for them. It returns a kubeconfig.
func apiServer(t *testing.T, systems ...string) string {
	t.Helper()
	list := corev1.NodeList{TypeMeta: metav1.TypeMeta{Kind: "NodeList", APIVersion: "v1"}}
	for i, system := range systems {
		list.Items = append(list.Items, corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprint("n", i), Labels: map[string]string{"kubernetes.io/os": system}}})
	}
	answers := map[string]any{
		"/version": map[string]string{"major": "1", "minor": "37", "gitVersion": "v1.37.2"},
		"/api":     metav1.APIVersions{TypeMeta: metav1.TypeMeta{Kind: "APIVersions"}, Versions: []string{"v1"}},
		"/apis":    metav1.APIGroupList{TypeMeta: metav1.TypeMeta{Kind: "APIGroupList", APIVersion: "v1"}},
		"/api/v1": metav1.APIResourceList{TypeMeta: metav1.TypeMeta{Kind: "APIResourceList", APIVersion: "v1"}, GroupVersion: "v1", APIResources: []metav1.APIResource{
			{Name: "nodes", Kind: "Node", Verbs: []string{"get", "list"}},
			{Name: "secrets", Kind: "Secret", Namespaced: true, Verbs: []string{"get"}},
		}},
		"/api/v1/nodes": list,
	}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		answer, ok := answers[r.URL.Path]
		if !ok {
			w.WriteHeader(http.StatusNotFound)
			answer = metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: "Failure", Reason: metav1.StatusReasonNotFound, Code: 404}
		}
		if err := json.NewEncoder(w).Encode(answer); err != nil {
			t.Error(err)
		}
	}))
	t.Cleanup(s.Close)
	file := filepath.Join(t.TempDir(), "kubeconfig")
	text := `{"apiVersion":"v1","kind":"Config","current-context":"c","contexts":[{"name":"c","context":{"cluster":"c","user":""}}],"clusters":[{"name":"c","cluster":{"server":"` + s.URL + `"}}]}`
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// TestReplicas: two controllers, but one where the cluster has one node for them, unless the user says how many. A budget
// for disruptions is there only where it can be kept without forbidding all.
func TestReplicas(t *testing.T) {
	for name, tc := range map[string]struct {
		nodes []string
		args  []string
		want  int32
	}{
		"one node":                 {[]string{"linux"}, nil, 1},
		"one of Linux":             {[]string{"linux", "windows"}, nil, 1},
		"two nodes":                {[]string{"linux", "linux"}, nil, 2},
		"three nodes":              {[]string{"linux", "linux", "linux"}, nil, 2},
		"no node yet":              {nil, nil, 2},
		"one node, and a user":     {[]string{"linux"}, []string{"--set", "controller.replicas=2"}, 2},
		"three nodes, and another": {[]string{"linux", "linux", "linux"}, []string{"--set", "controller.replicas=0"}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, budget := int32(-1), false
			for _, o := range mustRender(t, slices.Concat(url, tc.args, []string{"--dry-run=server", "--kubeconfig", apiServer(t, tc.nodes...)})...) {
				switch {
				case o.Kind == "Deployment":
					got = *into[appsv1.Deployment](t, o).Spec.Replicas
				case o.Kind == "PodDisruptionBudget":
					budget = true
				}
			}
			if got != tc.want || budget != (tc.want > 1) {
				t.Errorf("%d replicas, a budget: %v; want %d", got, budget, tc.want)
			}
		})
	}
}
