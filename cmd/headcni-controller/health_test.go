package main

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

func TestHealth(t *testing.T) {
	status, body := 200, `{"ready":true,"parts":[{"name":"kubernetes","ok":true},{"name":"leader","ok":false,"error":"cannot reach Headscale"}]}`
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/readyz" {
			t.Errorf("asked for %s", r.URL.Path)
		}
		w.WriteHeader(status)
		_, _ = w.Write([]byte(body))
	}))
	defer s.Close()
	listen := strings.TrimPrefix(s.URL, "http://")
	var out strings.Builder
	if err := health(t.Context(), &out, listen, "text"); err != nil || !strings.Contains(out.String(), "kubernetes ok\nleader     cannot reach Headscale\n") {
		t.Errorf("ready: %v\n%s", err, out.String())
	}
	_, port, _ := strings.Cut(listen, ":")
	if err := health(t.Context(), &out, ":"+port, "text"); err != nil {
		t.Errorf("on all addresses: %v", err)
	}
	status, body = 503, `{"ready":false,"parts":[{"name":"kubernetes","ok":false,"error":"has not read the Nodes yet"}]}`
	if err := health(t.Context(), &out, listen, "text"); err == nil {
		t.Error("not ready, and no error")
	}
	s.Close()
	if err := health(t.Context(), &out, listen, "text"); err == nil || !strings.Contains(err.Error(), "does it run here") {
		t.Errorf("nobody there: %v", err)
	}
}
