package tailscale

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/headcni/headcni/internal/realparts"
	"github.com/headcni/headcni/pkg/config/secret"
	"github.com/headcni/headcni/pkg/findings"
)

const testBatch = 10 * time.Millisecond

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func prefixes(s ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, p := range s {
		out = append(out, netip.MustParsePrefix(p))
	}
	return out
}

func TestJoinRealTailnet(t *testing.T) {
	t.Parallel()
	w := realparts.New(t, testBatch)
	ctx := testContext(t)
	d := w.Node()
	c := New(d.Socket)

	st, err := c.Status(ctx)
	if err != nil || st.State != NeedsLogin || st.HaveNodeKey || !st.TUN {
		t.Fatalf("fresh: %+v, %v", st, err)
	}
	if err := c.Login(ctx, LoginOptions{ControlURL: w.URL}); !errors.Is(err, ErrNeedsKey) {
		t.Errorf("without a key: %v", err)
	}

	const wrong = "hskey-auth-0123456789ab-0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	start := time.Now()
	err = c.Login(ctx, LoginOptions{ControlURL: w.URL, AuthKey: secret.New(wrong)})
	t.Logf("wrong key after %s: %v", time.Since(start), err)
	if !errors.Is(err, ErrKeyRefused) || strings.Contains(err.Error(), wrong) || !strings.Contains(err.Error(), "preauthkeys create") {
		t.Errorf("wrong key: %v", err)
	}
	if time.Since(start) > loginPatience {
		t.Errorf("a refused key took %s", time.Since(start))
	}

	key := secret.New(w.AuthKey("tag:headcni", "--reusable"))
	opts := LoginOptions{ControlURL: w.URL, AuthKey: key, Hostname: "node-one"}
	if err := c.Login(ctx, opts); err != nil {
		t.Fatalf("right key: %v\n%s", err, d.Log())
	}
	st, err = c.Status(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if st.State != Running || st.Self.Name != "node-one" || len(st.Self.IPs) != 2 || !strings.HasPrefix(st.Self.NodeKey, "nodekey:") ||
		!slices.Equal(st.Self.Tags, []string{"tag:headcni"}) || st.MagicDNSSuffix != "tailnet.test" || !st.Self.KeyExpiry.IsZero() {
		t.Errorf("joined: %+v", st)
	}
	if dns, err := c.DNS(ctx); err != nil || len(dns.Splits) != 0 || len(dns.Records) != 0 {
		t.Errorf("DNS: %+v, %v", dns, err)
	}
	if strings.Contains(d.Log(), key.Reveal()) {
		t.Error("the key is in tailscaled's log")
	}

	// Once in, Login changes nothing, with whatever key.
	if err := c.Login(ctx, LoginOptions{ControlURL: w.URL + "/", AuthKey: secret.New(wrong)}); err != nil {
		t.Errorf("logged in already: %v", err)
	}
	if err := c.Login(ctx, LoginOptions{ControlURL: "http://192.0.2.99:8080", AuthKey: key}); !errors.Is(err, ErrOtherControl) {
		t.Errorf("another server: %v", err)
	}
	d.CLI("down")
	if err := c.Login(ctx, LoginOptions{ControlURL: w.URL}); err != nil {
		t.Errorf("after tailscale down: %v", err)
	}

	var tun Link
	d.NS.Do(t, func() (err error) {
		tun, err = FindTun(st.Self.IPs, Links)
		return err
	})
	if tun.Name != d.Tun || tun.MTU != 1280 || !tun.Up {
		t.Errorf("tun: %+v", tun)
	}
	if _, err := FindTun(st.Self.IPs, Links); !errors.Is(err, ErrNoTun) {
		t.Errorf("tun from another namespace: %v", err)
	}
}

func TestUnreachableControl(t *testing.T) {
	t.Parallel()
	w := realparts.New(t, testBatch)
	ctx := testContext(t)
	d := w.Node()
	c := New(d.Socket)
	key := secret.New(w.AuthKey("tag:headcni"))
	w.Kill()
	start := time.Now()
	err := c.Login(ctx, LoginOptions{ControlURL: w.URL, AuthKey: key})
	t.Logf("after %s: %v", time.Since(start), err)
	if !errors.Is(err, ErrControl) || errors.Is(err, ErrKeyRefused) || !strings.Contains(err.Error(), "headscale.url") {
		t.Errorf("unreachable: %v", err)
	}
	if time.Since(start) > loginPatience+5*time.Second {
		t.Errorf("took %s", time.Since(start))
	}
	w.Start()
	// Another key: tailscaled goes on trying by itself, and where it joins first, the one it was given, which is for one use, is
	// spent. The controller's keys are for many, and an API key makes a new one for each try.
	key = secret.New(w.AuthKey("tag:headcni"))
	if err := c.Login(ctx, LoginOptions{ControlURL: w.URL, AuthKey: key}); err != nil {
		t.Errorf("back: %v", err)
	}
	d.Kill()
	if _, err := c.Status(ctx); !errors.Is(err, ErrUnreachable) || !strings.Contains(err.Error(), d.Socket) {
		t.Errorf("dead socket: %v", err)
	}
}

func TestRejoinAfterLogout(t *testing.T) {
	t.Parallel()
	w := realparts.New(t, testBatch)
	ctx := testContext(t)
	d := w.Node()
	c := New(d.Socket)
	key := secret.New(w.AuthKey("tag:headcni", "--reusable"))
	for i := range 2 {
		if err := c.Login(ctx, LoginOptions{ControlURL: w.URL, AuthKey: key}); err != nil {
			t.Fatalf("login %d: %v\n%s", i, err, d.Log())
		}
		for range 2 { // the second finds nothing to do
			if err := c.Logout(ctx); err != nil {
				t.Fatalf("logout %d: %v", i, err)
			}
		}
		if st, err := c.Status(ctx); err != nil || st.HaveNodeKey || st.State != NeedsLogin {
			t.Errorf("after logout %d: %+v, %v", i, st, err)
		}
	}
}

func TestRealPrefs(t *testing.T) {
	t.Parallel()
	w := realparts.New(t, testBatch)
	ctx := testContext(t)
	d := w.Node()
	c := New(d.Socket)
	key := w.AuthKey("tag:headcni")
	d.CLI("up", "--login-server="+w.URL, "--auth-key="+key, "--advertise-routes=192.168.7.0/24", "--accept-dns=true",
		"--stateful-filtering=true", "--hostname=mine")
	found, err := c.Prefs(ctx)
	if err != nil {
		t.Fatal(err)
	}
	spec := PrefsSpec{AdvertiseRoutes: prefixes("10.244.1.0/24", "fd00:244:1::/64")}
	saved := found.Saved(spec)

	changed, err := c.EnsurePrefs(ctx, spec)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{`AdvertiseRoutes=["192.168.7.0/24","10.244.1.0/24","fd00:244:1::/64"]`, "RouteAll=true", "NoSNAT=true", "NoStatefulFiltering=true"}
	if diff := cmp.Diff(want, changed); diff != "" {
		t.Errorf("changes:\n%s", diff)
	}
	if changed, err := c.EnsurePrefs(ctx, spec); err != nil || len(changed) != 0 {
		t.Errorf("second time: %v, %v", changed, err)
	}
	now, err := c.Prefs(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if now.Hostname != "mine" || !now.CorpDNS || !now.RouteAll || !now.NoSNAT || now.NoStatefulFiltering == nil || !*now.NoStatefulFiltering {
		t.Errorf("prefs now: %+v", now)
	}

	// What tailscaled lets in is the user's to say.
	d.CLI("set", "--shields-up")
	if changed, err := c.EnsurePrefs(ctx, spec); findings.IDOf(err) != findings.ShieldsUp || len(changed) != 0 {
		t.Errorf("with shields up: %v, %v", changed, err)
	}
	d.CLI("set", "--shields-up=false")

	// The CIDR moves; the user's route and ours of before are told apart.
	moved := PrefsSpec{AdvertiseRoutes: prefixes("10.244.9.0/24"), DropRoutes: spec.AdvertiseRoutes}
	if changed, err = c.EnsurePrefs(ctx, moved); err != nil || !slices.Equal(changed, []string{`AdvertiseRoutes=["192.168.7.0/24","10.244.9.0/24"]`}) {
		t.Errorf("moved: %v, %v", changed, err)
	}
	if err := c.RestorePrefs(ctx, saved, moved.AdvertiseRoutes); err != nil {
		t.Fatal(err)
	}
	after, err := c.Prefs(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(found, after, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); diff != "" {
		t.Errorf("not restored:\n%s", diff)
	}
}

// TestRealWatch sees the events of a real tailscaled, over its restart.
func TestRealWatch(t *testing.T) {
	t.Parallel()
	w := realparts.New(t, testBatch)
	ctx := testContext(t)
	a, b := w.Node(), w.Node()
	key := secret.New(w.AuthKey("tag:headcni", "--reusable"))
	c := New(a.Socket)
	events := make(chan Event, 1000)
	watch, stop := context.WithCancel(ctx)
	done := make(chan error)
	go func() { done <- c.Watch(watch, func(e Event) { events <- e }) }()
	await := func(what string, ok func(Event) bool) {
		t.Helper()
		for {
			select {
			case e := <-events:
				if ok(e) {
					return
				}
			case <-time.After(30 * time.Second):
				t.Fatalf("no event: %s", what)
			}
		}
	}
	await("connected", func(e Event) bool { return e.Connected && e.State == NeedsLogin })
	if err := c.Login(ctx, LoginOptions{ControlURL: w.URL, AuthKey: key}); err != nil {
		t.Fatal(err)
	}
	await("running", func(e Event) bool { return e.State == Running })
	if err := New(b.Socket).Login(ctx, LoginOptions{ControlURL: w.URL, AuthKey: key}); err != nil {
		t.Fatal(err)
	}
	await("a peer", func(e Event) bool { return e.Peers })
	if _, err := c.EnsurePrefs(ctx, PrefsSpec{AdvertiseRoutes: prefixes("10.244.1.0/24")}); err != nil {
		t.Fatal(err)
	}
	await("prefs", func(e Event) bool { return e.Prefs })
	a.Kill()
	await("lost", func(e Event) bool { return e.Lost != nil })
	a.Start()
	await("back", func(e Event) bool { return e.Connected })
	await("running again", func(e Event) bool { return e.State == Running })
	stop()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("watch ends with %v", err)
	}
}

// TestRealMove: Headscale is at another URL and has lost its database.
func TestRealMove(t *testing.T) {
	t.Parallel()
	from, to := realparts.New(t, testBatch), realparts.New(t, testBatch)
	ctx := testContext(t)
	d := from.Node()
	c := New(d.Socket)
	if err := c.Login(ctx, LoginOptions{ControlURL: from.URL, AuthKey: secret.New(from.AuthKey("tag:headcni"))}); err != nil {
		t.Fatal(err)
	}
	no := false
	if _, err := c.EnsurePrefs(ctx, PrefsSpec{AdvertiseRoutes: prefixes("10.244.1.0/24"), CorpDNS: &no}); err != nil {
		t.Fatal(err)
	}
	o := LoginOptions{ControlURL: to.URL, AuthKey: secret.New(to.AuthKey("tag:headcni"))}
	if err := c.Login(ctx, o); !errors.Is(err, ErrOtherControl) || !strings.Contains(err.Error(), from.URL) {
		t.Fatalf("without Move: %v", err)
	}
	o.Move = true
	if err := c.Login(ctx, o); err != nil {
		t.Fatalf("move: %v\n%s", err, d.Log())
	}
	if nodes := to.CLI("nodes", "list"); !strings.Contains(nodes, "100.64.0.1") {
		t.Errorf("the new server knows:\n%s", nodes)
	}
	p, err := c.Prefs(ctx)
	if err != nil || p.ControlURL != to.URL || !slices.Equal(p.AdvertiseRoutes, prefixes("10.244.1.0/24")) || !p.RouteAll || p.CorpDNS {
		t.Errorf("prefs: %+v, %v", p, err)
	}
}

// What a real tailscaled tells of who reaches whom: what it lets in, by Headscale's default policy; who has an address; how long a ping takes.
func TestRealReach(t *testing.T) {
	t.Parallel()
	w := realparts.New(t, testBatch)
	ctx := testContext(t)
	key := secret.New(w.AuthKey("tag:headcni", "--reusable"))
	var clients []*Client
	var self []Peer
	for _, name := range []string{"reach-a", "reach-b"} {
		c := New(w.Node().Socket)
		if err := c.Login(ctx, LoginOptions{ControlURL: w.URL, AuthKey: key, Hostname: name}); err != nil {
			t.Fatal(err)
		}
		st, err := c.Status(ctx)
		if err != nil {
			t.Fatal(err)
		}
		clients, self = append(clients, c), append(self, st.Self)
	}
	var pong Pong
	var err error
	for pong == (Pong{}) {
		one, cancel := context.WithTimeout(ctx, 3*time.Second)
		pong, err = clients[0].Ping(one, self[1].IPs[0], 0) // until each has heard of the other
		cancel()
		if ctx.Err() != nil {
			t.Fatal(err)
		}
	}
	if pong.Latency <= 0 || (pong.Endpoint == "") == (pong.Relay == "") {
		t.Errorf("ping: %+v", pong)
	}
	st, err := clients[0].Status(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if p, ok := st.Holder(self[1].IPs[0]); !ok || p.Name != "reach-b" {
		t.Errorf("%s is %+v's", self[1].IPs[0], p)
	}
	if p, ok := st.Holder(netip.MustParseAddr("10.244.2.3")); ok {
		t.Errorf("nobody's address is %s's", p.Name)
	}
	f, err := clients[1].Filter(ctx)
	if err != nil || !f.Accepts(self[0].IPs[0], self[1].IPs[0], ProtoTCP, 80) || !f.Accepts(self[0].IPs[1], self[1].IPs[1], ProtoICMPv6, 0) {
		t.Errorf("what everybody may is not let in: %+v, %v", f, err)
	}
	// A range behind b, which Headscale's policy names or not. A star would be everything that is approved.
	from, to := netip.MustParseAddr("10.244.1.7"), netip.MustParseAddr("10.244.2.3")
	if _, err := clients[1].EnsurePrefs(ctx, PrefsSpec{AdvertiseRoutes: prefixes("10.244.2.0/24")}); err != nil {
		t.Fatal(err)
	}
	policy := func(text string) {
		t.Helper()
		path := filepath.Join(t.TempDir(), "policy.json")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		w.CLI("policy", "set", "-f", path)
	}
	lets := func(what string, port uint16, want, pairs bool) {
		t.Helper()
		for {
			f, err = clients[1].Filter(ctx)
			if err == nil && f.Accepts(from, to, ProtoTCP, port) == want && f.Pairs(from, to) == pairs {
				return
			}
			if ctx.Err() != nil {
				t.Fatalf("%s: %+v, %v", what, f, err)
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
	// Headscale tells nobody of a route that he may not use, however approved it is.
	sees := func(what string, want bool) {
		t.Helper()
		for {
			st, err := clients[0].Status(ctx)
			if p, ok := st.Holder(to); err == nil && ok == want && (!ok || p.Name == "reach-b") {
				return
			}
			if ctx.Err() != nil {
				t.Fatalf("%s: %+v, %v", what, st.Peers, err)
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
	const approve = `"autoApprovers": {"routes": {"10.244.2.0/24": ["tag:headcni"]}}, "tagOwners": {"tag:headcni": ["test@"]}, "acls": [{"action": "accept", `
	policy("{" + approve + `"src": ["tag:headcni", "10.244.0.0/16"], "dst": ["tag:headcni:*", "10.244.0.0/16:80"]}]}`)
	lets("another port", 81, false, true)
	lets("a range that is named", 80, true, true)
	sees("its route", true)
	policy("{" + approve + `"src": ["tag:headcni"], "dst": ["tag:headcni:*"]}]}`)
	lets("a range that is not", 80, false, false)
	if w.Since(29) {
		sees("its route, hidden", false)
	}
	if _, err := New(clients[1].Socket() + ".none").Filter(ctx); !errors.Is(err, ErrUnreachable) {
		t.Errorf("no tailscaled: %v", err)
	}
}
