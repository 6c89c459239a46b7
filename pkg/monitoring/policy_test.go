package monitoring

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// TestPolicyMetrics: how policies stand, as a scrape sees it.
func TestPolicyMetrics(t *testing.T) {
	m := NewMetrics("test")
	m.Policy(func() PolicyState {
		return PolicyState{
			Enforced: true, Unknown: 2, OldestUnknown: 7 * time.Second, Sets: 3, Elements: 40, Chains: 5, Recheck: 1, DeniedUnknown: 8, DeniedStateless: 9,
			Denied: []Denied{{Namespace: "ns", Pod: "web", Direction: "ingress", Packets: 11}},
		}
	})
	m.PolicyFailed()
	m.PolicySynced(0.001)
	families, err := m.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, f := range families {
		for _, s := range f.GetMetric() {
			name := strings.TrimPrefix(f.GetName(), "headcni_")
			for _, l := range s.GetLabel() {
				name += " " + l.GetValue()
			}
			if strings.Contains(name, "policy") {
				got[name] = s.GetGauge().GetValue() + s.GetCounter().GetValue() + float64(s.GetHistogram().GetSampleCount())
			}
		}
	}
	want := map[string]float64{
		"network_policy_enforced": 1, "policy_unknown_pods": 2, "policy_unknown_seconds": 7,
		"policy_objects sets": 3, "policy_objects elements": 40, "policy_objects chains": 5, "policy_objects recheck": 1,
		"policy_denied_packets_total ingress ns web": 11, "policy_dropped_packets_total unknown": 8, "policy_dropped_packets_total stateless": 9,
		"policy_failures_total": 1, "policy_sync_seconds": 1,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}
