package headscale

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/headscaletest"
	"github.com/headcni/headcni/pkg/config/secret"
)

const testKey = "hskey-api-abcdefghijkl-topsecret"

// serve is a client of a server that misbehaves; what a good one does is tested on the real one.
func serve(t *testing.T, f headscaletest.Fault) *Client {
	t.Helper()
	s := headscaletest.New(t)
	s.Break(f)
	return client(t, s.URL, testKey)
}

func TestErrorFormats(t *testing.T) {
	for name, tt := range map[string]struct {
		h    headscaletest.Fault
		is   error
		says []string
	}{
		"0.29 wrong key":    {headscaletest.Answer(401, "Unauthorized"), ErrUnauthorized, []string{"headscale apikeys create"}},
		"0.26 wrong key":    {headscaletest.Answer(500, "Unauthorized"), ErrUnauthorized, []string{"headscale apikeys create"}},
		"0.30 wrong key":    {headscaletest.Answer(401, `{"title":"Unauthorized","status":401,"detail":"key expired"}`), ErrUnauthorized, []string{"key expired"}},
		"0.29 not found":    {headscaletest.Answer(404, `{"code":5,"message":"node not found","details":[]}`), ErrNotFound, []string{"node not found"}},
		"0.26 not found":    {headscaletest.Answer(500, `{"code":2,"message":"record not found","details":[]}`), ErrNotFound, nil},
		"0.30 not found":    {headscaletest.Answer(404, `{"title":"Not Found","status":404,"detail":"no node 7"}`), ErrNotFound, []string{"no node 7"}},
		"0.30 bad request":  {headscaletest.Answer(422, `{"title":"Unprocessable","detail":"validation failed","errors":[{"message":"expected prefix","location":"body.routes[0]"}]}`), nil, []string{"422", "validation failed", "body.routes[0]: expected prefix"}},
		"gRPC error":        {headscaletest.Answer(500, `{"code":2,"message":"kaputt","details":[]}`), nil, []string{"500", "kaputt"}},
		"no API":            {headscaletest.Answer(404, "<html>\n<body>"), nil, []string{"headscale.url"}},
		"another program":   {headscaletest.Answer(200, "<html>"), nil, []string{"headscale.url"}},
		"the key is echoed": {headscaletest.Answer(400, "bad key "+testKey), nil, []string{"bad key ***"}},
		"the key in JSON":   {headscaletest.Answer(400, `{"message":"bad key `+testKey+`"}`), nil, []string{"bad key ***"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := serve(t, tt.h).Node(t.Context(), 7)
			if err == nil || tt.is != nil && !errors.Is(err, tt.is) {
				t.Fatalf("got %v", err)
			}
			for _, other := range []error{ErrUnauthorized, ErrNotFound, ErrUnreachable} {
				if other != tt.is && errors.Is(err, other) {
					t.Errorf("%v is also %v", err, other)
				}
			}
			for _, s := range tt.says {
				if !strings.Contains(err.Error(), s) {
					t.Errorf("%q is not in %v", s, err)
				}
			}
			if strings.Contains(err.Error(), testKey) || strings.Contains(fmt.Sprintf("%+v %#v", err, err), testKey) {
				t.Errorf("the key is in %v", err)
			}
		})
	}
}

func TestRetries(t *testing.T) {
	for name, tt := range map[string]struct {
		status int
		body   string
		fails  int32 // this many times
		want   int   // calls in all
		ok     bool
		create bool
	}{
		"starts up":              {503, "", 2, 3, true, false},
		"proxy without server":   {502, "<html>", 1, 2, true, false},
		"plain 500":              {500, "", 1, 2, true, false},
		"stays away":             {503, "", 100, tries, false, false},
		"permanent by gRPC code": {500, `{"code":2,"message":"no"}`, 100, 1, false, false},
		"wrong key":              {401, "Unauthorized", 100, 1, false, false},
		"create is sent once":    {503, "", 1, 1, false, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := headscaletest.New(t)
			s.Break(headscaletest.First(tt.fails, headscaletest.Answer(tt.status, tt.body)))
			c := client(t, s.URL, s.APIKey())
			var err error
			if tt.create {
				_, err = c.createPreAuthKey(t.Context(), PreAuthKeyRequest{}, 0)
			} else {
				_, err = c.Nodes(t.Context())
			}
			if n := len(s.Calls("")); (err == nil) != tt.ok || n != tt.want {
				t.Errorf("%d calls, %v", n, err)
			}
		})
	}
}

func TestDeadline(t *testing.T) {
	c := serve(t, func(_ http.ResponseWriter, r *http.Request) bool { <-r.Context().Done(); return true })
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	start := time.Now()
	_, err := c.Nodes(ctx)
	if !errors.Is(err, ErrUnreachable) || time.Since(start) > 2*time.Second {
		t.Errorf("after %s: %v", time.Since(start), err)
	}
	cancelled, cancelNow := context.WithCancel(t.Context())
	cancelNow()
	if _, err := c.Nodes(cancelled); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestCustomCA(t *testing.T) {
	hs := headscaletest.New(t)
	key := secret.New(hs.APIKey())
	srv := httptest.NewUnstartedServer(hs)
	srv.Config.ErrorLog = log.New(io.Discard, "", 0) // it would tell of the handshakes that are to fail
	srv.StartTLS()
	defer srv.Close()
	file := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	nodes := func(url, ca string) error {
		c, err := New(Options{URL: url, CAFile: ca, Key: key})
		if err != nil {
			return err
		}
		_, err = c.Nodes(t.Context())
		return err
	}
	if err := nodes(srv.URL, file); err != nil {
		t.Errorf("with the CA: %v", err)
	}
	start := time.Now()
	if err := nodes(srv.URL, ""); !errors.Is(err, ErrUnreachable) || !strings.Contains(err.Error(), "headscale.caFile") || time.Since(start) > backoff {
		t.Errorf("without, after %s: %v", time.Since(start), err)
	}
	if err := nodes(strings.Replace(hs.URL, "http:", "https:", 1), file); err == nil || !strings.Contains(err.Error(), "speaks http") {
		t.Errorf("http server by https: %v", err)
	}
	empty := filepath.Join(t.TempDir(), "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{empty, "/nonexistent"} {
		if err := nodes(srv.URL, bad); err == nil || !strings.Contains(err.Error(), "headscale.caFile") {
			t.Errorf("%s: %v", bad, err)
		}
	}
}

func TestBadURL(t *testing.T) {
	for _, url := range []string{"", "hs.example.com", "ftp://hs", "https://", "https://user:pw-secret@hs", "http://[::1", "https://hs/%zz"} {
		_, err := New(Options{URL: url})
		if err == nil || !strings.Contains(err.Error(), "headscale.url") || strings.Contains(err.Error(), "pw-secret") {
			t.Errorf("%q: %v", url, err)
		}
	}
}

func TestClockSkew(t *testing.T) {
	c := serve(t, func(w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Set("Date", time.Now().Add(-time.Hour).UTC().Format(http.TimeFormat))
		return false
	})
	h, err := c.Health(t.Context())
	if err != nil || (h.Skew+time.Hour).Abs() > time.Second {
		t.Errorf("got %v, %v", h.Skew, err)
	}
}

// TestOldNode reads what 0.26 sends: tags in three lists, ids as strings, and "never" in two spellings.
func TestOldNode(t *testing.T) {
	c := serve(t, headscaletest.Answer(200, `{"node":{"id":"9007199254740993","name":"host","givenName":"one","nodeKey":"nodekey:ab","ipAddresses":["100.64.0.1"],
		"forcedTags":["tag:b"],"validTags":["tag:a","tag:b"],"invalidTags":["tag:c"],"expiry":"0001-01-01T00:00:00Z","lastSeen":null,
		"approvedRoutes":["10.0.0.0/8"],"unknown":{"x":1},"user":{"id":"1","name":"u"}}}`))
	n, err := c.Node(t.Context(), 9007199254740993)
	if err != nil || n.ID != 9007199254740993 || strings.Join(n.Tags, " ") != "tag:a tag:b" || !n.Expiry.IsZero() || n.User != "u" || n.Hostname != "host" {
		t.Errorf("%+v, %v", n, err)
	}
	b, err := json.Marshal(map[string]any{"id": n.ID})
	if err != nil || string(b) != `{"id":"9007199254740993"}` {
		t.Errorf("%s, %v", b, err)
	}
}

// TestUserMadeMeanwhile: up to 0.27 nodes that join at the same time make the user of their keys at the same time.
func TestUserMadeMeanwhile(t *testing.T) {
	s := headscaletest.NewVersion(t, 27)
	s.Break(headscaletest.At("POST /api/v1/user", headscaletest.First(1, func(http.ResponseWriter, *http.Request) bool {
		s.AddUser(defaultUser) // for the other node
		return false
	})))
	c := client(t, s.URL, s.APIKey())
	k, err := c.CreatePreAuthKey(t.Context(), PreAuthKeyRequest{Tags: []string{"tag:headcni"}})
	if n := len(s.Calls("POST /api/v1/user")); err != nil || k.User.Name != "headcni" || n != 1 {
		t.Errorf("%+v, %v", k, err)
	}
}

func TestAtLeast(t *testing.T) {
	for v, want := range map[string]bool{"": false, "v0.28.0": false, "v0.29.3": true, "0.30.0-beta.1": true, "v1.0.0": true, "dev": true} {
		if got := atLeast(v, 0, 29); got != want {
			t.Errorf("%q: %v", v, got)
		}
	}
}

// TestDisableExpiryOnOldServer: the request would expire the node at once.
func TestDisableExpiryOnOldServer(t *testing.T) {
	s := headscaletest.NewVersion(t, 26)
	id := ID(s.AddNode(headscaletest.Node{}).ID)
	c := client(t, s.URL, s.APIKey())
	if err := c.DisableExpiry(t.Context(), id); err == nil || !strings.Contains(err.Error(), "0.29") {
		t.Errorf("got %v", err)
	}
	if n, err := c.Node(t.Context(), id); err != nil || !n.Expiry.IsZero() {
		t.Errorf("the node was expired: %v, %v", n.Expiry, err)
	}
}

// TestApprovalThatDoesNotTake: a server that answers well and does nothing.
func TestApprovalThatDoesNotTake(t *testing.T) {
	c := serve(t, headscaletest.Answer(200, `{"node":{"id":"1","givenName":"one","nodeKey":"nodekey:ab","approvedRoutes":["192.168.0.0/24"]}}`))
	if _, err := c.ApproveRoutes(t.Context(), Node{ID: 1, NodeKey: "nodekey:ab"}, prefixes("10.244.1.0/24"), nil); err == nil || !strings.Contains(err.Error(), "approved only") {
		t.Errorf("got %v", err)
	}
}

// TestUserForOldServer: up to 0.27 a key needs an owner.
func TestUserForOldServer(t *testing.T) {
	s := headscaletest.NewVersion(t, 27)
	s.AddUser("headcni2")
	s.Break(headscaletest.At("GET /api/v1/user", func(_ http.ResponseWriter, r *http.Request) bool {
		r.URL.RawQuery = "" // it lists all, whoever is asked for
		return false
	}))
	c := client(t, s.URL, s.APIKey())
	k, err := c.CreatePreAuthKey(t.Context(), PreAuthKeyRequest{Expiration: time.Now().Add(time.Hour)})
	if err != nil || k.Key.Empty() || k.User.Name != "headcni" {
		t.Errorf("%+v, %v", k, err)
	}
	if _, err := s.Join(k.Key.Reveal(), "one"); err != nil {
		t.Error(err)
	}
}
