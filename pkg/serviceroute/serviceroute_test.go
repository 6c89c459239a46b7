package serviceroute

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headcni/headcni/pkg/reconcile"
)

func prefixes(list ...string) (out []netip.Prefix) {
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

var (
	services = prefixes("10.96.0.0/12", "fd00:96::/108")
	well     = []reconcile.Status{{Name: "routes", OK: true}, {Name: "conflist", Error: "no disk"}}
	broken   = []reconcile.Status{{Name: "routes", Error: "no route"}}
)

func TestRoutes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := New("", "routes")
		want := func(what string, ask, has []netip.Prefix, parts []reconcile.Status, routes, words string) {
			t.Helper()
			got, err := g.Routes(ask, services, has, parts)
			if fmt.Sprint(got) != routes || (err == nil) != (words == "") || err != nil && !strings.Contains(err.Error(), words) {
				t.Errorf("%s: %v, %v, want %s and %q", what, got, err, routes, words)
			}
		}
		want("nothing is asked for", nil, services, broken, "[]", "")
		want("all is well", services, nil, well, "[10.96.0.0/12 fd00:96::/108]", "")
		want("what is no service's", prefixes("10.96.0.7/32", "0.0.0.0/0", "192.168.0.0/16"), nil, well, "[10.96.0.7/32]", "[0.0.0.0/0 192.168.0.0/16], which are in none of the ranges")
		want("a part fails", services, services, broken, "[10.96.0.0/12 fd00:96::/108]", "routes: no route")
		want("nothing is begun then", services, prefixes("10.96.0.0/12"), broken, "[10.96.0.0/12]", "routes: no route")
		time.Sleep(patience - time.Second)
		want("for a short time", services, services, broken, "[10.96.0.0/12 fd00:96::/108]", "routes: no route")
		time.Sleep(time.Second)
		want("for long", services, services, broken, "[]", "does not reach services by this node any more: routes")
		want("it is mended", services, nil, well, "[10.96.0.0/12 fd00:96::/108]", "")
		want("it breaks anew", services, services, broken, "[10.96.0.0/12 fd00:96::/108]", "routes")
	})
}

// TestHealth: what kube-proxy says closes the gate after a while, and opens it at once.
func TestHealth(t *testing.T) {
	var status atomic.Int32
	status.Store(http.StatusOK)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if status.Load() == http.StatusFound {
			w.Header().Set("Location", "/elsewhere")
		}
		if r.URL.Path == "/elsewhere" {
			return
		}
		w.WriteHeader(int(status.Load()))
		fmt.Fprint(w, `{"lastUpdated": "long ago"}`)
	}))
	g := New(s.URL + "/healthz")
	if _, err := g.Routes(services, services, nil, nil); err == nil || !strings.Contains(err.Error(), "has not been asked") {
		t.Errorf("before kube-proxy was asked: %v", err)
	}
	for _, c := range []struct {
		status int32
		words  string
	}{{http.StatusOK, ""}, {http.StatusServiceUnavailable, `503 Service Unavailable "{\"lastUpdated\": \"long ago\"}"`}, {http.StatusFound, "302"}} {
		status.Store(c.status)
		if err := g.ask(t.Context()); (err == nil) != (c.words == "") || err != nil && !strings.Contains(err.Error(), c.words) {
			t.Errorf("%d: %v, want %q", c.status, err, c.words)
		}
	}
	s.Close()
	if err := g.ask(t.Context()); err == nil || !strings.Contains(err.Error(), "connection refused") || !strings.Contains(err.Error(), "healthURL") {
		t.Errorf("nobody is there: %v", err)
	}
}

// TestRun: it asks only while somebody wants to know, tells of news, and stops.
func TestRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var asked, status atomic.Int32
		status.Store(http.StatusServiceUnavailable)
		g := New("http://kube-proxy/healthz")
		g.client.Transport = answer(func() int { asked.Add(1); return int(status.Load()) })
		var news atomic.Int32
		go g.Run(t.Context(), func() { news.Add(1) })
		time.Sleep(time.Minute)
		if n := asked.Load(); n != 0 {
			t.Errorf("asked %d times for nobody", n)
		}
		if _, err := g.Routes(services, services, services, nil); err == nil {
			t.Error("it does not wait for kube-proxy")
		}
		time.Sleep(patience)
		if got, err := g.Routes(services, services, services, nil); len(got) > 0 || err == nil || news.Load() < 5 {
			t.Errorf("kube-proxy has been down for long: %v, %v, told %d times", got, err, news.Load())
		}
		status.Store(http.StatusOK)
		time.Sleep(askInterval + time.Second)
		if got, err := g.Routes(services, services, nil, nil); len(got) != 2 || err != nil {
			t.Errorf("kube-proxy is back: %v, %v", got, err)
		}
		told := news.Load()
		time.Sleep(time.Minute)
		if news.Load() != told {
			t.Errorf("told %d times of nothing new", news.Load()-told)
		}
	})
}

// answer is a transport that answers with a status.
type answer func() int

func (a answer) RoundTrip(*http.Request) (*http.Response, error) {
	return &http.Response{StatusCode: a(), Body: http.NoBody}, nil
}

func TestServed(t *testing.T) {
	got := Served(prefixes("10.96.0.7/32"), prefixes("0.0.0.0/0", "10.96.0.0/16", "192.168.1.0/24", "10.0.0.0/8"), services)
	if fmt.Sprint(got) != "[10.96.0.7/32 10.96.0.0/16 10.0.0.0/8]" {
		t.Error(got)
	}
}
