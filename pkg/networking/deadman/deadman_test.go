package deadman

import (
	"context"
	"errors"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/pkg/config/names"
)

func TestDeadman(t *testing.T) {
	var normal, past error
	now := time.Now()
	m := &Watch{now: func() time.Time { return now }, reach: func(_ context.Context, mark int) error {
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
		{"Headscale down", down, down, 2 * Patience, false},
		{"cut off", down, nil, 0, false},
		{"for a while", down, nil, Patience - time.Second, false},
		{"back", nil, nil, time.Second, false},
		{"cut off again", down, nil, time.Second, false},
		{"not long enough", down, nil, Patience - time.Second, false},
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
		m := &Watch{now: time.Now, reach: func(_ context.Context, mark int) error {
			if mark == names.BypassMark {
				return nil
			}
			return errors.New("unreachable")
		}}
		ctx, cancel := context.WithTimeout(t.Context(), 3*Patience)
		defer cancel()
		reports := 0
		m.Run(ctx, func() { reports++ })
		if reports != 2 {
			t.Errorf("%d reports in %s", reports, 3*Patience)
		}
	})
}

func TestDialPastRules(t *testing.T) {
	ns := nstest.New(t)
	ns.Run(t, "ip", "link", "set", "lo", "up")
	var l net.Listener
	ns.Do(t, func() (err error) { l, err = net.Listen("tcp", "127.0.0.1:0"); return err })
	defer l.Close()
	dial := func(mark int) (err error) {
		ns.Do(t, func() error { err = dialMarked(t.Context(), l.Addr().String(), mark); return nil })
		return err
	}
	if err := errors.Join(dial(0), dial(names.BypassMark)); err != nil {
		t.Fatal(err)
	}
	// As a foreign route would: unmarked packets to the server go nowhere. The local table stands before all rules
	// otherwise.
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	for _, rule := range []string{"add pref 2 lookup local", "add pref 1 fwmark 0/0x80000 ipproto tcp dport " + port + " unreachable", "del pref 0 lookup local"} {
		ns.Run(t, "ip", append([]string{"rule"}, strings.Fields(rule)...)...)
	}
	if err := dial(0); err == nil {
		t.Error("reached through a rule that forbids it")
	}
	if err := dial(names.BypassMark); err != nil {
		t.Errorf("past the rule: %v", err)
	}
}

func TestHostPort(t *testing.T) {
	for in, want := range map[string]string{
		"https://hs.example.com": "hs.example.com:443", "http://192.0.2.1": "192.0.2.1:80",
		"http://[2001:db8::1]:8080/x": "[2001:db8::1]:8080", "": "", "10.96.0.1:6443": "10.96.0.1:6443", "api.example.com": "api.example.com:443",
	} {
		if got := HostPort(in); got != want {
			t.Errorf("%s: got %s, want %s", in, got, want)
		}
	}
}
