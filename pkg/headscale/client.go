// Package headscale is a thin client of Headscale's REST API, versions 0.26 to 0.29 and the error format of 0.30.
//
// It has its own types: the generated ones of Headscale's module are gRPC and go away with 0.30. The key goes into the
// Authorization header and nowhere else, never into an error.
package headscale

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/headcni/headcni/pkg/config/secret"
)

const (
	// callTimeout bounds a call with its retries where the caller's context does not.
	callTimeout = 15 * time.Second
	// tryTimeout bounds one try, so that a server that hangs leaves time for another.
	tryTimeout = 6 * time.Second
	// tries is how often a call is sent at most.
	tries = 4
	// backoff before the second try; it doubles, and a random half of it is taken off so that nodes do not retry in step.
	backoff = 300 * time.Millisecond
	// maxBody bounds an answer, in bytes, and maxList that of a list; 10,000 nodes are about 10 MB.
	maxBody = 2 << 20
	maxList = 48 << 20
)

// Options make a Client.
type Options struct {
	// URL of Headscale, as tailscaled uses it: https://headscale.example.com or http://192.0.2.1:8080.
	URL string
	// Key is an API key. A pre-auth key is taken too, for Kind; every other call then answers ErrUnauthorized.
	Key secret.Secret
	// CAFile is a PEM bundle to trust beside the system's roots, "" = none.
	CAFile string
	// Proxy is the URL of an HTTP proxy, "" = what the environment says.
	Proxy string
	// Transport replaces the default one in tests; CAFile and Proxy are then ignored.
	Transport http.RoundTripper
}

// Client talks to one Headscale. It is safe for concurrent use.
type Client struct {
	base string
	key  secret.Secret
	http *http.Client
}

// New makes a client. It does not connect.
func New(o Options) (*Client, error) {
	u, err := url.Parse(strings.TrimRight(o.URL, "/"))
	switch {
	case err != nil:
		return nil, errors.New("headscale.url: not a URL; write it as https://headscale.example.com")
	case u.Scheme != "http" && u.Scheme != "https", u.Host == "":
		return nil, fmt.Errorf("headscale.url %q: write it as https://headscale.example.com", u.Redacted())
	case u.User != nil:
		return nil, fmt.Errorf("headscale.url %q: must not hold a user or password", u.Redacted())
	}
	t := o.Transport
	if t == nil {
		ca, err := readCA(o.CAFile)
		if err != nil {
			return nil, err
		}
		if t, err = newTransport(o.CAFile, ca, o.Proxy); err != nil {
			return nil, err
		}
	}
	// The key goes to the configured place and nowhere else: a redirect is taken as a refusal.
	noRedirect := func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return &Client{base: u.String(), key: o.Key, http: &http.Client{Transport: t, CheckRedirect: noRedirect}}, nil
}

// readCA reads a PEM bundle. Without a file there is none.
func readCA(file string) ([]byte, error) {
	if file == "" {
		return nil, nil
	}
	pem, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("headscale.caFile: %w", err)
	}
	return pem, nil
}

// newTransport trusts the system's roots and those of pem, which was read from caFile. proxy is as in Options.
func newTransport(caFile string, pem []byte, proxy string) (http.RoundTripper, error) {
	t := http.DefaultTransport.(*http.Transport).Clone()
	if proxy != "" {
		u, err := url.Parse(proxy)
		if err != nil || u.User != nil {
			return nil, errors.New("headscale.proxy: want http://HOST:PORT, without a user or password")
		}
		t.Proxy = http.ProxyURL(u)
	}
	t.DialContext = (&net.Dialer{Timeout: 3 * time.Second}).DialContext
	// HTTP/2 sends the next call over the connection on which the last one got no answer, HTTP/1 closes that.
	t.Protocols = new(http.Protocols)
	t.Protocols.SetHTTP1(true)
	t.MaxIdleConnsPerHost = 8 // as many calls as the controller has under way: else each would greet the server anew
	if caFile == "" {
		return t, nil
	}
	roots, err := x509.SystemCertPool()
	if err != nil {
		roots = x509.NewCertPool() // a host without roots of its own: the file must do
	}
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("headscale.caFile: no certificate in %s; it must be in PEM (-----BEGIN CERTIFICATE-----)", caFile)
	}
	t.TLSClientConfig = &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}
	return t, nil
}

// URL of the server, without a trailing slash.
func (c *Client) URL() string { return c.base }

// call is one request to the API.
type call struct {
	method, path string
	body         any
	// field names the field of the answer's object that is decoded into out, "" where only the object's being there counts.
	field string
	out   any
	// list says that the answer is a list, which is always there; anything else may be missing.
	list bool
	// skew, where it is not nil, is set to the server's clock minus ours if the answer has a date.
	skew *time.Duration
	// sendOnce forbids a second try after the server may have seen the first: the call is not idempotent.
	sendOnce bool
}

// do sends a call, with retries, and decodes the answer.
func (c *Client) do(ctx context.Context, req call) error {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, callTimeout)
		defer cancel()
	}
	wait := backoff
	for try := 1; ; try++ {
		err := c.try(ctx, req)
		if errors.Is(err, ErrUnreachable) {
			// What has made this connection go silent, such as a change of the host's network, has done so to the others.
			c.http.CloseIdleConnections()
		}
		if err == nil || try == tries || !retryable(err, req.sendOnce) || ctx.Err() != nil {
			return err
		}
		select {
		case <-time.After(wait - rand.N(wait/2)):
		case <-ctx.Done():
			return err
		}
		wait *= 2
	}
}

func (c *Client) try(ctx context.Context, req call) error {
	ctx, cancel := context.WithTimeout(ctx, tryTimeout)
	defer cancel()
	var body io.Reader
	if req.body != nil {
		b, err := json.Marshal(req.body)
		if err != nil {
			return err
		}
		body = bytes.NewReader(b)
	}
	r, err := http.NewRequestWithContext(ctx, req.method, c.base+req.path, body)
	if err != nil {
		return err
	}
	r.Header.Set("Accept", "application/json")
	if body != nil {
		r.Header.Set("Content-Type", "application/json")
	}
	if !c.key.Empty() && strings.HasPrefix(req.path, "/api/") {
		r.Header.Set("Authorization", "Bearer "+c.key.Reveal())
	}
	sent := time.Now()
	res, err := c.http.Do(r)
	if err != nil {
		return c.unreachable(err)
	}
	defer res.Body.Close()
	if date, err := http.ParseTime(res.Header.Get("Date")); err == nil && req.skew != nil {
		// The header has whole seconds, cut off; the server looked at its clock somewhere between sent and now.
		*req.skew = date.Add(time.Second / 2).Sub(sent.Add(time.Since(sent) / 2)).Round(time.Second)
	}
	limit := int64(maxBody)
	if req.list {
		limit = maxList
	}
	b, err := io.ReadAll(io.LimitReader(res.Body, limit+1))
	switch {
	case err != nil:
		return c.unreachable(err)
	case int64(len(b)) > limit:
		return c.unexpected(fmt.Errorf("the answer is longer than %d MiB", limit>>20))
	case res.StatusCode/100 == 3:
		return c.redirected(res)
	case res.StatusCode/100 != 2:
		return c.refusal(res.StatusCode, b, req.list)
	}
	return c.decode(b, req)
}

// decode reads the wanted field of an answer. An answer without the field is an error: a proxy's page can be JSON too.
func (c *Client) decode(body []byte, req call) error {
	var object map[string]json.RawMessage
	err := json.Unmarshal(body, &object)
	if err == nil && object == nil {
		err = errors.New("the answer is null")
	}
	if err != nil {
		return c.unexpected(err)
	}
	if req.field == "" {
		return nil
	}
	value, ok := object[req.field]
	if !ok || string(value) == "null" {
		return c.unexpected(fmt.Errorf("the answer has no %q", req.field))
	}
	if err := json.Unmarshal(value, req.out); err != nil {
		return c.unexpected(fmt.Errorf("%q: %w", req.field, err))
	}
	return nil
}
