package headscaletest

import (
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
)

// Fault answers a request in the server's place, or delays it. It reports whether it has answered.
type Fault func(w http.ResponseWriter, r *http.Request) bool

// Break has all requests from now on meet a fault; nil mends the server.
func (s *Server) Break(f Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fault = f
}

// Answer answers everything with a status and a body.
func Answer(status int, body string) Fault {
	return func(w http.ResponseWriter, _ *http.Request) bool {
		w.WriteHeader(status)
		fmt.Fprint(w, body)
		return true
	}
}

// Refuse answers as Headscale does to a wrong key.
func Refuse() Fault { return Answer(http.StatusUnauthorized, "Unauthorized") }

// First has the first n requests meet a fault, and no others.
func First(n int32, f Fault) Fault {
	var had atomic.Int32
	return func(w http.ResponseWriter, r *http.Request) bool { return had.Add(1) <= n && f(w, r) }
}

// At has requests meet a fault whose method and path begin with prefix, such as "GET /api/v1/node".
func At(prefix string, f Fault) Fault {
	return func(w http.ResponseWriter, r *http.Request) bool {
		return strings.HasPrefix(r.Method+" "+r.URL.RequestURI(), prefix) && f(w, r)
	}
}

// Except has all other requests meet a fault.
func Except(prefix string, f Fault) Fault {
	return func(w http.ResponseWriter, r *http.Request) bool {
		return !strings.HasPrefix(r.Method+" "+r.URL.RequestURI(), prefix) && f(w, r)
	}
}
