package tailscale

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/headcni/headcni/pkg/config/secret"
)

func TestPlanLogin(t *testing.T) {
	const ours, other = "https://hs.example.com", "https://login.example.org"
	key := secret.New("k")
	in := Prefs{ControlURL: ours, WantRunning: true}
	for name, tt := range map[string]struct {
		st   Status
		p    Prefs
		o    LoginOptions
		want loginStep
		err  error
	}{
		"fresh":                    {Status{State: NeedsLogin}, Prefs{}, LoginOptions{ControlURL: ours, AuthKey: key}, loginStart, nil},
		"fresh without key":        {Status{State: NeedsLogin}, Prefs{}, LoginOptions{ControlURL: ours}, 0, ErrNeedsKey},
		"running":                  {Status{State: Running, HaveNodeKey: true}, in, LoginOptions{ControlURL: ours + ":443/"}, loginNone, nil},
		"starting, Headscale down": {Status{State: Starting, HaveNodeKey: true}, in, LoginOptions{ControlURL: ours}, loginNone, nil},
		"just started":             {Status{State: NoState, HaveNodeKey: true}, in, LoginOptions{ControlURL: ours, AuthKey: key}, loginNone, nil},
		"down":                     {Status{State: Stopped, HaveNodeKey: true}, Prefs{ControlURL: ours}, LoginOptions{ControlURL: ours}, loginUp, nil},
		"logged out":               {Status{State: NeedsLogin, HaveNodeKey: true}, Prefs{ControlURL: ours, LoggedOut: true}, LoginOptions{ControlURL: ours, AuthKey: key}, loginStart, nil},
		"key expired":              {Status{State: NeedsLogin, HaveNodeKey: true}, in, LoginOptions{ControlURL: ours, AuthKey: key}, loginStart, nil},
		"key expired, none given":  {Status{State: NeedsLogin, HaveNodeKey: true}, in, LoginOptions{ControlURL: ours}, 0, ErrNeedsKey},
		"elsewhere":                {Status{State: Running, HaveNodeKey: true}, Prefs{ControlURL: other, WantRunning: true}, LoginOptions{ControlURL: ours, AuthKey: key}, 0, ErrOtherControl},
		"at Tailscale":             {Status{State: Running, HaveNodeKey: true}, Prefs{WantRunning: true}, LoginOptions{ControlURL: ours, AuthKey: key}, 0, ErrOtherControl},
		"moved":                    {Status{State: Running, HaveNodeKey: true}, Prefs{ControlURL: other, WantRunning: true}, LoginOptions{ControlURL: ours, AuthKey: key, Move: true}, loginStart, nil},
		"moved without key":        {Status{State: Running, HaveNodeKey: true}, Prefs{ControlURL: other, WantRunning: true}, LoginOptions{ControlURL: ours, Move: true}, 0, ErrNeedsKey},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := planLogin(tt.st, tt.p, tt.o)
			if got != tt.want || !errors.Is(err, tt.err) {
				t.Errorf("got %v, %v; want %v, %v", got, err, tt.want, tt.err)
			}
		})
	}
}

// fake is a LocalAPI that only misbehaves; what a good one does is tested on the real one.
func fake(t *testing.T, h http.HandlerFunc) *Client {
	t.Helper()
	dir, err := os.MkdirTemp("", "ts") // t.TempDir may be too long for a Unix socket
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewUnstartedServer(h)
	srv.Listener.Close()
	srv.Listener = l
	srv.Start()
	t.Cleanup(func() {
		srv.CloseClientConnections()
		srv.Close()
		os.RemoveAll(dir)
	})
	return New(socket)
}

// login serves a fresh tailscaled whose bus sends the given messages after the start.
func fakeLogin(messages ...string) http.HandlerFunc {
	started := make(chan struct{})
	var once sync.Once
	return func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/localapi/v0/status":
			fmt.Fprint(w, `{"BackendState":"NeedsLogin"}`)
		case "/localapi/v0/prefs":
			fmt.Fprint(w, `{"ControlURL":"","AdvertiseRoutes":["10.9.0.0/16"],"Config":{"PrivateNodeKey":"privkey:00"}}`)
		case "/localapi/v0/start":
			var o struct{ UpdatePrefs map[string]json.RawMessage }
			if err := json.NewDecoder(r.Body).Decode(&o); err != nil || o.UpdatePrefs["Config"] != nil || string(o.UpdatePrefs["WantRunning"]) != "true" ||
				string(o.UpdatePrefs["AdvertiseRoutes"]) != `["10.9.0.0/16"]` {
				http.Error(w, "bad options", http.StatusBadRequest)
				return
			}
			once.Do(func() { close(started) })
		case "/localapi/v0/login-interactive":
		case "/localapi/v0/watch-ipn-bus":
			fmt.Fprintln(w, `{"State":2,"Health":{"Warnings":{"login-state":{"Text":"You are logged out. The last login error was: register request: http 401: old"}}}}`)
			w.(http.Flusher).Flush()
			<-started
			for _, m := range messages {
				fmt.Fprintln(w, m)
			}
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		}
	}
}

func TestLoginRefusals(t *testing.T) {
	const key = "hskey-auth-very-secret"
	for name, tt := range map[string]struct {
		message string
		is      error
		says    string
	}{
		"error message":      {`{"ErrMessage":"AuthKey hskey-auth-very-secret not found"}`, ErrKeyRefused, "AuthKey *** not found"},
		"older server":       {`{"Health":{"Warnings":{"login-state":{"Args":{"error":"register request: http 401: key expired"}}}}}`, ErrKeyRefused, "key expired"},
		"interactive":        {`{"BrowseToURL":"https://hs/register/x"}`, ErrKeyRefused, "interactive"},
		"approval":           {`{"State":3}`, nil, "approved"},
		"the bus breaks off": {`garbage`, ErrControl, ""},
	} {
		t.Run(name, func(t *testing.T) {
			c := fake(t, fakeLogin(tt.message))
			err := c.Login(t.Context(), LoginOptions{ControlURL: "https://hs.example.com", AuthKey: secret.New(key)})
			if err == nil || tt.is != nil && !errors.Is(err, tt.is) || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("got %v", err)
			}
			if err != nil && strings.Contains(err.Error(), key) {
				t.Errorf("the key is in %v", err)
			}
		})
	}
	t.Run("joined", func(t *testing.T) {
		c := fake(t, fakeLogin(`{"State":5}`, `{"State":6}`))
		if err := c.Login(t.Context(), LoginOptions{ControlURL: "https://hs.example.com", AuthKey: secret.New(key)}); err != nil {
			t.Error(err)
		}
	})
}

func TestHostileSocket(t *testing.T) {
	for name, h := range map[string]http.HandlerFunc{
		"hangs":    func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() },
		"breaks":   func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) },
		"not JSON": func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "<html>") },
		"denies":   func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "no", http.StatusForbidden) },
		"fails":    func(w http.ResponseWriter, _ *http.Request) { http.Error(w, `{"Error":"kaputt"}`, 500) },
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
			defer cancel()
			c := fake(t, h)
			start := time.Now()
			_, err := c.Status(ctx)
			if err == nil || time.Since(start) > 2*time.Second {
				t.Errorf("after %s: %v", time.Since(start), err)
			}
			want := map[string]string{"denies": "root", "fails": "500: kaputt", "hangs": "deadline"}[name]
			if err != nil && !strings.Contains(err.Error(), want) {
				t.Errorf("%v lacks %q", err, want)
			}
			if err := c.Watch(ctx, func(Event) {}); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("watch: %v", err)
			}
		})
	}
}
