package records

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func service(name, label string, age time.Duration, ips ...string) Service {
	s := Service{Namespace: "shop", Name: name, Label: label, Created: time.Date(2026, 11, 29, 12, 0, 0, 0, time.UTC).Add(-age)}
	for _, ip := range ips {
		s.IPs = append(s.IPs, netip.MustParseAddr(ip))
	}
	return s
}

func TestPlan(t *testing.T) {
	got, refused := Plan("hc.internal", []Service{
		service("new", "web", time.Hour, "10.96.0.7"),
		service("web", "web", 2*time.Hour, "10.96.0.5", "fd00:96::5"),
		service("db", "db", time.Hour, "fd00:96::6", "10.96.0.6"),
		service("dots", "a.b", time.Hour, "10.96.0.8"),
		service("node", "worker-1", time.Hour, "10.96.0.9"),
		service("headless", "h", time.Hour),
	}, []string{"Worker-1"})
	want := []Record{
		{"db.hc.internal", "A", "10.96.0.6"}, {"db.hc.internal", "AAAA", "fd00:96::6"},
		{"web.hc.internal", "A", "10.96.0.5"}, {"web.hc.internal", "AAAA", "fd00:96::5"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	reasons := map[string]string{"new": "shop/web, which is older", "dots": "is no name", "node": "a node of the tailnet", "headless": "no address"}
	for _, r := range refused {
		if w := reasons[r.Service.Name]; w == "" || !strings.Contains(r.Reason, w) {
			t.Errorf("%s: %s", r.Service.Name, r.Reason)
		}
		delete(reasons, r.Service.Name)
	}
	if len(reasons) > 0 {
		t.Errorf("not refused: %v", reasons)
	}
}

func TestJSON(t *testing.T) {
	if text, err := JSON(nil); err != nil || text != "[]\n" {
		t.Errorf("%q %v", text, err)
	}
}
