package membership

import (
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/headscaletest"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/findings"
	"github.com/headcni/headcni/pkg/reconcile"
	"github.com/headcni/headcni/pkg/tailscale"
)

// A warning stands until the next look: Headscale is not asked with each pass.
func TestCheckKeepsWarnings(t *testing.T) {
	warned := reconcile.Warning{Err: errors.New("the API key expires")}
	m := &Member{cfg: config.Config{Headscale: config.Headscale{URL: "http://127.0.0.1:1"}}, checkedAt: time.Now(), warned: warned}
	if _, err := m.Check(t.Context(), Seen{}); !errors.Is(err, warned) {
		t.Errorf("%v, want %v", err, warned)
	}
}

// A tailnet whose addresses are not Tailscale's is said to be none, in the families that pods have.
func TestTailnetElsewhere(t *testing.T) {
	pods := []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24"), netip.MustParsePrefix("fd00:244:1::/64")}
	for name, c := range map[string]struct {
		ips  []string
		pods []netip.Prefix
		want string
	}{
		"Tailscale's":         {[]string{"100.64.0.1", "fd7a:115c:a1e0::1"}, pods, ""},
		"part of them":        {[]string{"100.127.255.1", "fd7a:115c:a1e0:9::1"}, pods, ""},
		"another v4":          {[]string{"10.64.0.1", "fd7a:115c:a1e0::1"}, pods, "prefixes.v4"},
		"another v6":          {[]string{"100.64.0.1", "fd7a:115c:a1e1::1"}, pods, "prefixes.v6"},
		"another v6, no pods": {[]string{"100.64.0.1", "fd7a:115c:a1e1::1"}, pods[:1], ""},
	} {
		status := &tailscale.Status{State: tailscale.Running}
		for _, ip := range c.ips {
			status.Self.IPs = append(status.Self.IPs, netip.MustParseAddr(ip))
		}
		_, err := (&Member{}).Join(t.Context(), Seen{Tailnet: status, PodCIDRs: c.pods})
		if c.want == "" && err != nil || c.want != "" && (findings.IDOf(err) != findings.TailnetElsewhere || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

// TestOneOddAnswer: a node joins anew when Headscale has told twice, some time apart, that it does not know it.
func TestOneOddAnswer(t *testing.T) {
	s := headscaletest.New(t)
	cfg := config.Default()
	cfg.Headscale.URL = s.URL
	env := map[string]string{"HEADSCALE_API_KEY": s.APIKeyUntil(time.Now().Add(90 * 24 * time.Hour))}
	m := New(cfg, slog.New(slog.DiscardHandler), func(name string) string { return env[name] }, nil)
	m.Use(t.TempDir() + "/tailscaled.sock") // nobody answers there: what would join fails
	seen := Seen{Mode: config.ModeDaemon, Tailnet: &tailscale.Status{State: tailscale.Running, Self: tailscale.Peer{NodeKey: "nodekey:ab", Tags: cfg.Tailscale.Tags}}}
	looks := func() error {
		t.Helper()
		_, err := m.Check(t.Context(), seen)
		return err
	}
	var soon reconcile.Soon
	if err := looks(); !errors.As(err, &soon) || soon.In > secondLook {
		t.Errorf("the first look: %v", err)
	}
	s.AddNode(headscaletest.Node{NodeKey: "nodekey:ab"})
	if err := looks(); err != nil || !m.unknown.IsZero() {
		t.Errorf("known again: %v, unknown since %v", err, m.unknown)
	}
	m.checkedAt = time.Time{}
	s.Break(headscaletest.At("GET /api/v1/node", headscaletest.Answer(200, `{}`)))
	if err := looks(); err == nil || errors.As(err, &soon) || !m.unknown.IsZero() {
		t.Errorf("an answer without nodes: %v", err)
	}
	if n := len(s.Calls("POST ")); n != 0 {
		t.Errorf("%d keys were made to join with", n)
	}
	s.Break(headscaletest.At("GET /api/v1/node", headscaletest.Answer(200, `{"nodes":[]}`)))
	m.unknown = time.Now().Add(-secondLook)
	if err := looks(); !errors.Is(err, tailscale.ErrUnreachable) || len(s.Calls("POST /api/v1/preauthkey")) != 1 {
		t.Errorf("the second look does not join: %v", err)
	}
}

// TestExposedKey: a key that everybody can read is a warning for as long as that is so, and stops nothing.
func TestExposedKey(t *testing.T) {
	s := headscaletest.New(t)
	s.AddNode(headscaletest.Node{NodeKey: "nodekey:ab"})
	file := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(file, []byte(s.APIKeyUntil(time.Now().Add(90*24*time.Hour))), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg := config.Default()
	cfg.Headscale.URL, cfg.Headscale.APIKeyFile = s.URL, file
	m := New(cfg, slog.New(slog.DiscardHandler), func(string) string { return "" }, nil)
	seen := Seen{Mode: config.ModeDaemon, Tailnet: &tailscale.Status{State: tailscale.Running, Self: tailscale.Peer{NodeKey: "nodekey:ab", Tags: cfg.Tailscale.Tags}}}
	for _, mode := range []os.FileMode{0o600, 0o644, 0o600} {
		if err := os.Chmod(file, mode); err != nil {
			t.Fatal(err)
		}
		m.checkedAt = time.Time{}
		_, err := m.Check(t.Context(), seen)
		if want := mode == 0o644; (err != nil) != want || want && (!errors.As(err, new(reconcile.Warning)) || !strings.Contains(err.Error(), "chmod 0600 "+file)) {
			t.Errorf("mode %04o: %v", mode, err)
		}
	}
	// No warning hides that the routes are gone, or that Headscale does not answer as it should.
	if err := os.Chmod(file, 0o644); err != nil {
		t.Fatal(err)
	}
	m.checkedAt, seen.PodCIDRs = time.Time{}, []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")}
	if _, err := m.Check(t.Context(), seen); !errors.As(err, new(reconcile.Waiting)) || !m.checkedAt.IsZero() {
		t.Errorf("with the routes gone: %v", err)
	}
	seen.PodCIDRs = nil
	s.Break(headscaletest.At("GET /health", headscaletest.Answer(200, "{}")))
	if _, err := m.Check(t.Context(), seen); err == nil || errors.As(err, new(reconcile.Warning)) || !m.checkedAt.IsZero() {
		t.Errorf("with an odd Headscale: %v", err)
	}
}
