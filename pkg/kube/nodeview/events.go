package nodeview

import (
	"context"
	"time"

	"github.com/headcni/headcni/pkg/kube"
)

// maxEvents are kept while the API server is away; older ones go.
const maxEvents = 32

// events are what is to be told on our Node. They are news only, so nothing has to hold them back but their number.
type events struct{ waiting []kube.Event }

// add keeps an event to be sent.
func (e *events) add(ev kube.Event) {
	e.waiting = append(e.waiting, ev)
	if n := len(e.waiting); n > maxEvents {
		e.waiting = e.waiting[n-maxEvents:]
	}
}

// send sends what is waiting, in order, up to the first that cannot be sent.
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

// Report makes an Event about our Node of a part's fault, or of its end. It is sent with the next Sync.
func (w *Watch) Report(part string, ok bool, text string) {
	w.events.add(kube.Event{Time: time.Now(), About: kube.AboutNode(w.node), What: part, Note: part + ": " + text, Right: ok})
}
