package daemon

import (
	"context"
	"errors"
	"net"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/pkg/config"
)

func TestDeadman(t *testing.T) {
	var normal, past error
	now := time.Now()
	m := &deadman{now: func() time.Time { return now }, reach: func(_ context.Context, mark int) error {
		if mark == bypassMark {
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

func TestDialPastRules(t *testing.T) {
	nstest.Require(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	address := l.Addr().String()
	if err := errors.Join(dialMarked(t.Context(), address, 0), dialMarked(t.Context(), address, bypassMark)); err != nil {
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
	if err := dialMarked(t.Context(), address, bypassMark); err != nil {
		t.Errorf("past the rule: %v", err)
	}
}

func TestControlAddress(t *testing.T) {
	for in, want := range map[string]string{
		"https://hs.example.com": "hs.example.com:443", "http://192.0.2.1": "192.0.2.1:80",
		"http://[2001:db8::1]:8080/x": "[2001:db8::1]:8080", "": "",
	} {
		var c config.Config
		c.Headscale.URL = in
		if got := controlAddress(c); got != want {
			t.Errorf("%s: got %s, want %s", in, got, want)
		}
	}
}
