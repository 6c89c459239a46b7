package podexec

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/remotecommand"
	"k8s.io/client-go/rest"

	"github.com/headcni/headcni/internal/kubetest"
)

// older is an API server that knows SPDY only, as those before 1.31 do; the real one is asked in test/e2e. It answers with what command makes
// of the request.
func older(t *testing.T, command func(r *http.Request) (stdout, stderr string, status metav1.Status)) *rest.Config {
	t.Helper()
	hold := make(chan struct{})
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodPost {
			http.Error(w, "no WebSocket here", http.StatusForbidden)
			return
		}
		stdout, stderr, status := command(r)
		if status.Code == http.StatusForbidden {
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusForbidden)
			_ = json.NewEncoder(w).Encode(status)
			return
		}
		err := kubetest.Exec(w, r, func(out, errs io.Writer) metav1.Status {
			if stdout == "hang" {
				<-hold
			}
			fmt.Fprint(out, stdout)
			fmt.Fprint(errs, stderr)
			return status
		})
		if err != nil {
			t.Error(err)
		}
	}))
	t.Cleanup(s.Close)
	t.Cleanup(func() { close(hold) })
	return &rest.Config{Host: s.URL, TLSClientConfig: rest.TLSClientConfig{Insecure: true}}
}

func TestRun(t *testing.T) {
	exited := func(code string) metav1.Status {
		return metav1.Status{Status: metav1.StatusFailure, Reason: remotecommand.NonZeroExitCodeReason, Details: &metav1.StatusDetails{
			Causes: []metav1.StatusCause{{Type: remotecommand.ExitCodeCauseType, Message: code}},
		}}
	}
	c := older(t, func(r *http.Request) (string, string, metav1.Status) {
		switch got := r.URL.Path + " " + strings.Join(r.URL.Query()["command"], "|") + " " + r.URL.Query().Get("container"); got {
		case "/api/v1/namespaces/kube-system/pods/p/exec say|it; rm -rf $HOME|-o json c":
			return "said", "", metav1.Status{Status: metav1.StatusSuccess}
		case "/api/v1/namespaces/kube-system/pods/p/exec fail c":
			return "half", "the node is not ready", exited("1")
		case "/api/v1/namespaces/kube-system/pods/p/exec hang c":
			return "hang", "", metav1.Status{}
		case "/api/v1/namespaces/kube-system/pods/p/exec forbidden c":
			return "", "", apierrors.NewForbidden(corev1.Resource("pods/exec"), "p", errors.New("no")).Status()
		default:
			t.Error("asked for", got)
			return "", "", metav1.Status{}
		}
	})
	pod := Pod{"kube-system", "p", "c"}
	// No shell looks at a word, and none is cut.
	if out, err := Run(t.Context(), c, pod, "say", "it; rm -rf $HOME", "-o json"); err != nil || string(out) != "said" {
		t.Errorf("%q, %v", out, err)
	}
	var exit Exit
	if out, err := Run(t.Context(), c, pod, "fail"); !errors.As(err, &exit) || exit != (Exit{1, "the node is not ready"}) || string(out) != "half" {
		t.Errorf("%q, %v", out, err)
	}
	if _, err := Run(t.Context(), c, pod, "forbidden"); !errors.Is(err, ErrForbidden) {
		t.Errorf("%T %v", err, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := Run(ctx, c, pod, "hang"); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "no answer in time") {
		t.Error(err)
	}
	c.Host = "https://127.0.0.1:1"
	if _, err := Run(t.Context(), c, pod, "say"); err == nil || !strings.Contains(err.Error(), "refused") {
		t.Error(err)
	}
}

func TestLog(t *testing.T) {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("container") == "none" {
			http.Error(w, "container none is not valid", http.StatusBadRequest)
			return
		}
		fmt.Fprint(w, r.URL.Path, " ", r.URL.Query().Get("tailLines"))
	}))
	defer s.Close()
	c := &rest.Config{Host: s.URL}
	if out, err := Log(t.Context(), c, Pod{"ns", "p", "c"}, 7); err != nil || string(out) != "/api/v1/namespaces/ns/pods/p/log 7" {
		t.Errorf("%s, %v", out, err)
	}
	if _, err := Log(t.Context(), c, Pod{"ns", "p", "none"}, 7); err == nil || !strings.Contains(err.Error(), "is not valid") {
		t.Error(err)
	}
}
