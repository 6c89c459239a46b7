package agent

import (
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/headcni/headcni/internal/nstest"
)

func TestCurrentAndLog(t *testing.T) {
	nstest.Require(t)
	b := newBench(t, pod("web", "u1"), denyAll("web"), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "ns"}})
	b.attach("c1", "ns/web", "u1", "10.244.1.10")
	b.start(strict)
	if s, rules := b.agent.Current(); s != nil || rules != nil {
		t.Error("something is in force before anything is")
	}
	b.passUntil("policies in force", func() bool { return b.agent.Err() == nil })
	if s, rules := b.agent.Current(); s == nil || rules == nil || len(s.Pods) != 1 || len(rules.In) != 1 {
		t.Errorf("in force are %+v, %+v", s, rules)
	}
	logs := func() bool { return strings.Contains(b.listed(), "group 4278 snaplen") }
	for _, on := range []bool{false, true, false} {
		b.agent.LogDenied(on)
		b.pass()
		if logs() != on || b.agent.Err() != nil {
			t.Errorf("the kernel logs: %t, want %t; %v", logs(), on, b.agent.Err())
		}
	}
}
