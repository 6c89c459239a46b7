package daemon

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

const (
	// maxEvents are kept while the API server is away; older ones go.
	maxEvents = 32
	// maxNote is the longest note of an event that the API takes, in bytes (events.k8s.io/v1).
	maxNote = 1024
)

// events are what is to be told on our Node. They are news only, so nothing has to hold them back but their number. The
// recorder of client-go would count different texts of one part as one event, and try for two minutes only.
type events struct {
	mu      sync.Mutex
	waiting []eventsv1.Event
}

// add keeps an event to be sent. kind is corev1.EventTypeNormal or EventTypeWarning, reason a word in CamelCase, action
// what it is about.
func (e *events) add(kind, reason, action, note string) {
	if len(note) > maxNote {
		note = strings.ToValidUTF8(note[:maxNote-3], "") + "..."
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.waiting = append(e.waiting, eventsv1.Event{
		EventTime: metav1.NowMicro(), Type: kind, Reason: reason, Action: action, Note: note,
	})
	if n := len(e.waiting); n > maxEvents {
		e.waiting = e.waiting[n-maxEvents:]
	}
}

// send sends what is waiting, in order, up to the first that cannot be sent.
func (e *events) send(ctx context.Context, k *cluster) error {
	for {
		e.mu.Lock()
		if len(e.waiting) == 0 {
			e.mu.Unlock()
			return nil
		}
		ev := e.waiting[0]
		e.mu.Unlock()
		if err := k.event(ctx, ev); err != nil {
			return err
		}
		e.mu.Lock()
		if len(e.waiting) > 0 && e.waiting[0].EventTime.Equal(&ev.EventTime) {
			e.waiting = e.waiting[1:]
		}
		e.mu.Unlock()
	}
}

// event writes one about our Node. As kubelet's its object has the Node's name for a UID: that is what `kubectl describe
// node` of every version looks for. Events of Nodes live in the namespace default.
func (k *cluster) event(ctx context.Context, ev eventsv1.Event) error {
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	ev.ObjectMeta = metav1.ObjectMeta{
		Name: fmt.Sprintf("%s.%x", k.node, ev.EventTime.UnixNano()), Namespace: metav1.NamespaceDefault,
	}
	ev.ReportingController, ev.ReportingInstance = "headcni.io/daemon", k.node
	ev.Regarding = corev1.ObjectReference{Kind: "Node", APIVersion: "v1", Name: k.node, UID: types.UID(k.node)}
	ev.EventTime = metav1.NewMicroTime(ev.EventTime.Truncate(time.Microsecond))
	if _, err := k.client.EventsV1().Events(ev.Namespace).Create(ctx, &ev, metav1.CreateOptions{}); err != nil {
		return fmt.Errorf("write an event on Node %s: %w", k.node, err)
	}
	return nil
}
