package monitoring

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/headcni/headcni/pkg/reconcile"
)

// Readiness reports whether the program is ready, and the state of its parts.
type Readiness interface {
	Ready() (bool, []reconcile.Status)
}

// Serve answers /healthz (the process lives), /readyz (200 or 503 and the parts as JSON) and /metrics on listen until
// ctx ends. It returns an error at once if it cannot listen.
func Serve(ctx context.Context, listen string, g prometheus.Gatherer, r Readiness) (wait func() error, err error) {
	l, err := net.Listen("tcp", listen)
	if err != nil {
		return nil, fmt.Errorf("serve metrics: %w; choose another monitoring.listen", err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		ok, parts := r.Ready()
		w.Header().Set("Content-Type", "application/json")
		if !ok {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		_ = json.NewEncoder(w).Encode(struct {
			Ready bool               `json:"ready"`
			Parts []reconcile.Status `json:"parts"`
		}{ok, parts}) // the client has gone
	})
	mux.Handle("GET /metrics", promhttp.HandlerFor(g, promhttp.HandlerOpts{}))
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, WriteTimeout: 30 * time.Second}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(l) }()
	context.AfterFunc(ctx, func() { srv.Close() })
	return func() error {
		if err := <-done; !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	}, nil
}
