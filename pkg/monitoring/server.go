package monitoring

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/headcni/headcni/pkg/reconcile"
)

const (
	// maxConns there are at once: a scraper and the kubelet have one or two each, and the port may be open to pods and to the LAN.
	maxConns = 64
	// maxHeader bounds what is read of a request, in bytes.
	maxHeader = 16 << 10
	// A scraper comes back within idle, by the same connection.
	idle = 2 * time.Minute
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
	srv := &http.Server{
		Handler: mux, ReadTimeout: 5 * time.Second, WriteTimeout: 30 * time.Second, IdleTimeout: idle, MaxHeaderBytes: maxHeader, ConnState: new(crowd).changed,
	}
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

// crowd are a server's connections, the oldest first. Of too many the oldest is closed: whoever opens as many as they can, and says nothing
// or reads nothing, keeps no probe and no scraper out, which are served within milliseconds.
type crowd struct {
	mu    sync.Mutex
	conns []net.Conn
}

// changed is for http.Server.ConnState.
func (c *crowd) changed(conn net.Conn, s http.ConnState) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch s {
	case http.StateNew:
		if c.conns = append(c.conns, conn); len(c.conns) > maxConns {
			_ = c.conns[0].Close() // its request, if it has one, fails
			c.conns = slices.Delete(c.conns, 0, 1)
		}
	case http.StateClosed:
		if i := slices.Index(c.conns, conn); i >= 0 {
			c.conns = slices.Delete(c.conns, i, i+1)
		}
	}
}
