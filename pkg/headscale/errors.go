package headscale

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/headcni/headcni/internal/printable"
	"github.com/headcni/headcni/pkg/findings"
)

// Kinds of errors, for errors.Is.
var (
	// ErrUnauthorized means that the key is wrong, has expired, or is no API key.
	ErrUnauthorized = findings.New(findings.APIKeyRefused, "the API key is refused by Headscale")
	// ErrUnreachable means that no answer came.
	ErrUnreachable = findings.New(findings.HeadscaleUnreached, "cannot reach Headscale")
	// ErrNotFound means that there is no such node, key or user.
	ErrNotFound = errors.New("not known to Headscale")
)

// Error is a refusal by the server.
type Error struct {
	// Status is the HTTP status.
	Status int
	// Code is the gRPC code of 0.26 to 0.29, 0 where there is none.
	Code int
	// Message is the server's own.
	Message string
	kind    error
}

func (e *Error) Error() string {
	text := e.Message
	if text == "" {
		text = http.StatusText(e.Status)
	}
	switch e.kind {
	case ErrUnauthorized:
		return fmt.Sprintf("%v (%d %s): make one with `headscale apikeys create` and put it where HEADSCALE_API_KEY_FILE or "+
			"headscale.apiKeyFile points", e.kind, e.Status, text)
	case ErrNotFound:
		return fmt.Sprintf("%v (%d %s)", e.kind, e.Status, text)
	}
	return fmt.Sprintf("Headscale answers %d: %s", e.Status, text)
}

// FindingID says which finding a refusal is.
func (e *Error) FindingID() findings.ID {
	if e.kind == ErrUnauthorized {
		return findings.APIKeyRefused
	}
	return findings.HeadscaleOther
}

// Is makes errors.Is find the sentinels above.
func (e *Error) Is(target error) bool { return e.kind != nil && target == e.kind }

// maxMessage bounds, in characters, what is shown of an answer.
const maxMessage = 200

// gRPC codes that the server's gateway puts into its errors.
const (
	grpcNotFound    = 5
	grpcUnavailable = 14
)

// unexpected is the error for an answer that Headscale does not give.
func (c *Client) unexpected(why error) error {
	return findings.Errorf(findings.NotHeadscale, "%s does not answer like Headscale's API: %s; check headscale.url", c.base, printable.Cut(why.Error(), maxMessage))
}

// redirected is the error for an answer that redirects. It shows the scheme and host of the target; the rest may be anything.
func (c *Client) redirected(res *http.Response) error {
	to := "elsewhere"
	if u, err := res.Location(); err == nil && u.Scheme+"://"+u.Host != c.base {
		to = "to " + strconv.Quote(u.Scheme+"://"+u.Host)
	}
	return findings.Errorf(findings.NotHeadscale, "%s sends %s (%d) instead of answering: set headscale.url to where Headscale itself answers; the API key is sent nowhere else",
		c.base, to, res.StatusCode)
}

// refusal makes an Error of an answer that is not 2xx. Three formats are known: {"code","message"} of the gRPC gateway,
// problem+json (RFC 7807) of 0.30, and plain text. list says that the answer should have been a list, which is always there.
func (c *Client) refusal(status int, body []byte, list bool) error {
	var j struct {
		Code    int
		Message string
		Title   string
		Detail  string
		Errors  []struct{ Message, Location string }
	}
	e := &Error{Status: status}
	if json.Unmarshal(body, &j) == nil {
		e.Code, e.Message = j.Code, j.Message
		if e.Message == "" {
			e.Message = strings.Trim(j.Title+": "+j.Detail, ": ")
		}
		for _, f := range j.Errors {
			e.Message += "; " + strings.Trim(f.Location+": "+f.Message, ": ")
		}
	} else {
		e.Message, _, _ = strings.Cut(strings.TrimSpace(string(body)), "\n")
	}
	if !c.key.Empty() {
		e.Message = strings.ReplaceAll(e.Message, c.key.Reveal(), "***")
	}
	e.Message = printable.Cut(e.Message, maxMessage)
	switch {
	// Up to 0.27 a key that cannot be parsed is answered with 500 and this text.
	case status == http.StatusUnauthorized, status == http.StatusForbidden, strings.TrimSpace(string(body)) == "Unauthorized":
		e.kind = ErrUnauthorized
	case status == http.StatusNotFound && (list || e.Message == "" || !looksLikeAPI(body)):
		return findings.Errorf(findings.NotHeadscale, "%s has no such page: this is not Headscale's API, or one older than 0.26; check headscale.url", c.base)
	case list: // a list that is not found says nothing of what is on it
	case status == http.StatusNotFound, e.Code == grpcNotFound, strings.Contains(e.Message, "record not found"),
		strings.Contains(e.Message, "node not found"), strings.Contains(e.Message, "no longer exists"):
		e.kind = ErrNotFound
	}
	return e
}

func looksLikeAPI(body []byte) bool {
	var j map[string]any
	return json.Unmarshal(body, &j) == nil
}

// unreachable explains a request that got no answer. Neither the key nor the request's path is in it.
func (c *Client) unreachable(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		err = u.Err
	}
	if errors.Is(err, context.Canceled) {
		return context.Canceled
	}
	id := findings.HeadscaleUnreached
	if isTLS(err) {
		id = findings.HeadscaleCert
	}
	return findings.Errorf(id, "%w at %s: %w; %s", ErrUnreachable, c.base, err, c.advice(err))
}

func (c *Client) advice(err error) string {
	var authority x509.UnknownAuthorityError
	var invalid x509.CertificateInvalidError
	var host x509.HostnameError
	switch {
	case errors.As(err, &authority):
		return "set headscale.caFile to the PEM file of the authority that signed its certificate"
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return "renew its certificate, or set this host's clock if that is wrong"
	case errors.As(err, &host):
		return "set headscale.url to a name that its certificate has"
	case strings.Contains(err.Error(), "server gave HTTP response to HTTPS client"):
		return "it speaks http there: set headscale.url accordingly"
	}
	return "check that it runs and that headscale.url can be reached from this host"
}

// retryable reports whether another try may help.
func retryable(err error, sendOnce bool) bool {
	var e *Error
	if errors.As(err, &e) {
		if sendOnce || e.kind != nil {
			return false
		}
		switch e.Status {
		case http.StatusTooManyRequests, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
			return true
		case http.StatusInternalServerError:
			// The gateway answers most permanent errors with 500 and gRPC's code 2, unknown.
			return e.Code == 0 || e.Code == grpcUnavailable
		}
		return false
	}
	if !errors.Is(err, ErrUnreachable) || isTLS(err) {
		return false
	}
	var op *net.OpError
	dial := errors.As(err, &op) && op.Op == "dial"
	return dial || !sendOnce
}

// isTLS reports whether TLS failed: a certificate does not get better within seconds.
func isTLS(err error) bool {
	var authority x509.UnknownAuthorityError
	var invalid x509.CertificateInvalidError
	var host x509.HostnameError
	return errors.As(err, &authority) || errors.As(err, &invalid) || errors.As(err, &host) ||
		strings.Contains(err.Error(), "server gave HTTP response to HTTPS client")
}
