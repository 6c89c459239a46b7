// Package tailscale drives a stock tailscaled through its LocalAPI: status, joining a tailnet, prefs, its bus of
// notifications, and WireGuard sessions that are there when pods need them.
//
// It speaks the LocalAPI's HTTP itself instead of using tailscale.com/client/local: that client retries a dead socket
// for seconds, and brings five megabytes into the binary for the handful of fields that matter here. The fields used
// have been stable since Tailscale 1.60 or earlier; unknown ones are ignored. PeerState, which Rearm works with, came
// with 1.102: with an older tailscaled Rearm pings peers when they come and when this node starts, and that is all.
package tailscale

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/headcni/headcni/pkg/findings"
)

const (
	// callTimeout bounds every call but the bus. A healthy tailscaled answers within milliseconds, but a start or an
	// edit of prefs waits for its reconfiguration, which takes seconds on a busy machine.
	callTimeout = 10 * time.Second
	// dialTimeout bounds the connect to the socket; it blocks only while the listener's backlog is full.
	dialTimeout = 2 * time.Second
	// apiHost is the only Host that tailscaled accepts on the socket.
	apiHost = "local-tailscaled.sock"
	// maxBody bounds an answer, in bytes; a status with 10,000 peers is about 20 MB.
	maxBody = 256 << 20
)

// ErrUnreachable means that no tailscaled answers at the socket.
var ErrUnreachable = findings.New(findings.TailscaledSilent, "no tailscaled answers")

// Client talks to one tailscaled. It is safe for concurrent use and keeps no connection open between calls for long.
type Client struct {
	socket string
	http   *http.Client
}

// New makes a client for the LocalAPI at a Unix socket. It does not connect.
func New(socket string) *Client {
	dialer := net.Dialer{Timeout: dialTimeout}
	return &Client{socket: socket, http: &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, "unix", socket)
		},
		IdleConnTimeout: 30 * time.Second,
	}}}
}

// Socket is the path of the Unix socket.
func (c *Client) Socket() string { return c.socket }

// request sends one call. The caller closes the body of the answer, which has the status 2xx.
func (c *Client) request(ctx context.Context, method, path string, body any) (*http.Response, error) {
	var r io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return nil, err
		}
		r = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://"+apiHost+"/localapi/v0/"+path, r)
	if err != nil {
		return nil, err
	}
	res, err := c.http.Do(req)
	if err != nil {
		return nil, c.unreachable(ctx, err)
	}
	if res.StatusCode/100 == 2 {
		return res, nil
	}
	defer res.Body.Close()
	text, _ := io.ReadAll(io.LimitReader(res.Body, 4096)) // the status alone must do where the text cannot be read
	return nil, &apiError{status: res.StatusCode, message: errorText(text)}
}

// call sends one call within callTimeout and decodes the answer into out, unless out is nil.
func (c *Client) call(ctx context.Context, method, path string, body, out any) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	res, err := c.request(ctx, method, path, body)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, maxBody))
	if err != nil {
		return c.unreachable(ctx, err)
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(b, out); err != nil {
		return fmt.Errorf("decode tailscaled's answer: %w", err)
	}
	return nil
}

// unreachable explains a call that got no answer.
func (c *Client) unreachable(ctx context.Context, err error) error {
	if errors.Is(ctx.Err(), context.Canceled) {
		return context.Canceled
	}
	// url.Error repeats a made-up URL that helps nobody.
	for u := errors.Unwrap(err); u != nil; u = errors.Unwrap(u) {
		err = u
	}
	return fmt.Errorf("%w at %s: %w; start it (systemctl start tailscaled) or set tailscale.socket to where it listens",
		ErrUnreachable, c.socket, err)
}

// apiError is a refusal by tailscaled.
type apiError struct {
	status  int
	message string
}

func (e *apiError) Error() string {
	if e.status == http.StatusForbidden {
		return fmt.Sprintf("tailscaled denies access (%s): run as root", e.message)
	}
	return fmt.Sprintf("tailscaled answers %d: %s", e.status, e.message)
}

// errorText finds the text in an error body, which is {"Error": "..."} or plain text.
func errorText(body []byte) string {
	var j struct{ Error string }
	if json.Unmarshal(body, &j) == nil && j.Error != "" {
		return j.Error
	}
	return strings.TrimSpace(string(body))
}
