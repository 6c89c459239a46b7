package daemon

import (
	"context"
	"errors"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/names"
	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/tailscale"
)

func TestDeadman(t *testing.T) {
	var normal, past error
	now := time.Now()
	m := &deadman{now: func() time.Time { return now }, reach: func(_ context.Context, mark int) error {
		if mark == names.BypassMark {
			return past
		}
		return normal
	}}
	down := errors.New("unreachable")
	steps := []struct {
		name         string
		normal, past error
		after        time.Duration
		want         bool
	}{
		{"fine", nil, nil, 0, false},
		{"Headscale down", down, down, 2 * deadmanPatience, false},
		{"cut off", down, nil, 0, false},
		{"for a while", down, nil, deadmanPatience - time.Second, false},
		{"back", nil, nil, time.Second, false},
		{"cut off again", down, nil, time.Second, false},
		{"not long enough", down, nil, deadmanPatience - time.Second, false},
		{"for too long", down, nil, time.Second, true},
	}
	for _, s := range steps {
		normal, past = s.normal, s.past
		now = now.Add(s.after)
		if got := m.look(t.Context()); got != s.want {
			t.Fatalf("%s: got %v", s.name, got)
		}
	}
}

// Whoever is still cut off is reported again.
func TestDeadmanReportsAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &deadman{now: time.Now, reach: func(_ context.Context, mark int) error {
			if mark == names.BypassMark {
				return nil
			}
			return errors.New("unreachable")
		}}
		ctx, cancel := context.WithTimeout(t.Context(), 3*deadmanPatience)
		defer cancel()
		reports := 0
		m.run(ctx, func() { reports++ })
		if reports != 2 {
			t.Errorf("%d reports in %s", reports, 3*deadmanPatience)
		}
	})
}

// What could not be taken back is tried again; afterwards the host is left alone.
func TestTakeBackUntilDone(t *testing.T) {
	c := testConfig(t)
	nstest.FreshState(t)
	d := newDaemon(t, c)
	d.pass(t.Context())
	d.saved.Mode, d.saved.Prefs = config.ModeDaemon, &tailscale.SavedPrefs{}
	if err := d.withdraw(t.Context(), "192.0.2.1:443"); !errors.Is(err, tailscale.ErrUnreachable) {
		t.Errorf("without tailscaled: %v", err)
	}
	asked := fakeTailscaled(t, paths.DaemonTailscaleSocket, http.StatusOK)
	for range 2 {
		if err := d.withdraw(t.Context(), "192.0.2.1:443"); err != nil {
			t.Error(err)
		}
		run(t, "sysctl", "-w", "net.ipv4.ip_forward=1") // by somebody else
	}
	if got := asked(); len(got) != 1 {
		t.Errorf("asked tailscaled %q", got)
	}
	if got := run(t, "sysctl", "net.ipv4.ip_forward"); !strings.Contains(got, "= 1") {
		t.Errorf("after all is done: %s", got)
	}
	if rules := run(t, "ip", "rule"); strings.Contains(rules, "519") {
		t.Errorf("rules of ours are left:\n%s", rules)
	}
	if d.pass(t.Context()); !strings.Contains(partErrors(d)[partConfig], "taken back") {
		t.Errorf("config: %q", partErrors(d)[partConfig])
	}
	if err := Uninstall(t.Context(), c, quiet); err != nil {
		t.Error(err)
	}
}

func TestDialPastRules(t *testing.T) {
	nstest.Require(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	address := l.Addr().String()
	if err := errors.Join(dialMarked(t.Context(), address, 0), dialMarked(t.Context(), address, names.BypassMark)); err != nil {
		t.Fatal(err)
	}
	// As a foreign route would: unmarked packets to the server go nowhere. The local table stands before all rules
	// otherwise.
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	local := []string{"pref", "2", "lookup", "local"}
	foreign := []string{"pref", "1", "fwmark", "0/0x80000", "ipproto", "tcp", "dport", port, "unreachable"}
	for _, r := range [][]string{local, foreign} {
		run(t, "ip", append([]string{"rule", "add"}, r...)...)
		t.Cleanup(func() { run(t, "ip", append([]string{"rule", "del"}, r...)...) })
	}
	run(t, "ip", "rule", "del", "pref", "0", "lookup", "local")
	t.Cleanup(func() { run(t, "ip", "rule", "add", "pref", "0", "lookup", "local") })
	if err := dialMarked(t.Context(), address, 0); err == nil {
		t.Error("reached through a rule that forbids it")
	}
	if err := dialMarked(t.Context(), address, names.BypassMark); err != nil {
		t.Errorf("past the rule: %v", err)
	}
}

func TestHostPort(t *testing.T) {
	for in, want := range map[string]string{
		"https://hs.example.com": "hs.example.com:443", "http://192.0.2.1": "192.0.2.1:80",
		"http://[2001:db8::1]:8080/x": "[2001:db8::1]:8080", "": "", "10.96.0.1:6443": "10.96.0.1:6443", "api.example.com": "api.example.com:443",
	} {
		if got := hostPort(in); got != want {
			t.Errorf("%s: got %s, want %s", in, got, want)
		}
	}
}
