package nodestatus

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/headcni/headcni/internal/unixsock"
)

// askTimeout bounds Ask: the daemon asks tailscaled, which may be slow.
const askTimeout = 15 * time.Second

// errorMax bounds an error that the daemon answers with, in bytes.
const errorMax = 64 << 10

// Answers are what the daemon says on its socket.
type Answers struct {
	// Status is for GET /status.
	Status func(context.Context) Status
	// Others are for other requests, by their pattern. What keeps them from answering they write as http.Error does, but not as 404.
	Others map[string]http.HandlerFunc
}

// Serve answers on a Unix socket that only root can open, until ctx ends. It calls listening once somebody who asks is
// answered, and failed with what keeps a socket that somebody has removed from being replaced.
func Serve(ctx context.Context, socket string, answers Answers, listening func(), failed func(error)) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		s := answers.Status(r.Context())
		s.Time = time.Now()
		_ = json.NewEncoder(w).Encode(s) // the client has gone
	})
	for pattern, answer := range answers.Others {
		mux.HandleFunc(pattern, answer)
	}
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	defer srv.Close() // the connections that are left
	var once sync.Once
	return unixsock.Serve(ctx, "unix", socket, func(l *net.UnixListener) error {
		once.Do(listening)
		return srv.Serve(l)
	}, failed)
}

// Ask asks the daemon that listens on socket.
func Ask(ctx context.Context, socket string) (s Status, err error) {
	err = AskFor(ctx, socket, "/status", &s)
	return s, err
}

// AskFor asks the daemon for a path, and decodes what it answers.
func AskFor(ctx context.Context, socket, path string, answer any) error {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	body, err := Get(ctx, socket, path)
	if err != nil {
		return err
	}
	defer body.Close()
	if err := json.NewDecoder(body).Decode(answer); err != nil {
		return fmt.Errorf("ask the daemon: %w", err)
	}
	return nil
}

// Get asks the daemon for a path. Who calls it closes the answer, which may go on until ctx ends.
func Get(ctx context.Context, socket, path string) (io.ReadCloser, error) {
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://daemon"+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	switch {
	case errors.Is(err, os.ErrPermission):
		return nil, errors.New("ask the daemon: only root may: run it with sudo")
	case err != nil:
		return nil, fmt.Errorf("ask the daemon: %w; is headcni-daemon running? (systemctl status headcni-daemon)", errors.Unwrap(err))
	case resp.StatusCode == http.StatusOK:
		return resp.Body, nil
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusNotFound {
		return nil, errors.New("ask the daemon: the one that runs does not know this question: it is another version: restart it")
	}
	said, err := io.ReadAll(io.LimitReader(resp.Body, errorMax))
	if err != nil {
		return nil, fmt.Errorf("ask the daemon: %w", err)
	}
	return nil, errors.New(strings.TrimSpace(string(said)))
}
