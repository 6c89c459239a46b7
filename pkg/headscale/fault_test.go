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
	"sync/atomic"
	"testing"
	"time"

	"github.com/headcni/headcni/pkg/config/secret"
)

const testKey = "hskey-api-abcdefghijkl-topsecret"

// serve is a server that misbehaves; what a good one does is tested on the real one.
func serve(t *testing.T, h http.HandlerFunc) *Client {
	t.Helper()
	srv := httptest.NewServer(h)
	t.Cleanup(srv.Close)
	return client(t, srv.URL, testKey)
}

func answer(status int, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(status)
		fmt.Fprint(w, body)
	}
}

func TestErrorFormats(t *testing.T) {
	for name, tt := range map[string]struct {
		h    http.HandlerFunc
		is   error
		says []string
	}{
		"0.29 wrong key":    {answer(401, "Unauthorized"), ErrUnauthorized, []string{"headscale apikeys create"}},
		"0.26 wrong key":    {answer(500, "Unauthorized"), ErrUnauthorized, []string{"headscale apikeys create"}},
		"0.30 wrong key":    {answer(401, `{"title":"Unauthorized","status":401,"detail":"key expired"}`), ErrUnauthorized, []string{"key expired"}},
		"0.29 not found":    {answer(404, `{"code":5,"message":"node not found","details":[]}`), ErrNotFound, []string{"node not found"}},
		"0.26 not found":    {answer(500, `{"code":2,"message":"record not found","details":[]}`), ErrNotFound, nil},
		"0.30 not found":    {answer(404, `{"title":"Not Found","status":404,"detail":"no node 7"}`), ErrNotFound, []string{"no node 7"}},
		"0.30 bad request":  {answer(422, `{"title":"Unprocessable","detail":"validation failed","errors":[{"message":"expected prefix","location":"body.routes[0]"}]}`), nil, []string{"422", "validation failed", "body.routes[0]: expected prefix"}},
		"gRPC error":        {answer(500, `{"code":2,"message":"kaputt","details":[]}`), nil, []string{"500", "kaputt"}},
		"no API":            {answer(404, "<html>\n<body>"), nil, []string{"headscale.url"}},
		"another program":   {answer(200, "<html>"), nil, []string{"headscale.url"}},
		"the key is echoed": {answer(400, "bad key "+testKey), nil, []string{"bad key ***"}},
		"the key in JSON":   {answer(400, `{"message":"bad key `+testKey+`"}`), nil, []string{"bad key ***"}},
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
		want   int32 // calls in all
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
			var calls atomic.Int32
			c := serve(t, func(w http.ResponseWriter, r *http.Request) {
				if calls.Add(1) <= tt.fails {
					answer(tt.status, tt.body)(w, r)
					return
				}
				fmt.Fprint(w, `{"nodes":[],"preAuthKey":{"id":"1","key":"k"}}`)
			})
			var err error
			if tt.create {
				_, err = c.createPreAuthKey(t.Context(), PreAuthKeyRequest{}, 0)
			} else {
				_, err = c.Nodes(t.Context())
			}
			if (err == nil) != tt.ok || calls.Load() != tt.want {
				t.Errorf("%d calls, %v", calls.Load(), err)
			}
		})
	}
}

func TestDeadline(t *testing.T) {
	c := serve(t, func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
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
	srv := httptest.NewUnstartedServer(answer(200, `{"nodes":[]}`))
	srv.Config.ErrorLog = log.New(io.Discard, "", 0) // it would tell of the handshakes that are to fail
	srv.StartTLS()
	defer srv.Close()
	file := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	nodes := func(url, ca string) error {
		c, err := New(Options{URL: url, CAFile: ca, Key: secret.New(testKey)})
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
	plain := httptest.NewServer(answer(200, `{"nodes":[]}`))
	defer plain.Close()
	if err := nodes(strings.Replace(plain.URL, "http:", "https:", 1), file); err == nil || !strings.Contains(err.Error(), "speaks http") {
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
	c := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Date", time.Now().Add(-time.Hour).UTC().Format(http.TimeFormat))
		fmt.Fprint(w, `{"version":"v0.29.3"}`)
	})
	h, err := c.Health(t.Context())
	if err != nil || (h.Skew+time.Hour).Abs() > time.Second {
		t.Errorf("got %v, %v", h.Skew, err)
	}
}

// TestOldNode reads what 0.26 sends: tags in three lists, ids as strings, and "never" in two spellings.
func TestOldNode(t *testing.T) {
	c := serve(t, answer(200, `{"node":{"id":"9007199254740993","name":"host","givenName":"one","nodeKey":"nodekey:ab","ipAddresses":["100.64.0.1"],
		"forcedTags":["tag:b"],"validTags":["tag:a","tag:b"],"invalidTags":["tag:c"],"expiry":"0001-01-01T00:00:00Z","lastSeen":null,
		"approvedRoutes":["10.0.0.0/8"],"unknown":{"x":1},"user":{"id":"1","name":"u"}}}`))
	n, err := c.Node(t.Context(), 1)
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
	var made atomic.Bool
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body) // a short one fails the test
		switch {
		case r.URL.Path == "/api/v1/user" && r.Method == "POST":
			made.Store(true) // by the other node
			answer(500, `{"code":2,"message":"creating user: UNIQUE constraint failed: users.name","details":[]}`)(w, r)
		case r.URL.Path == "/api/v1/user" && made.Load():
			fmt.Fprint(w, `{"users":[{"id":"3","name":"headcni"}]}`)
		case r.URL.Path == "/api/v1/user":
			fmt.Fprint(w, `{"users":[]}`)
		case strings.Contains(string(body), `"user":"3"`):
			fmt.Fprint(w, `{"preAuthKey":{"id":"1","key":"k","user":{"id":"3","name":"headcni"}}}`)
		default:
			answer(500, `{"code":2,"message":"user not found","details":[]}`)(w, r)
		}
	})
	k, err := c.CreatePreAuthKey(t.Context(), PreAuthKeyRequest{Tags: []string{"tag:headcni"}})
	if err != nil || k.User.Name != "headcni" || !made.Load() {
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
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.URL.Path, "expire") {
			t.Error("the node was expired")
		}
		if r.URL.Path == "/version" {
			answer(404, "nothing here")(w, r)
		}
	})
	if err := c.DisableExpiry(t.Context(), 1); err == nil || !strings.Contains(err.Error(), "0.29") {
		t.Errorf("got %v", err)
	}
}

// TestApprovalThatDoesNotTake: a server that answers well and does nothing.
func TestApprovalThatDoesNotTake(t *testing.T) {
	c := serve(t, answer(200, `{"node":{"id":"1","givenName":"one","approvedRoutes":["192.168.0.0/24"]}}`))
	if _, err := c.ApproveRoutes(t.Context(), 1, prefixes("10.244.1.0/24"), nil); err == nil || !strings.Contains(err.Error(), "approved only") {
		t.Errorf("got %v", err)
	}
}

// TestUserForOldServer: up to 0.27 a key needs an owner.
func TestUserForOldServer(t *testing.T) {
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		var body struct{ User, Name string }
		_ = json.NewDecoder(r.Body).Decode(&body) // GETs have none
		switch {
		case r.URL.Path == "/api/v1/user" && r.Method == "GET":
			answer(200, `{"users":[{"id":"3","name":"headcni2"}]}`)(w, r)
		case r.URL.Path == "/api/v1/user" && body.Name == "headcni":
			answer(200, `{"user":{"id":"4","name":"headcni"}}`)(w, r)
		case r.URL.Path == "/api/v1/preauthkey" && body.User == "4":
			answer(200, `{"preAuthKey":{"id":"5","key":"k"}}`)(w, r)
		default:
			answer(500, `{"code":2,"message":"user not found"}`)(w, r)
		}
	})
	k, err := c.CreatePreAuthKey(t.Context(), PreAuthKeyRequest{Expiration: time.Now().Add(time.Hour)})
	if err != nil || k.ID != 5 || k.Key.Reveal() != "k" {
		t.Errorf("%+v, %v", k, err)
	}
}
