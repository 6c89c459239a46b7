// Package headscaletest stands in for Headscale where a test needs more nodes, older versions or other faults than a real
// one is cheap for: the part of its REST API that pkg/headscale uses, over nodes, keys, users and a policy.
//
// TestAnswersLikeHeadscale holds it against a real server, request by request; pkg/headscale walks through both.
package headscaletest

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// Newest is the newest minor version that the server imitates: 0.29. Older ones go down to 0.26.
const Newest = 29

// Server is a running stand-in. Its methods may be called from several goroutines.
type Server struct {
	// URL of the server.
	URL string

	t     testing.TB
	minor int
	mux   *http.ServeMux
	http  *httptest.Server

	mu      sync.Mutex
	fault   Fault
	calls   []Call
	now     func() time.Time
	last    uint64 // number that was given to a node
	nodes   []*Node
	users   []*User
	keys    []*PreAuthKey
	api     []*apiKey
	policy  string
	changed time.Time // of the policy
	primary map[netip.Prefix]uint64
}

// Call is a request that the server has had, whether it was answered well or not.
type Call struct {
	// Method and Path, with the query, such as POST and /api/v1/node/1/expire?disableExpiry=true.
	Method, Path string
	Body         string
}

// New starts a server of the newest version, which ends with the test.
func New(t testing.TB) *Server { return NewVersion(t, Newest) }

// NewVersion starts a server that differs from the newest where Headscale 0.<minor> does and pkg/headscale minds: what keys
// look like, who has to own one, what a wrong one is told, the lists of tags, and what is missing.
func NewVersion(t testing.TB, minor int) *Server {
	t.Helper()
	s := &Server{t: t, minor: minor, now: time.Now, primary: map[netip.Prefix]uint64{}}
	s.mux = s.routes()
	s.http = httptest.NewServer(s)
	s.URL = s.http.URL
	t.Cleanup(func() { s.http.Close() })
	return s
}

// Since reports whether it answers as Headscale 0.<minor> or later.
func (s *Server) Since(minor int) bool { return s.minor >= minor }

// Kill ends the server: nobody answers at its URL.
func (s *Server) Kill() {
	s.http.CloseClientConnections()
	s.http.Close()
}

// Start starts the server again, at the same URL, with what it had.
func (s *Server) Start() {
	s.t.Helper()
	l, err := net.Listen("tcp", strings.TrimPrefix(s.URL, "http://"))
	if err != nil {
		s.t.Fatal(err)
	}
	s.http = &httptest.Server{Listener: l, Config: &http.Server{Handler: s}}
	s.http.Start()
}

// ServeHTTP implements http.Handler, for a server of the test's own.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return // the client has gone
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	s.mu.Lock()
	s.calls = append(s.calls, Call{Method: r.Method, Path: r.URL.RequestURI(), Body: string(body)})
	fault := s.fault
	s.mu.Unlock()
	if fault != nil && fault(w, r) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mux.ServeHTTP(w, r)
}

// SetClock has the server read another clock, by which its keys expire.
func (s *Server) SetClock(now func() time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.now = now
}

// Calls are those that the server has had so far and whose method and path begin with prefix, such as "POST /api/v1/node/".
func (s *Server) Calls(prefix string) []Call {
	s.mu.Lock()
	defer s.mu.Unlock()
	var calls []Call
	for _, c := range s.calls {
		if strings.HasPrefix(c.Method+" "+c.Path, prefix) {
			calls = append(calls, c)
		}
	}
	return calls
}

// APIKey makes an API key that is valid for a day.
func (s *Server) APIKey() string { return s.APIKeyUntil(s.clock().Add(24 * time.Hour)) }

// APIKeyUntil makes an API key that expires then.
func (s *Server) APIKeyUntil(expires time.Time) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := &apiKey{ID: uint64(len(s.api) + 1), Expiration: expires.UTC(), CreatedAt: s.now().UTC()}
	if s.minor >= 28 {
		id := random(12)
		k.secret, k.Prefix = "hskey-api-"+id+"-"+random(64), "hskey-api-"+id+"-***"
	} else {
		k.Prefix = random(7)
		k.secret = k.Prefix + "." + random(32)
	}
	s.api = append(s.api, k)
	return k.secret
}

// SetPolicy replaces the policy; "" is none. It is not checked.
func (s *Server) SetPolicy(text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.policy, s.changed = text, s.now().UTC()
}

// AddUser adds a user.
func (s *Server) AddUser(name string) User {
	s.mu.Lock()
	defer s.mu.Unlock()
	u := &User{ID: uint64(len(s.users) + 1), Name: name, CreatedAt: s.now().UTC()}
	s.users = append(s.users, u)
	return *u
}

// AddNode adds a machine as it is, but for what no machine is without: a number, a time, addresses and names.
func (s *Server) AddNode(n Node) Node {
	s.mu.Lock()
	defer s.mu.Unlock()
	return *s.add(n)
}

func (s *Server) add(n Node) *Node {
	if n.ID == 0 {
		n.ID = s.last + 1
	}
	s.last = max(s.last, n.ID)
	if n.GivenName == "" {
		n.GivenName = fmt.Sprintf("node-%d", n.ID)
	}
	if n.Name == "" {
		n.Name = n.GivenName
	}
	if n.RegisterMethod == "" {
		n.RegisterMethod = "REGISTER_METHOD_AUTH_KEY"
	}
	if n.CreatedAt.IsZero() {
		n.CreatedAt = s.now().UTC()
	}
	if len(n.IPAddresses) == 0 {
		n.IPAddresses = []netip.Addr{netip.MustParseAddr(fmt.Sprintf("100.64.%d.%d", n.ID/256, n.ID%256)), netip.MustParseAddr(fmt.Sprintf("fd7a:115c:a1e0::%x", n.ID))}
	}
	for prefix, key := range map[string]*string{"mkey:": &n.MachineKey, "nodekey:": &n.NodeKey, "discokey:": &n.DiscoKey} {
		if *key == "" {
			*key = prefix + random(64)
		}
	}
	s.nodes = append(s.nodes, &n)
	slices.SortFunc(s.nodes, func(a, b *Node) int { return int(a.ID) - int(b.ID) })
	return &n
}

// Join adds a machine that joins with a pre-auth key, as `tailscale up` would have it: it advertises routes, none of which
// is approved, and is online. An error is what the machine is told.
func (s *Server) Join(key, hostname string, routes ...netip.Prefix) (Node, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := slices.IndexFunc(s.keys, func(k *PreAuthKey) bool { return k.secret == key })
	if i < 0 {
		return Node{}, fmt.Errorf("invalid pre auth key")
	}
	k := s.keys[i]
	switch {
	case k.Expiration != nil && k.Expiration.Before(s.now()):
		return Node{}, fmt.Errorf("authkey expired")
	case k.Used && !k.Reusable:
		return Node{}, fmt.Errorf("authkey already used")
	}
	k.Used = !k.Reusable
	now := s.now().UTC()
	n := s.add(Node{Name: hostname, GivenName: hostname, PreAuthKey: k, User: k.User, Tags: k.ACLTags, Online: true, LastSeen: &now, Available: routes})
	return *n, nil
}

// Nodes are copies of all machines, by number.
func (s *Server) Nodes() []Node {
	s.mu.Lock()
	defer s.mu.Unlock()
	var nodes []Node
	for _, n := range s.nodes {
		nodes = append(nodes, *n)
	}
	return nodes
}

func (s *Server) clock() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.now()
}

// random is n characters that nobody guesses.
func random(n int) string {
	const letters = "0123456789abcdef"
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails (crypto/rand)
	for i := range b {
		b[i] = letters[b[i]%16]
	}
	return string(b)
}
