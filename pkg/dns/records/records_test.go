package records

import (
	"fmt"
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
		service("upper", "Web", time.Hour, "10.96.0.10"),
		service("long", strings.Repeat("a", 64), time.Hour, "10.96.0.11"),
		service("longest", strings.Repeat("a", 63), time.Hour, "10.96.0.12"),
	}, []string{"Worker-1"}, nil)
	want := []Record{
		{strings.Repeat("a", 63) + ".hc.internal", "A", "10.96.0.12"},
		{"db.hc.internal", "A", "10.96.0.6"}, {"db.hc.internal", "AAAA", "fd00:96::6"},
		{"web.hc.internal", "A", "10.96.0.5"}, {"web.hc.internal", "AAAA", "fd00:96::5"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	reasons := map[string]string{"new": "the Service shop/web has", "upper": "is no name", "long": "63 at most", "dots": "is no name", "node": "a node of the tailnet", "headless": "no address"}
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

// TestWhoHasItKeepsIt: a name in use goes to nobody else, before it is free.
func TestWhoHasItKeepsIt(t *testing.T) {
	young, old := service("young", "web", time.Hour, "10.96.0.7", "fd00:96::7"), service("old", "", 2*time.Hour, "10.96.0.5")
	names := func(had []Record, services ...Service) (by string, now []Record) {
		t.Helper()
		now, _ = Plan("hc.internal", services, nil, had)
		accepted, _ := Accept(services, nil, had)
		if len(accepted) != 1 {
			t.Fatalf("%v", accepted)
		}
		return accepted[0].Name, now
	}
	_, had := names(nil, young)
	old.Label = "web"
	var by string
	if by, had = names(had, old, young); by != "young" || len(had) != 2 {
		t.Errorf("%s has the name of a younger Service: %v", by, had)
	}
	if by, _ = names(nil, old, young); by != "old" {
		t.Errorf("of two that begin %s has it", by)
	}
	// It is made anew, with another address: it has no name any more.
	young.IPs = []netip.Addr{netip.MustParseAddr("10.96.0.8")}
	if by, _ = names(had, young, old); by != "old" {
		t.Errorf("%s has a name that is free", by)
	}
}

func TestMaxNames(t *testing.T) {
	var list []Service
	for i := range MaxNames + 2 {
		list = append(list, service(fmt.Sprint("s", i), fmt.Sprint("s", i), time.Duration(-i)*time.Second, fmt.Sprintf("10.96.%d.%d", i/256, i%256)))
	}
	accepted, refused := Accept(list, nil, nil)
	if len(accepted) != MaxNames || len(refused) != 2 || refused[1].Service.Name != fmt.Sprint("s", MaxNames+1) {
		t.Errorf("%d have names, %v not", len(accepted), refused)
	}
}

func TestJSON(t *testing.T) {
	if text, err := JSON(nil); err != nil || text != "[]\n" {
		t.Errorf("%q %v", text, err)
	}
	list := []Record{{"db.hc.internal", "A", "10.96.0.6"}}
	if text, err := JSON(list); err != nil || !cmp.Equal(FromJSON(text), list) || FromJSON(text[1:]) != nil {
		t.Errorf("%v %v", FromJSON(text), err)
	}
}
