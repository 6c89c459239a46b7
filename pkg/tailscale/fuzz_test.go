package tailscale

import (
	"encoding/json"
	"strings"
	"testing"
)

// FuzzStatus: whatever tailscaled answers, it is refused or there is a Peer for each that it names, in order.
func FuzzStatus(f *testing.F) {
	for _, s := range []string{`{}`, `null`, `{"BackendState":"Running","Self":{"ID":"1","TailscaleIPs":["100.64.0.1"],"PrimaryRoutes":["10.244.1.0/24"],"CapMap":{"a":null}},
		"Peer":{"nodekey:a":{"ID":"2","DNSName":"b.x.","KeyExpiry":"2026-01-01T00:00:00Z"},"nodekey:b":null}}`, `{"Peer":{"":{"AllowedIPs":[""]}}}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var w wireStatus
		if json.Unmarshal(b, &w) != nil {
			return
		}
		s := w.status()
		if len(s.Peers) != len(w.Peer) {
			t.Errorf("%d peers of %d", len(s.Peers), len(w.Peer))
		}
		n := 0
		for _, count := range PathCounts(s.Peers) {
			n += count
		}
		if n != len(s.Peers) {
			t.Errorf("%d peers are on a path, of %d", n, len(s.Peers))
		}
	})
}

// FuzzBus: a stream of notifications, of whatever it consists, ends.
func FuzzBus(f *testing.F) {
	for _, s := range []string{`{"State":6}{"Prefs":{"RouteAll":true}}`, `{"NetMap":null}`, `{"PeerChangedPatch":[{"Online":true}]}`, `{"Health":{"Warnings":{"a":{"Args":{"b":"c"}}}}}`, `[`, `7 8`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		b := &bus{dec: json.NewDecoder(strings.NewReader(s))}
		for range len(s) + 1 {
			if _, err := b.next(); err != nil {
				return
			}
		}
		t.Errorf("%d notifications out of %d bytes", len(s)+1, len(s))
	})
}

// FuzzPrefs: whatever prefs tailscaled has, ours are set by one change and then stay.
func FuzzPrefs(f *testing.F) {
	for _, s := range []string{`{}`, `{"RouteAll":true,"AdvertiseRoutes":["192.168.7.0/24","10.244.1.0/24"],"NoStatefulFiltering":null}`, `{"AdvertiseRoutes":[null,"::/0"]}`} {
		f.Add([]byte(s))
	}
	spec := PrefsSpec{AdvertiseRoutes: prefixes("10.244.1.0/24", "fd00:244:1::/64"), DropRoutes: prefixes("10.244.9.0/24")}
	f.Fuzz(func(t *testing.T, b []byte) {
		var p Prefs
		if json.Unmarshal(b, &p) != nil {
			return
		}
		e := planPrefs(p, spec)
		text, err := json.Marshal(e.fields)
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(text, &p); err != nil {
			t.Fatal(err)
		}
		if again := planPrefs(p, spec); len(again.changes) > 0 {
			t.Errorf("after %s still %v", text, again.changes)
		}
	})
}
