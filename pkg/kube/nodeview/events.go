package nodeview

import (
	"context"
	"time"

	"github.com/headcni/headcni/pkg/kube"
)

// maxEvents are kept while the API server is away; older ones go.
const maxEvents = 32

// events wait to be sent. They only inform people, so nothing but their number limits them.
type events struct{ waiting []kube.Event }

// add keeps an event to be sent.
func (e *events) add(ev kube.Event) {
	e.waiting = append(e.waiting, ev)
	if n := len(e.waiting); n > maxEvents {
		e.waiting = e.waiting[n-maxEvents:]
	}
}

// send sends the waiting events in order and stops at the first that fails.
func (e *events) send(ctx context.Context, w *Watch) error {
	r := kube.Reporter{Client: w.client, Program: "daemon", Instance: w.node}
	for len(e.waiting) > 0 {
		if err := r.Write(ctx, e.waiting[0]); err != nil {
			return err
		}
		e.waiting = e.waiting[1:]
	}
	return nil
}

// Report queues an Event about our Node: a part has a fault, or no longer has it. The next Sync sends it.
func (w *Watch) Report(part string, ok bool, text string) {
	w.events.add(kube.Event{Time: time.Now(), About: kube.AboutNode(w.node), Action: part, Note: part + ": " + text, Resolved: ok})
}
