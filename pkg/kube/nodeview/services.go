package nodeview

import (
	"context"
	"net/netip"
	"slices"
	"time"

	"github.com/headcni/headcni/pkg/kube"
	"github.com/headcni/headcni/pkg/reconcile"
)

// serviceRetry is the wait after the first failed request; it doubles.
const serviceRetry = time.Second

// watchServices keeps the cluster's service ranges up to date: it asks until the API server answers, then every serviceInterval.
func (w *Watch) watchServices(ctx context.Context) {
	wait := serviceRetry
	for ctx.Err() == nil {
		found, err := w.askServices(ctx)
		w.mu.Lock()
		news := err == nil && !slices.Equal(w.services, found)
		if news {
			w.services = found
		}
		w.mu.Unlock()
		if news {
			w.changed()
		}
		if err == nil {
			wait = serviceInterval
		} else {
			// Services work without the ranges, and the part kubernetes reports an API server that does not answer.
			w.log.Debug("ask for the service ranges", "err", err)
			wait = min(2*wait, serviceInterval)
		}
		reconcile.Sleep(ctx, wait)
	}
}

func (w *Watch) askServices(ctx context.Context) ([]netip.Prefix, error) {
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	return kube.ServiceRanges(ctx, w.client)
}
