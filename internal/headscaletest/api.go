package headscaletest

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Node is a machine, in Headscale's own form. What Headscale makes of it, SubnetRoutes among it, is made when it is asked.
type Node struct {
	ID             uint64         `json:"id,string"`
	MachineKey     string         `json:"machineKey"`
	NodeKey        string         `json:"nodeKey"`
	DiscoKey       string         `json:"discoKey"`
	IPAddresses    []netip.Addr   `json:"ipAddresses"`
	Name           string         `json:"name"`
	User           *User          `json:"user"`
	LastSeen       *time.Time     `json:"lastSeen"`
	Expiry         *time.Time     `json:"expiry"`
	PreAuthKey     *PreAuthKey    `json:"preAuthKey"`
	CreatedAt      time.Time      `json:"createdAt"`
	RegisterMethod string         `json:"registerMethod"`
	GivenName      string         `json:"givenName"`
	Online         bool           `json:"online"`
	Approved       []netip.Prefix `json:"approvedRoutes"`
	Available      []netip.Prefix `json:"availableRoutes"`
	Primary        []netip.Prefix `json:"subnetRoutes"`
	Tags           []string       `json:"tags"`
}

// User owns nodes and keys.
type User struct {
	ID            uint64    `json:"id,string"`
	Name          string    `json:"name"`
	CreatedAt     time.Time `json:"createdAt"`
	DisplayName   string    `json:"displayName"`
	Email         string    `json:"email"`
	ProviderID    string    `json:"providerId"`
	Provider      string    `json:"provider"`
	ProfilePicURL string    `json:"profilePicUrl"`
}

// PreAuthKey is a key that machines join with.
type PreAuthKey struct {
	User       *User      `json:"user"`
	ID         uint64     `json:"id,string"`
	Key        string     `json:"key"`
	Reusable   bool       `json:"reusable"`
	Ephemeral  bool       `json:"ephemeral"`
	Used       bool       `json:"used"`
	Expiration *time.Time `json:"expiration"`
	CreatedAt  time.Time  `json:"createdAt"`
	ACLTags    []string   `json:"aclTags"`

	secret string
}

type apiKey struct {
	ID         uint64     `json:"id,string"`
	Prefix     string     `json:"prefix"`
	Expiration time.Time  `json:"expiration"`
	CreatedAt  time.Time  `json:"createdAt"`
	LastSeen   *time.Time `json:"lastSeen"`

	secret string
}

// Codes of gRPC (google.golang.org/grpc/codes), which the server has in its errors, with the HTTP status of each.
const (
	codeUnknown         = 2
	codeInvalidArgument = 3
	codeNotFound        = 5
	codeInternal        = 13
)

// refusal is an error of the API.
type refusal struct {
	code int
	text string
}

func (r refusal) Error() string { return r.text }

func refuse(code int, format string, args ...any) error {
	return refusal{code, fmt.Sprintf(format, args...)}
}

type object = map[string]any

// routes are the pages of the server. s.mu is held while they are made.
func (s *Server) routes() *http.ServeMux {
	mux := http.NewServeMux()
	mux.HandleFunc("/", http.NotFound)
	mux.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/health+json; charset=utf-8")
		fmt.Fprint(w, `{"status":"pass"}`)
	})
	if s.Since(27) {
		mux.HandleFunc("GET /version", func(w http.ResponseWriter, _ *http.Request) {
			answer(w, http.StatusOK, object{
				"version": fmt.Sprintf("v0.%d.0", s.minor), "commit": "unknown", "buildTime": "unknown", "dirty": false,
				"go": object{"version": "go", "os": "linux", "arch": "amd64"},
			})
		})
	}
	for pattern, do := range map[string]func(*http.Request) (any, error){
		"/api/v1/":                              func(*http.Request) (any, error) { return nil, refuse(codeNotFound, "Not Found") },
		"GET /api/v1/node":                      s.listNodes,
		"GET /api/v1/node/{id}":                 s.getNode,
		"DELETE /api/v1/node/{id}":              s.deleteNode,
		"POST /api/v1/node/{id}/expire":         s.expireNode,
		"POST /api/v1/node/{id}/approve_routes": s.approveRoutes,
		"GET /api/v1/user":                      s.listUsers,
		"POST /api/v1/user":                     s.createUser,
		"GET /api/v1/preauthkey":                s.listKeys,
		"POST /api/v1/preauthkey":               s.createKey,
		"POST /api/v1/preauthkey/expire":        s.expireKey,
		"GET /api/v1/apikey":                    func(*http.Request) (any, error) { return object{"apiKeys": list(s.api)}, nil },
		"GET /api/v1/policy":                    s.getPolicy,
	} {
		mux.HandleFunc(pattern, s.authenticated(do))
	}
	return mux
}

// authenticated answers who has an API key, and nobody else.
func (s *Server) authenticated(do func(*http.Request) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		key := strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")
		if !slices.ContainsFunc(s.api, func(k *apiKey) bool {
			return k.secret == key && (k.Expiration.Year() <= 1970 || k.Expiration.After(s.now()))
		}) {
			status := http.StatusUnauthorized
			if !s.Since(28) {
				status = http.StatusInternalServerError
			}
			w.WriteHeader(status)
			fmt.Fprint(w, "Unauthorized")
			return
		}
		out, err := do(r)
		var no refusal
		switch {
		case err == nil:
			answer(w, http.StatusOK, out)
		case errors.As(err, &no):
			status := map[int]int{codeInvalidArgument: http.StatusBadRequest, codeNotFound: http.StatusNotFound}[no.code]
			if status == 0 {
				status = http.StatusInternalServerError
			}
			answer(w, status, object{"code": no.code, "message": no.text, "details": []any{}})
		default:
			s.t.Errorf("headscaletest: %s %s: %v", r.Method, r.URL, err)
		}
	}
}

func answer(w http.ResponseWriter, status int, out any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(out) // the client may have gone
}

// list is [] in JSON where there is nothing, never null.
func list[T any](l []T) []T {
	if l == nil {
		return []T{}
	}
	return l
}

// decode reads a request's body as strictly as it needs to be.
func decode(r *http.Request, into any) error {
	if err := json.NewDecoder(r.Body).Decode(into); err != nil {
		return refuse(codeInvalidArgument, "%v", err)
	}
	return nil
}

// node finds the machine of a request's path.
func (s *Server) node(r *http.Request) (*Node, error) {
	id, err := strconv.ParseUint(r.PathValue("id"), 10, 64)
	if err != nil {
		return nil, refuse(codeInvalidArgument, "type mismatch, parameter: node_id, error: %v", err)
	}
	if i := slices.IndexFunc(s.nodes, func(n *Node) bool { return n.ID == id }); i >= 0 {
		return s.nodes[i], nil
	}
	return nil, refuse(codeNotFound, "node not found")
}

// change is node for who wants to change the machine. Headscale has another error there.
func (s *Server) change(r *http.Request, code int) (*Node, error) {
	n, err := s.node(r)
	var no refusal
	if errors.As(err, &no) && no.code == codeNotFound {
		return nil, refuse(code, "node no longer exists in NodeStore: %s", r.PathValue("id"))
	}
	return n, err
}

// shown is a machine as the server shows it, owned by a user and with the routes that it is the one for.
func (s *Server) shown(n *Node, owner *User, primary []netip.Prefix) any {
	c := *n
	c.User, c.Approved, c.Available, c.Primary, c.Tags = owner, list(n.Approved), list(n.Available), list(primary), list(n.Tags)
	if k := n.PreAuthKey; k != nil {
		c.PreAuthKey = k.shown()
	}
	if s.Since(28) {
		return c
	}
	return oldNode{Node: c, ForcedTags: []string{}, ValidTags: c.Tags, InvalidTags: []string{}}
}

// oldNode is what a machine was up to 0.27.
type oldNode struct {
	Node
	Tags        any      `json:"tags,omitempty"` // in place of Node's
	ForcedTags  []string `json:"forcedTags"`
	ValidTags   []string `json:"validTags"`
	InvalidTags []string `json:"invalidTags"`
}

// shown is a key without its secret part.
func (k *PreAuthKey) shown() *PreAuthKey {
	c := *k
	if cut := strings.LastIndex(k.Key, "-"); cut > 0 {
		c.Key = k.Key[:cut] + "-***"
	}
	c.ACLTags = list(k.ACLTags)
	return &c
}

func isExit(p netip.Prefix) bool { return p.Bits() == 0 }

// serves are the routes that a machine is the one for: of several the one that had it first.
func (s *Server) serves(n *Node) (routes []netip.Prefix) {
	can := func(n *Node, p netip.Prefix) bool {
		return n.Online && !isExit(p) && slices.Contains(n.Approved, p) && slices.Contains(n.Available, p)
	}
	for _, p := range n.Approved {
		if !can(n, p) {
			continue
		}
		holder := slices.IndexFunc(s.nodes, func(n *Node) bool { return n.ID == s.primary[p] && can(n, p) })
		if holder < 0 {
			holder = slices.IndexFunc(s.nodes, func(n *Node) bool { return can(n, p) })
			s.primary[p] = s.nodes[holder].ID
		}
		if s.primary[p] == n.ID {
			routes = append(routes, p)
		}
	}
	return routes
}

// taggedDevices is who has the machines that have tags.
var taggedDevices = &User{ID: 2147455555, Name: "tagged-devices", DisplayName: "Tagged Devices"}

func (s *Server) listNodes(*http.Request) (any, error) {
	nodes := []any{}
	for _, n := range s.nodes {
		owner, routes := n.User, s.serves(n)
		for _, p := range n.Approved {
			if isExit(p) && slices.Contains(n.Available, p) {
				routes = append(routes, p)
			}
		}
		if len(n.Tags) > 0 && s.Since(28) {
			owner = taggedDevices
		}
		nodes = append(nodes, s.shown(n, owner, routes))
	}
	return object{"nodes": nodes}, nil
}

func (s *Server) getNode(r *http.Request) (any, error) {
	n, err := s.node(r)
	if err != nil {
		return nil, err
	}
	return object{"node": s.shown(n, n.User, nil)}, nil
}

func (s *Server) deleteNode(r *http.Request) (any, error) {
	n, err := s.node(r)
	if err != nil {
		return nil, err
	}
	s.nodes = slices.DeleteFunc(s.nodes, func(o *Node) bool { return o == n })
	return object{}, nil
}

func (s *Server) expireNode(r *http.Request) (any, error) {
	n, err := s.change(r, codeUnknown)
	if err != nil {
		return nil, err
	}
	now := s.now().UTC()
	n.Expiry = &now
	if s.Since(29) && r.URL.Query().Get("disableExpiry") == "true" {
		n.Expiry = nil
	}
	return object{"node": s.shown(n, n.User, nil)}, nil
}

func (s *Server) approveRoutes(r *http.Request) (any, error) {
	var in struct{ Routes []string }
	if err := decode(r, &in); err != nil {
		return nil, err
	}
	var approved []netip.Prefix
	for _, text := range in.Routes {
		p, err := netip.ParsePrefix(text)
		if err != nil {
			return nil, refuse(codeUnknown, "parsing route: %v", err)
		}
		if isExit(p) { // one stands for both
			approved = append(approved, netip.PrefixFrom(netip.IPv4Unspecified(), 0), netip.PrefixFrom(netip.IPv6Unspecified(), 0))
			continue
		}
		approved = append(approved, p)
	}
	slices.SortFunc(approved, netip.Prefix.Compare)
	n, err := s.change(r, codeInvalidArgument)
	if err != nil {
		return nil, err
	}
	n.Approved = slices.Compact(approved)
	return object{"node": s.shown(n, n.User, s.serves(n))}, nil
}

func (s *Server) listUsers(r *http.Request) (any, error) {
	users := []*User{}
	for _, u := range s.users {
		if name := r.URL.Query().Get("name"); name == "" || name == u.Name {
			users = append(users, u)
		}
	}
	return object{"users": users}, nil
}

func (s *Server) createUser(r *http.Request) (any, error) {
	var in struct{ Name string }
	if err := decode(r, &in); err != nil {
		return nil, err
	}
	if slices.ContainsFunc(s.users, func(u *User) bool { return u.Name == in.Name }) {
		return nil, refuse(codeInternal, "creating user: creating user: constraint failed: UNIQUE constraint failed: users.name (2067)")
	}
	u := &User{ID: uint64(len(s.users) + 1), Name: in.Name, CreatedAt: s.now().UTC()}
	s.users = append(s.users, u)
	return object{"user": u}, nil
}

func (s *Server) listKeys(*http.Request) (any, error) {
	keys := []*PreAuthKey{}
	for _, k := range s.keys {
		keys = append(keys, k.shown())
	}
	return object{"preAuthKeys": keys}, nil
}

func (s *Server) createKey(r *http.Request) (any, error) {
	var in struct {
		User                uint64 `json:",string"`
		Reusable, Ephemeral bool
		Expiration          *time.Time
		ACLTags             []string
	}
	if err := decode(r, &in); err != nil {
		return nil, err
	}
	for _, tag := range in.ACLTags {
		if !strings.HasPrefix(tag, "tag:") {
			return nil, refuse(codeInvalidArgument, "tag must start with the string 'tag:'")
		}
	}
	k := &PreAuthKey{
		ID: uint64(len(s.keys) + 1), Reusable: in.Reusable, Ephemeral: in.Ephemeral, Expiration: in.Expiration, CreatedAt: s.now().UTC(),
		ACLTags: list(in.ACLTags), Key: "hskey-auth-" + random(12) + "-" + random(64),
	}
	switch i := slices.IndexFunc(s.users, func(u *User) bool { return u.ID == in.User }); {
	case i >= 0:
		k.User = s.users[i]
	case in.User != 0 || !s.Since(28):
		return nil, refuse(codeUnknown, "user not found")
	case len(in.ACLTags) == 0:
		return nil, refuse(codeUnknown, "auth-key must be either tagged or owned by user")
	}
	if !s.Since(28) {
		k.Key = random(48)
	}
	k.secret = k.Key
	s.keys = append(s.keys, k)
	return object{"preAuthKey": k}, nil
}

func (s *Server) expireKey(r *http.Request) (any, error) {
	var in struct {
		ID, User uint64 `json:",string"`
		Key      string
	}
	if err := decode(r, &in); err != nil {
		return nil, err
	}
	now := s.now().UTC()
	for _, k := range s.keys {
		if s.Since(28) && k.ID == in.ID || !s.Since(28) && k.secret == in.Key {
			k.Expiration = &now
			return object{}, nil
		}
	}
	return nil, refuse(codeUnknown, "record not found")
}

func (s *Server) getPolicy(*http.Request) (any, error) {
	if s.policy == "" {
		return nil, refuse(codeUnknown, "loading ACL from database: acl policy not found")
	}
	return object{"policy": s.policy, "updatedAt": s.changed}, nil
}
