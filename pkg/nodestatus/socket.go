package nodestatus

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/headcni/headcni/internal/atomicfile"
)

// askTimeout bounds Ask: the daemon asks tailscaled, which may be slow.
const askTimeout = 15 * time.Second

// Serve answers GET /status on a Unix socket that only root can open, until ctx ends. It calls listening once somebody who asks
// is answered.
func Serve(ctx context.Context, socket string, status func(context.Context) Status, listening func()) error {
	if err := atomicfile.Remove(socket); err != nil {
		return err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		return err
	}
	l.SetUnlinkOnClose(false) // the next daemon's may be there by then
	if err := os.Chmod(socket, 0o600); err != nil {
		l.Close()
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(status(r.Context())) // the client has gone
	})
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	stop := context.AfterFunc(ctx, func() { srv.Close() })
	defer stop()
	listening()
	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
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
