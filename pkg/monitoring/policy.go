package monitoring

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// PolicyState is the state of NetworkPolicies on the node.
type PolicyState struct {
	Enforced bool
	// Unknown is the number of pods that wait for their policies, OldestUnknown how long the first of them has waited.
	Unknown       int
	OldestUnknown time.Duration
	// Sets, Elements and Chains are what the kernel holds, and Recheck the number of addresses whose established flows are judged again.
	Sets, Elements, Chains, Recheck int
	// Denied are the packets that policies dropped, by pod and direction.
	Denied []Denied
	// DeniedUnknown are the packets of pods whose policies were not known, DeniedStateless those of isolated pods and of no connection.
	DeniedUnknown, DeniedStateless uint64
}

// Denied are packets that policies of a pod dropped in one direction.
type Denied struct {
	Namespace, Pod, Direction string
	Packets                   uint64
}

// policy exports the state that read returns.
type policy struct {
	read     func() PolicyState
	seconds  prometheus.Histogram
	failures prometheus.Counter
}

func newPolicy() *policy {
	return &policy{
		read: func() PolicyState { return PolicyState{} },
		seconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "headcni_policy_sync_seconds", Help: "Time from a change that network policies depend on to its being in force.",
			Buckets: prometheus.ExponentialBuckets(0.002, 2, 14),
		}),
		failures: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "headcni_policy_failures_total", Help: "Failed tries to bring network policies into the kernel.",
		}),
	}
}

func policyDesc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(name, help, labels, nil)
}

var (
	policyEnforced = policyDesc("headcni_network_policy_enforced", "1 where this node enforces NetworkPolicies, 0 where it does not.")
	policyUnknown  = policyDesc("headcni_policy_unknown_pods", "Pods whose policies are not known yet.")
	policyOldest   = policyDesc("headcni_policy_unknown_seconds", "How long the pod waits that has waited longest for its policies, 0 where none does.")
	policyObjects  = policyDesc("headcni_policy_objects", "What the kernel holds for network policies: sets (maps among them), elements of them, chains, and recheck, "+
		"the addresses whose established flows are judged again.", "kind")
	policyDenied = policyDesc("headcni_policy_denied_packets_total", "Packets that network policies dropped, by the pod of this node whose policies they were.",
		"namespace", "pod", "direction")
	policyOther = policyDesc("headcni_policy_dropped_packets_total", "Packets dropped beside policies: of pods whose policies were not known (unknown), "+
		"and of isolated pods but of no connection (stateless).", "reason")
)

// Describe implements prometheus.Collector.
func (p *policy) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{policyEnforced, policyUnknown, policyOldest, policyObjects, policyDenied, policyOther} {
		ch <- d
	}
	p.seconds.Describe(ch)
	p.failures.Describe(ch)
}

// Collect implements prometheus.Collector.
func (p *policy) Collect(ch chan<- prometheus.Metric) {
	s := p.read()
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	gauge(policyEnforced, boolToFloat(s.Enforced))
	gauge(policyUnknown, float64(s.Unknown))
	gauge(policyOldest, s.OldestUnknown.Seconds())
	for kind, n := range map[string]int{"sets": s.Sets, "elements": s.Elements, "chains": s.Chains, "recheck": s.Recheck} {
		gauge(policyObjects, float64(n), kind)
	}
	for _, d := range s.Denied {
		ch <- prometheus.MustNewConstMetric(policyDenied, prometheus.CounterValue, float64(d.Packets), d.Namespace, d.Pod, d.Direction)
	}
	for reason, n := range map[string]uint64{"unknown": s.DeniedUnknown, "stateless": s.DeniedStateless} {
		ch <- prometheus.MustNewConstMetric(policyOther, prometheus.CounterValue, float64(n), reason)
	}
	p.seconds.Collect(ch)
	p.failures.Collect(ch)
}

// Policy sets the function that returns the state of NetworkPolicies. Each scrape calls it. It must be set before the first scrape.
func (m *Metrics) Policy(read func() PolicyState) { m.policy.read = read }

// PolicySynced records the time from a change to its being in force, in seconds.
func (m *Metrics) PolicySynced(seconds float64) { m.policy.seconds.Observe(seconds) }

// PolicyFailed counts a failed try to bring policies into the kernel.
func (m *Metrics) PolicyFailed() { m.policy.failures.Inc() }
