package nodestatus

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/headcni/headcni/internal/unixsock"
)

// askTimeout bounds Ask: the daemon asks tailscaled, which may be slow.
const askTimeout = 15 * time.Second

// Serve answers GET /status on a Unix socket that only root can open, until ctx ends. It calls listening once somebody who asks is
// answered, and failed with what keeps a socket that somebody has removed from being replaced.
func Serve(ctx context.Context, socket string, status func(context.Context) Status, listening func(), failed func(error)) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(status(r.Context())) // the client has gone
	})
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	defer srv.Close() // the connections that are left
	var once sync.Once
	return unixsock.Serve(ctx, "unix", socket, func(l *net.UnixListener) error {
		once.Do(listening)
		return srv.Serve(l)
	}, failed)
}

// Ask asks the daemon that listens on socket.
func Ask(ctx context.Context, socket string) (Status, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://daemon/status", nil)
	if err != nil {
		return Status{}, err
	}
	resp, err := client.Do(req)
	switch {
	case errors.Is(err, os.ErrPermission):
		return Status{}, errors.New("ask the daemon: only root may: run it with sudo")
	case err != nil:
		return Status{}, fmt.Errorf("ask the daemon: %w; is headcni-daemon running? (systemctl status headcni-daemon)", errors.Unwrap(err))
	}
	defer resp.Body.Close()
	var s Status
	if err := json.NewDecoder(resp.Body).Decode(&s); err != nil {
		return Status{}, fmt.Errorf("ask the daemon: %w", err)
	}
	return s, nil
}
