package headscale

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/headcni/headcni/internal/headscaletest"
	"github.com/headcni/headcni/internal/realparts"
	"github.com/headcni/headcni/pkg/config/secret"
)

var prefixEqual = cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })

func prefixes(s ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, p := range s {
		out = append(out, netip.MustParsePrefix(p))
	}
	return out
}

func client(t *testing.T, url, key string) *Client {
	t.Helper()
	c, err := New(Options{URL: url, Key: secret.New(key)})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// server is a Headscale to walk through.
type server interface {
	Since(minor int) bool
	APIKey() string
	Kill()
	Start()
}

// walked is a server, and machines that join it.
type walked struct {
	server
	url string
	// join has another machine join that advertises routes, and returns its node key.
	join func(key, hostname, routes string) string
}

// TestRealServer walks through the API of a real Headscale with real nodes.
func TestRealServer(t *testing.T) {
	w := realparts.New(t, 10*time.Millisecond)
	walk(t, walked{w, w.URL, func(key, hostname, routes string) string {
		d := w.Node()
		d.CLI("up", "--login-server="+w.URL, "--auth-key="+key, "--hostname="+hostname, "--advertise-routes="+routes)
		var st struct{ Self struct{ PublicKey string } }
		if err := json.Unmarshal([]byte(d.CLI("status", "--json", "--peers=false")), &st); err != nil {
			t.Fatal(err)
		}
		return st.Self.PublicKey
	}})
}

// TestStandIn holds the stand-in of other tests, in all its versions, to what a real server does.
func TestStandIn(t *testing.T) {
	for minor := 26; minor <= headscaletest.Newest; minor++ {
		t.Run(fmt.Sprintf("0.%d", minor), func(t *testing.T) {
			s := headscaletest.NewVersion(t, minor)
			walk(t, walked{s, s.URL, func(key, hostname, routes string) string {
				n, err := s.Join(key, hostname, prefixes(strings.Split(routes, ",")...)...)
				if err != nil {
					t.Fatal(err)
				}
				return n.NodeKey
			}})
		})
	}
}

// walk goes through all that the client can do.
func walk(t *testing.T, w walked) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	apiKey := w.APIKey()
	c := client(t, w.url+"/", apiKey)

	h, err := c.Health(ctx)
	if err != nil || strings.HasPrefix(h.Version, "v0.") != w.Since(27) || h.Skew.Abs() > 2*time.Second {
		t.Errorf("health: %+v, %v", h, err)
	}
	if got := !StarCoversRoutes(h.Version); got != w.Since(29) {
		t.Errorf("0.29 or later by %q: %v", h.Version, got)
	}
	if _, err := client(t, w.url, "").Health(ctx); err != nil {
		t.Errorf("health without a key: %v", err)
	}

	made, err := c.CreatePreAuthKey(ctx, PreAuthKeyRequest{Tags: []string{"tag:headcni"}, Reusable: true, Expiration: time.Now().Add(time.Hour)})
	if err != nil || made.Key.Empty() {
		t.Fatalf("make a key: %+v, %v", made, err)
	}
	t.Run("kinds", func(t *testing.T) { testKinds(t, ctx, w.url, apiKey, made.Key.Reveal()) })

	nodeKey := w.join(made.Key.Reveal(), "one", "10.244.1.0/24,fd00:244:1::/64,192.168.7.0/24,0.0.0.0/0,::/0")
	n, err := c.NodeByKey(ctx, nodeKey)
	if err != nil {
		t.Fatal(err)
	}
	if n.Name != "one" || !slices.Equal(n.Tags, []string{"tag:headcni"}) || len(n.IPs) != 2 || !n.Online || !n.Expiry.IsZero() ||
		n.Created.IsZero() || len(n.Available) != 5 || len(n.Approved) != 0 || n.Method != "REGISTER_METHOD_AUTH_KEY" {
		t.Errorf("node: %+v", n)
	}
	t.Run("approve", func(t *testing.T) { testApprove(t, ctx, c, n) })
	t.Run("keys", func(t *testing.T) { testListedKey(t, ctx, c, made, n) })
	own, err := c.OwnAPIKey(ctx)
	if left := time.Until(own.Expiration); err != nil || left < 23*time.Hour || left > 25*time.Hour {
		t.Errorf("own API key: %+v, %v", own, err)
	}
	t.Run("policy", func(t *testing.T) {
		if _, err := c.Policy(ctx); !errors.Is(err, ErrNotFound) {
			t.Errorf("no policy yet: %v", err)
		}
	})

	if err := c.DisableExpiry(ctx, n.ID); w.Since(29) && err != nil || !w.Since(29) && (err == nil || !strings.Contains(err.Error(), "upgrade to 0.29")) {
		t.Error(err)
	}
	if got, err := c.Node(ctx, n.ID); err != nil || got.Name != "one" || !got.Expiry.IsZero() {
		t.Errorf("by its number: %+v, %v", got, err)
	}
	if err := c.DeleteNode(ctx, n); err != nil {
		t.Error(err)
	}
	gone := map[string]error{
		"delete twice": c.DeleteNode(ctx, n),
		"by key":       second(c.NodeByKey(ctx, nodeKey)),
		"read":         second(c.Node(ctx, n.ID)),
		"approve":      second(c.ApproveRoutes(ctx, n, prefixes("10.244.1.0/24"), nil)),
	}
	if w.Since(29) {
		gone["expiry"] = c.DisableExpiry(ctx, n.ID)
	}
	for what, err := range gone {
		if !errors.Is(err, ErrNotFound) {
			t.Errorf("%s of a deleted node: %v", what, err)
		}
	}

	t.Run("heir", func(t *testing.T) { testHeir(t, ctx, w, c, made) })

	w.Kill()
	if _, err := c.Nodes(ctx); !errors.Is(err, ErrUnreachable) || !strings.Contains(err.Error(), "headscale.url") {
		t.Errorf("dead server: %v", err)
	}
	// It comes back while we retry.
	started := make(chan error, 1)
	go func() { _, err := c.Nodes(ctx); started <- err }()
	w.Start()
	if err := <-started; err != nil {
		t.Errorf("server that comes back: %v", err)
	}
}

func second[T any](_ T, err error) error { return err }

// testHeir: another node gets a route of the deleted one, which was connected.
func testHeir(t *testing.T, ctx context.Context, w walked, c *Client, key PreAuthKey) {
	const route = "192.168.7.0/24"
	w.join(key.Key.Reveal(), "heir", route)
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(200 * time.Millisecond) {
		nodes, err := c.Nodes(ctx)
		if err != nil || len(nodes) != 1 {
			t.Fatalf("%+v, %v", nodes, err)
		}
		if slices.Contains(nodes[0].Primary, netip.MustParsePrefix(route)) {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("the heir has no route: %+v", nodes[0])
		}
		if _, err := c.ApproveRoutes(ctx, nodes[0], prefixes(route), nil); err != nil {
			t.Fatal(err)
		}
	}
}

func testKinds(t *testing.T, ctx context.Context, url, apiKey, authKey string) {
	for name, tt := range map[string]struct {
		key  string
		want Kind
		err  error
	}{
		"API key":               {apiKey, KindAPI, nil},
		"pre-auth key":          {authKey, KindPreAuth, nil},
		"form of before 0.28":   {"0123456789abcdef0123456789abcdef0123456789abcdef", KindPreAuth, nil},
		"old API key, unknown":  {"abcdefg.0123456789abcdef0123456789abcdef", "", ErrUnauthorized},
		"API key of elsewhere":  {"hskey-api-000000000000-" + strings.Repeat("0", 64), KindAPI, nil},
		"Tailscale's auth key":  {"tskey-auth-x", KindPreAuth, nil},
		"nothing recognisable1": {"hunter2", KindPreAuth, nil},
	} {
		c := client(t, url, tt.key)
		got, err := c.Kind(ctx)
		if got != tt.want || !errors.Is(err, tt.err) || err != nil && strings.Contains(err.Error(), tt.key) {
			t.Errorf("%s: %v, %v", name, got, err)
		}
		if _, err := c.Nodes(ctx); tt.key != apiKey && (!errors.Is(err, ErrUnauthorized) || strings.Contains(err.Error(), tt.key)) {
			t.Errorf("nodes by %s: %v", name, err)
		}
	}
}

func testApprove(t *testing.T, ctx context.Context, c *Client, node Node) {
	approved := func() []netip.Prefix {
		t.Helper()
		n, err := c.Node(ctx, node.ID)
		if err != nil {
			t.Fatal(err)
		}
		slices.SortFunc(n.Approved, netip.Prefix.Compare)
		return n.Approved
	}
	step := func(what string, own, stale []netip.Prefix, wantChange bool, want ...string) {
		t.Helper()
		changed, err := c.ApproveRoutes(ctx, node, own, stale)
		if err != nil || changed != wantChange {
			t.Errorf("%s: %v, %v", what, changed, err)
		}
		if diff := cmp.Diff(prefixes(want...), approved(), prefixEqual); diff != "" {
			t.Errorf("%s:\n%s", what, diff)
		}
	}
	own := prefixes("10.244.1.0/24", "fd00:244:1::/64")
	step("ours only, not the LAN nor the exit", own, nil, true, "10.244.1.0/24", "fd00:244:1::/64")
	step("again", own, nil, false, "10.244.1.0/24", "fd00:244:1::/64")
	if _, err := c.ApproveRoutes(ctx, node, prefixes("192.168.7.0/24", "0.0.0.0/0"), nil); err != nil { // as an administrator would
		t.Fatal(err)
	}
	foreign := []string{"0.0.0.0/0", "192.168.7.0/24", "::/0"}
	step("foreign ones stay", own, nil, false, "0.0.0.0/0", "10.244.1.0/24", "192.168.7.0/24", "::/0", "fd00:244:1::/64")
	step("moved", prefixes("10.244.9.0/24"), own, true, "0.0.0.0/0", "10.244.9.0/24", "192.168.7.0/24", "::/0")
	step("gone", nil, prefixes("10.244.9.0/24"), true, foreign...)
}

// testListedKey: the server has the pre-auth key as it was asked for, says of a node that it joined with it, and ends it.
func testListedKey(t *testing.T, ctx context.Context, c *Client, made PreAuthKey, joined Node) {
	listed := func(id ID) PreAuthKey {
		t.Helper()
		keys, err := c.PreAuthKeys(ctx)
		i := slices.IndexFunc(keys, func(k PreAuthKey) bool { return k.ID == id })
		if err != nil || i < 0 {
			t.Fatalf("key %s is not listed: %+v, %v", id, keys, err)
		}
		return keys[i]
	}
	k := listed(made.ID)
	if !slices.Equal(k.ACLTags, []string{"tag:headcni"}) || time.Until(k.Expiration) < 50*time.Minute || time.Since(k.CreatedAt).Abs() > time.Hour {
		t.Errorf("listed: %+v", k)
	}
	if joined.Key != made.ID {
		t.Errorf("the node joined with key %s, not %s", joined.Key, made.ID)
	}
	other, err := c.CreatePreAuthKey(ctx, PreAuthKeyRequest{Tags: []string{"tag:headcni"}, Expiration: time.Now().Add(time.Hour)})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.ExpirePreAuthKey(ctx, listed(other.ID)); err != nil {
		t.Error(err)
	}
	if k := listed(other.ID); time.Until(k.Expiration) > time.Second {
		t.Errorf("still good until %s", k.Expiration)
	}
	if k := listed(made.ID); time.Until(k.Expiration) < 50*time.Minute {
		t.Errorf("another has ended too: %+v", k)
	}
}
