package kube_test

import (
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/headcni/headcni/internal/kubetest"
	"github.com/headcni/headcni/pkg/kube"
)

func TestWriteEvent(t *testing.T) {
	client := kubetest.New()
	r := kube.Reporter{Client: client, Program: "daemon", Instance: "a"}
	e := kube.Event{Time: time.Now(), About: kube.AboutNode("a"), Action: "firewall", Note: strings.Repeat("é", 1024)}
	for range 2 { // the second as after an answer that was lost
		if err := r.Write(t.Context(), e); err != nil {
			t.Fatal(err)
		}
	}
	about := corev1.ObjectReference{Kind: "Deployment", Namespace: "kube-system", Name: kube.Controller}
	if err := r.Write(t.Context(), kube.Event{Time: time.Now(), About: about, Action: "policy", Note: "right again", Resolved: true}); err != nil {
		t.Fatal(err)
	}
	list, err := client.EventsV1().Events(metav1.NamespaceAll).List(t.Context(), metav1.ListOptions{})
	if err != nil || len(list.Items) != 2 {
		t.Fatalf("%d events, %v", len(list.Items), err)
	}
	for _, got := range list.Items {
		if got.ReportingController != "headcni.io/daemon" || got.ReportingInstance != "a" || got.EventTime.Nanosecond()%1000 != 0 {
			t.Errorf("%+v", got)
		}
		switch got.Regarding.Kind {
		case "Node":
			if got.Namespace != "default" || got.Type != corev1.EventTypeWarning || got.Reason != kube.ReasonNotRight || got.Action != "firewall" ||
				got.Regarding.UID != "a" || len(got.Note) > 1024 || !utf8.ValidString(got.Note) || !strings.HasSuffix(got.Note, "é...") {
				t.Errorf("%+v", got)
			}
		default:
			if got.Namespace != "kube-system" || got.Type != corev1.EventTypeNormal || got.Reason != kube.ReasonRight || got.Note != "right again" {
				t.Errorf("%+v", got)
			}
		}
	}
}
