package headscale

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/headcni/headcni/pkg/config/secret"
)

// ID is a number that Headscale's JSON has as a string.
type ID uint64

// UnmarshalJSON takes a string or a number.
func (i *ID) UnmarshalJSON(b []byte) error {
	s := strings.Trim(string(b), `"`)
	if s == "" || s == "null" {
		return nil
	}
	n, err := strconv.ParseUint(s, 10, 64)
	*i = ID(n)
	return err
}

// MarshalJSON writes a string.
func (i ID) MarshalJSON() ([]byte, error) { return json.Marshal(i.String()) }

func (i ID) String() string { return strconv.FormatUint(uint64(i), 10) }

// Node is a machine of the tailnet.
type Node struct {
	ID ID
	// Name is the name in MagicDNS, Hostname what the machine calls itself.
	Name, Hostname string
	// NodeKey is nodekey:<hex>, as tailscaled's status has it.
	NodeKey  string
	User     string
	IPs      []netip.Addr
	Tags     []string
	Online   bool
	LastSeen time.Time
	Created  time.Time
	// Expiry is the zero time where the key never expires.
	Expiry time.Time
	// Approved routes may be used, Available ones are advertised, Primary ones are those that peers use now.
	Approved, Available, Primary []netip.Prefix
	// Method of registration, such as REGISTER_METHOD_AUTH_KEY, and the number of the key, 0 where it joined without one.
	Method string
	Key    ID
}

// wireNode is the server's node. Up to 0.27 the tags were in three lists.
type wireNode struct {
	ID                                            ID
	Name, GivenName, NodeKey                      string
	User                                          struct{ Name string }
	IPAddresses                                   []netip.Addr
	Tags, ForcedTags, ValidTags                   []string
	Online                                        bool
	LastSeen, Expiry, CreatedAt                   *time.Time
	ApprovedRoutes, AvailableRoutes, SubnetRoutes []netip.Prefix
	RegisterMethod                                string
	PreAuthKey                                    *struct{ ID ID }
}

// node converts the server's node. It fails where a field that every node has is missing.
func (w wireNode) node() (Node, error) {
	if w.ID == 0 || !strings.HasPrefix(w.NodeKey, nodeKeyPrefix) {
		return Node{}, fmt.Errorf("node %q (%s) has no number or no node key", w.GivenName, w.ID)
	}
	n := Node{
		ID: w.ID, Name: w.GivenName, Hostname: w.Name, NodeKey: w.NodeKey, User: w.User.Name, IPs: w.IPAddresses,
		Tags: slices.Concat(w.Tags, w.ForcedTags, w.ValidTags), Online: w.Online,
		LastSeen: timeOf(w.LastSeen), Expiry: timeOf(w.Expiry), Created: timeOf(w.CreatedAt),
		Approved: w.ApprovedRoutes, Available: w.AvailableRoutes, Primary: w.SubnetRoutes, Method: w.RegisterMethod,
	}
	if w.PreAuthKey != nil {
		n.Key = w.PreAuthKey.ID
	}
	slices.Sort(n.Tags)
	n.Tags = slices.Compact(n.Tags)
	return n, nil
}

// nodeKeyPrefix begins every node key.
const nodeKeyPrefix = "nodekey:"

// timeOf maps the ways to say "never" to the zero time.
func timeOf(t *time.Time) time.Time {
	if t == nil || t.Year() <= 1970 {
		return time.Time{}
	}
	return *t
}

// MaxSkew is how far clocks may be apart, the server's and the nodes', before keys and certificates seem to have ended.
const MaxSkew = time.Minute

// Health is what the server tells without a key.
type Health struct {
	// Version is "" before 0.27.
	Version string
	// Skew is the server's clock minus ours, give or take a second.
	Skew time.Duration
}

// Health asks whether the server is up. It needs no key.
func (c *Client) Health(ctx context.Context) (Health, error) {
	var h Health
	var status string
	err := c.do(ctx, call{method: "GET", path: "/health", field: "status", out: &status, skew: &h.Skew})
	if err == nil && status != "pass" {
		err = c.unexpected(fmt.Errorf("it says of its health %q", status)) // one that is not well answers 500
	}
	if err != nil {
		return h, fmt.Errorf("check Headscale: %w", err)
	}
	err = c.do(ctx, call{method: "GET", path: "/version", field: "version", out: &h.Version})
	if errors.Is(err, ErrUnreachable) || ctx.Err() != nil {
		return h, fmt.Errorf("check Headscale: %w", err)
	}
	return h, nil // a server without the page is no less healthy
}

// Kind says what a key can be used for.
type Kind string

// Kinds of keys.
const (
	KindAPI     Kind = "API key"
	KindPreAuth Kind = "pre-auth key"
)

// KindByPrefix tells the kind by the prefixes that Headscale has given since 0.28 (and Tailscale always). ok is false
// where only the server can tell.
func KindByPrefix(key secret.Secret) (kind Kind, ok bool) {
	for prefix, k := range map[string]Kind{
		"hskey-api-": KindAPI, "hskey-auth-": KindPreAuth, "tskey-api-": KindAPI, "tskey-auth-": KindPreAuth,
	} {
		if strings.HasPrefix(key.Reveal(), prefix) {
			return k, true
		}
	}
	return "", false
}

// Kind tells whether the client's key is an API key: by its prefix, else by trying it. A key that the server does not
// take as an API key and that has the form of one (prefix, dot, secret) is wrong or expired: ErrUnauthorized.
func (c *Client) Kind(ctx context.Context) (Kind, error) {
	if k, ok := KindByPrefix(c.key); ok {
		return k, nil
	}
	_, err := c.APIKeys(ctx)
	switch {
	case err == nil:
		return KindAPI, nil
	case errors.Is(err, ErrUnauthorized) && !strings.Contains(c.key.Reveal(), "."):
		return KindPreAuth, nil
	}
	return "", fmt.Errorf("find out what kind of key this is: %w", err)
}

// Nodes lists all nodes.
func (c *Client) Nodes(ctx context.Context) ([]Node, error) {
	var list []wireNode
	err := c.do(ctx, call{method: "GET", path: "/api/v1/node", field: "nodes", out: &list, list: true})
	nodes := make([]Node, 0, len(list))
	known := map[ID]bool{}
	for _, w := range list {
		if err != nil {
			break
		}
		var n Node
		if n, err = w.node(); err == nil && known[n.ID] {
			err = fmt.Errorf("node %s is listed twice", n.ID)
		}
		if err != nil {
			err = c.unexpected(err)
		}
		known[n.ID] = true
		nodes = append(nodes, n)
	}
	if err != nil {
		return nil, fmt.Errorf("list Headscale's nodes: %w", err)
	}
	return nodes, nil
}

// Node reads one node. ErrNotFound.
func (c *Client) Node(ctx context.Context, id ID) (Node, error) {
	n, err := c.node(ctx, id, call{method: "GET", path: nodePath(id)})
	return n, wrap(err, "read node %s from Headscale", id)
}

// node makes a call that the server answers with the node that it is about.
func (c *Client) node(ctx context.Context, id ID, req call) (Node, error) {
	var w wireNode
	req.field, req.out = "node", &w
	if err := c.do(ctx, req); err != nil {
		return Node{}, err
	}
	n, err := w.node()
	if err == nil && n.ID != id {
		err = fmt.Errorf("asked about node %s, it speaks of node %s", id, n.ID)
	}
	if err != nil {
		return Node{}, c.unexpected(err)
	}
	return n, nil
}

// NodeByKey finds the node with a node key as tailscaled's status has it. ErrNotFound: it was deleted there.
func (c *Client) NodeByKey(ctx context.Context, nodeKey string) (Node, error) {
	nodes, err := c.Nodes(ctx)
	if err != nil {
		return Node{}, err
	}
	for _, n := range nodes {
		if nodeKey != "" && n.NodeKey == nodeKey {
			return n, nil
		}
	}
	return Node{}, fmt.Errorf("find the node with key %.20s...: %w", nodeKey, ErrNotFound)
}

func nodePath(id ID) string { return "/api/v1/node/" + id.String() }

// ApproveRoutes approves the own prefixes as routes of a node that Nodes or Node returned, and takes the stale ones back. All other
// approved routes stay. It reports whether it changed something. ErrNotFound.
//
// The server knows only the whole set, so this is read, merge, write: a change by somebody else in between is lost, as
// with every client.
func (c *Client) ApproveRoutes(ctx context.Context, of Node, own, stale []netip.Prefix) (changed bool, err error) {
	n, err := c.readAgain(ctx, of)
	if err != nil {
		return false, err
	}
	want, changed := mergeRoutes(n.Approved, own, stale)
	if !changed {
		return false, nil
	}
	n, err = c.node(ctx, of.ID, call{method: "POST", path: nodePath(of.ID) + "/approve_routes", body: map[string]any{"routes": want}})
	if err != nil {
		return false, fmt.Errorf("approve %v for node %s: %w", own, of.ID, err)
	}
	for _, p := range own {
		if !slices.Contains(n.Approved, p) {
			return true, fmt.Errorf("approve %v for node %s: Headscale took the request and approved only %v", own, n.Name, n.Approved)
		}
	}
	return true, nil
}

// readAgain reads a node once more before it is changed: what the list of nodes said of it may be wrong or old.
func (c *Client) readAgain(ctx context.Context, of Node) (Node, error) {
	n, err := c.Node(ctx, of.ID)
	if err == nil && n.NodeKey != of.NodeKey {
		err = fmt.Errorf("node %s has another node key than before: it is left alone", of.ID)
	}
	return n, err
}

// mergeRoutes is (have without stale) with own. It does no I/O.
func mergeRoutes(have, own, stale []netip.Prefix) ([]netip.Prefix, bool) {
	out := []netip.Prefix{} // [] in JSON, never null
	for _, p := range have {
		if slices.Contains(own, p) || !slices.Contains(stale, p) {
			out = append(out, p)
		}
	}
	for _, p := range own {
		if !slices.Contains(out, p) {
			out = append(out, p)
		}
	}
	return out, !slices.Equal(out, have)
}

// DeleteNode removes a node that Nodes or Node returned. ErrNotFound where it is gone.
//
// Its routes are taken from it first: to 0.27 and 0.28 a node that was connected when it was deleted stays the one that
// serves them, and no other gets them until the server is restarted.
func (c *Client) DeleteNode(ctx context.Context, of Node) error {
	n, err := c.readAgain(ctx, of)
	if err == nil && len(n.Approved) > 0 {
		_, err = c.ApproveRoutes(ctx, n, nil, n.Approved)
	}
	if err != nil {
		return fmt.Errorf("delete node %s: %w", of.ID, err)
	}
	return wrap(c.do(ctx, call{method: "DELETE", path: nodePath(of.ID)}), "delete node %s", of.ID)
}

// DisableExpiry makes a node's key valid for ever, even one that has expired. It needs 0.29: an older server would expire the node
// instead, so there it returns an error.
func (c *Client) DisableExpiry(ctx context.Context, id ID) error {
	h, err := c.Health(ctx)
	if err != nil {
		return err
	}
	if !atLeast(h.Version, 0, 29) {
		return fmt.Errorf("disable the key expiry of node %s: Headscale %s cannot; tag the node instead (headscale nodes tag), or upgrade to 0.29", id, h.Version)
	}
	err = c.do(ctx, call{method: "POST", path: nodePath(id) + "/expire?disableExpiry=true"})
	return wrap(err, "disable the key expiry of node %s", id)
}

// Tried reports whether HeadCNI was run with this version of Headscale, or with one between two of which it was: 0.26 to 0.29. What it does with
// others is not known. "" is 0.26, which does not say; older ones have another API.
func Tried(version string) bool {
	return version == "" || atLeast(version, 0, 26) && !atLeast(version, 0, 30)
}

// atLeast compares a version such as v0.29.3. A version that cannot be read is that of a development build and counts as new.
func atLeast(version string, major, minor int) bool {
	if version == "" {
		return false
	}
	var a, b int
	if n, _ := fmt.Sscanf(strings.TrimPrefix(version, "v"), "%d.%d", &a, &b); n != 2 {
		return true
	}
	return a > major || a == major && b >= minor
}

// Policy reads the policy's HuJSON text. ErrNotFound where there is none.
func (c *Client) Policy(ctx context.Context) (string, error) {
	var text string
	err := c.do(ctx, call{method: "GET", path: "/api/v1/policy", field: "policy", out: &text})
	var e *Error
	if errors.As(err, &e) && strings.Contains(e.Message, "policy not found") {
		e.kind = ErrNotFound
	}
	if err != nil {
		return "", fmt.Errorf("read Headscale's policy: %w", err)
	}
	return text, nil
}

// APIKey is the description of an API key, without its secret.
type APIKey struct {
	ID         ID
	Prefix     string
	Expiration time.Time
	CreatedAt  time.Time
}

// APIKeys lists the API keys. The client's own is the one whose prefix it begins with; see OwnAPIKey.
func (c *Client) APIKeys(ctx context.Context) ([]APIKey, error) {
	var keys []APIKey
	if err := c.do(ctx, call{method: "GET", path: "/api/v1/apikey", field: "apiKeys", out: &keys, list: true}); err != nil {
		return nil, fmt.Errorf("list Headscale's API keys: %w", err)
	}
	return keys, nil
}

// OwnAPIKey finds the description of the client's own key, for its expiration. ErrNotFound.
func (c *Client) OwnAPIKey(ctx context.Context) (APIKey, error) {
	keys, err := c.APIKeys(ctx)
	if err != nil {
		return APIKey{}, err
	}
	// 0.28 lists hskey-api-<12 characters>-***, older versions the part before the dot.
	for _, k := range keys {
		if p := strings.TrimSuffix(k.Prefix, "***"); p != "" && strings.HasPrefix(c.key.Reveal(), p) {
			return k, nil
		}
		if p := "hskey-api-" + k.Prefix; k.Prefix != "" && strings.HasPrefix(c.key.Reveal(), p) {
			return k, nil
		}
	}
	return APIKey{}, fmt.Errorf("find the own API key: %w", ErrNotFound)
}

func wrap(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf(format+": %w", append(args, err)...)
}

// StarCoversRoutes tells whether * in a policy's rules means every address, as it did up to 0.28; since 0.29 it means
// those of the tailnet's own nodes. A server that does not tell its version is older than 0.27.
func StarCoversRoutes(version string) bool { return !atLeast(version, 0, 29) }
