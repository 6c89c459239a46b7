package main

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/headcni/headcni/pkg/connectivity"
)

// fakeAPI has a DaemonSet of want pods, of which those of the given nodes run at 127.0.0.1.
func fakeAPI(t *testing.T, want int, nodes ...string) *apiClient {
	t.Helper()
	mux := http.NewServeMux()
	mux.HandleFunc("GET /apis/apps/v1/namespaces/ns/daemonsets/ds", func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer t" {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		fmt.Fprintf(w, `{"spec":{"selector":{"matchLabels":{"a":"b","c":"d"}}},"status":{"desiredNumberScheduled":%d}}`, want)
	})
	mux.HandleFunc("GET /api/v1/namespaces/ns/pods", func(w http.ResponseWriter, r *http.Request) {
		if got := r.FormValue("labelSelector"); got != "a=b,c=d" {
			t.Errorf("selector %q", got)
		}
		items := []string{`{"spec":{"nodeName":"new"},"status":{"phase":"Pending"}}`}
		for _, n := range nodes {
			items = append(items, `{"spec":{"nodeName":"`+n+`"},"status":{"phase":"Running","podIPs":[{"ip":"127.0.0.1"}]}}`)
		}
		fmt.Fprintf(w, `{"items":[%s]}`, strings.Join(items, ","))
	})
	srv := httptest.NewServer(mux)
	t.Cleanup(srv.Close)
	return &apiClient{http: srv.Client(), url: srv.URL, token: "t", namespace: "ns"}
}

func TestProbeCluster(t *testing.T) {
	pod := httptest.NewServer(connectivity.Handler("n1"))
	defer pod.Close()
	_, port, err := net.SplitHostPort(pod.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		want  int
		nodes []string
		own   string
		port  string
		err   string
	}{
		"all answer":           {1, []string{"n1"}, "127.0.0.1,::1", port, ""},
		"one is missing":       {2, []string{"n1"}, "127.0.0.1", port, "1 of 2"},
		"no pods at all":       {0, nil, "127.0.0.1", port, "0 of 0"},
		"another node's pod":   {1, []string{"n2"}, "127.0.0.1", port, `it is on "n1"`},
		"seen as another":      {1, []string{"n1"}, "10.244.1.2", port, "sees us as 127.0.0.1"},
		"nobody listens there": {1, []string{"n1"}, "127.0.0.1", "1", "refused"},
	} {
		t.Run(name, func(t *testing.T) {
			var out bytes.Buffer
			ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			defer cancel()
			c := checker{api: fakeAPI(t, tc.want, tc.nodes...), daemonSet: "ds", own: addrs(tc.own), port: tc.port, out: &out}
			// The first pass is under its own deadline, so that a slow machine does not decide.
			err := c.pass(t.Context(), map[string]bool{})
			if tc.err == "" {
				if err != nil || !strings.Contains(out.String(), "pod on n1 at 127.0.0.1: answers") {
					t.Fatalf("%v\n%s", err, out.String())
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), tc.err) {
				t.Errorf("error %v, want %q", err, tc.err)
			}
			if err := c.run(ctx, 10*time.Millisecond); err == nil {
				t.Error("run ends without an error")
			}
		})
	}
}

func TestAddrs(t *testing.T) {
	got := addrs("10.244.1.2,fd00::2,,x")
	if len(got) != 2 || got[0] != netip.MustParseAddr("10.244.1.2") || got[1] != netip.MustParseAddr("fd00::2") {
		t.Errorf("%v", got)
	}
}
