package daemon

import (
	"context"
	"time"

	"github.com/headcni/headcni/pkg/kube"
)

// maxEvents are kept while the API server is away; older ones go.
const maxEvents = 32

// events are what is to be told on our Node. They are news only, so nothing has to hold them back but their number. They
// are the loop's alone.
type events struct{ waiting []kube.Event }

// add keeps an event to be sent.
func (e *events) add(ev kube.Event) {
	e.waiting = append(e.waiting, ev)
	if n := len(e.waiting); n > maxEvents {
		e.waiting = e.waiting[n-maxEvents:]
	}
}

// send sends what is waiting, in order, up to the first that cannot be sent.
func (e *events) send(ctx context.Context, k *cluster) error {
	r := kube.Reporter{Client: k.client, Program: "daemon", Instance: k.node}
	for len(e.waiting) > 0 {
		if err := r.Write(ctx, e.waiting[0]); err != nil {
			return err
		}
		e.waiting = e.waiting[1:]
	}
	return nil
}

// tell makes an event of what is news on the board.
func (d *Daemon) tell(part string, ok bool, text string) {
	d.events.add(kube.Event{Time: time.Now(), About: kube.AboutNode(d.cluster.node), What: part, Note: part + ": " + text, Right: ok})
}
