package kube_test

import (
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/rest"

	"github.com/headcni/headcni/pkg/kube"
)

// What the API server refuses is said in its words.
func TestRawRefused(t *testing.T) {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/gone" {
			http.NotFound(w, r)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusForbidden)
		if err := json.NewEncoder(w).Encode(apierrors.NewForbidden(corev1.Resource("nodes"), "n", errors.New("you may not")).Status()); err != nil {
			t.Error(err)
		}
	}))
	defer s.Close()
	raw, err := kube.NewRaw(&rest.Config{Host: s.URL})
	if err != nil {
		t.Fatal(err)
	}
	_, mayErr := raw.May(t.Context(), kube.Right{Verb: "list", Resource: "nodes"})
	for _, err := range []error{raw.Get(t.Context(), "/version", &struct{}{}), raw.Delete(t.Context(), "/version"), mayErr} {
		if err == nil || !strings.Contains(err.Error(), "you may not") || !apierrors.IsForbidden(errors.Unwrap(err)) && !apierrors.IsForbidden(err) {
			t.Errorf("%v", err)
		}
	}
	if err := raw.Get(t.Context(), "/gone", &struct{}{}); !apierrors.IsNotFound(err) {
		t.Error(err)
	}
	if err := raw.Delete(t.Context(), "/gone"); err != nil {
		t.Error(err)
	}
}
