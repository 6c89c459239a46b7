package daemon

import (
	"context"
	"strings"
	"testing"

	"github.com/headcni/headcni/internal/daemontest"
	"github.com/headcni/headcni/pkg/nodestatus"
	"github.com/headcni/headcni/pkg/policy/report"
)

// askAboutPolicy asks a daemon whose node has the pod ns/web, which everybody is denied, and follows what is denied until it is enough.
func askAboutPolicy(t *testing.T, d *Daemon, rules func() string) {
	t.Helper()
	socket := daemontest.Serve(t, nodestatus.Answers{Others: d.policy.Answers()})
	l, err := report.AskList(t.Context(), socket)
	if err != nil || len(l.Pods) != 1 || l.Pods[0].Name != "ns/web" || len(l.Pods[0].Ingress.By) != 1 || l.Problem != "" {
		t.Errorf("%+v, %v", l, err)
	}
	e, err := report.AskExplain(t.Context(), socket, report.Question{Namespace: "ns", Pod: "web", From: "192.0.2.1", Port: "80"})
	if err != nil || e.Wrong() || len(e.Answers) != 1 || e.Answers[0].Verdict != report.Denied || e.Answers[0].Sides[1].Kernel.Asked != 1 {
		t.Errorf("%+v, %v", e, err)
	}
	logs := func() bool { return strings.Contains(rules(), "group 4278 snaplen") }
	if logs() {
		t.Error("nobody follows, and the kernel logs")
	}
	ctx, kill := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- report.Follow(ctx, socket, "ns", "", func(report.Event) error { return nil }) }()
	waitUntil(t, logs)
	kill()
	if err := <-done; err != nil {
		t.Error(err)
	}
	waitUntil(t, func() bool { return !logs() })
}

func TestPolicyIsOff(t *testing.T) {
	d := newDaemon(t, testConfig(t))
	socket := daemontest.Serve(t, nodestatus.Answers{Others: d.policy.Answers()})
	_, list := report.AskList(t.Context(), socket)
	_, explain := report.AskExplain(t.Context(), socket, report.Question{Pod: "web"})
	_, drops := report.AskDrops(t.Context(), socket, "", "")
	for _, err := range []error{list, explain, drops, report.Follow(t.Context(), socket, "", "", nil)} {
		if err == nil || !strings.Contains(err.Error(), "set network.networkPolicy to true") {
			t.Errorf("%v", err)
		}
	}
}
