// Package monitoring serves what can be seen of the daemon and the controller: Prometheus metrics, liveness and readiness.
package monitoring

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	dto "github.com/prometheus/client_model/go"

	"github.com/headcni/headcni/pkg/cmdlog"
)

// Metrics are the daemon's. The four of the specification are counted from the plugin's records, see OpenSpool.
type Metrics struct {
	registry *prometheus.Registry

	plugin *spoolCounter
	pools  *pools
	drops  *drops
	table  *conntrack
	policy *policy

	passes       prometheus.Histogram
	part         *prometheus.GaugeVec
	peers        *prometheus.GaugeVec
	podPeers     *prometheus.GaugeVec
	nodeKey      prometheus.Gauge
	smallestPath prometheus.Gauge
	rearmPings   prometheus.Counter
	corrections  *prometheus.CounterVec
	selfTest     *prometheus.GaugeVec
	selfTestRan  *prometheus.GaugeVec
}

// NewRegistry makes a registry with the metrics that each of our programs exports: its own, its version, and those of Go and the
// process.
func NewRegistry(version string, own ...prometheus.Collector) *prometheus.Registry {
	build := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "headcni_build_info", Help: "Always 1."}, []string{"version"})
	build.WithLabelValues(version).Set(1)
	r := prometheus.NewRegistry()
	r.MustRegister(own...)
	r.MustRegister(build, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return r
}

// NewMetrics registers everything at zero, so that a rate over a fresh daemon is right from the first scrape.
func NewMetrics(version string) *Metrics {
	m := &Metrics{
		pools:  &pools{read: func() []Pool { return nil }},
		drops:  &drops{read: func() map[string]uint64 { return nil }},
		table:  &conntrack{read: func() (entries, most, full uint64, err error) { return }},
		policy: newPolicy(),
		plugin: &spoolCounter{t: newTotals(), log: func(error) {}},
		passes: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "headcni_reconcile_duration_seconds", Help: "Duration of one observe-plan-apply pass over the node.",
			Buckets: prometheus.ExponentialBuckets(0.001, 2, 14),
		}),
		part: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "headcni_part_ok", Help: "1 where a part of the node is as it should be, 0 where it has an error.",
		}, []string{"part"}),
		peers: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "headcni_tailnet_peers", Help: "Tailnet peers by path: direct, relayed, idle or offline.",
		}, []string{"path"}),
		podPeers: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "headcni_pod_peers", Help: "Those of them that have pods, by path.",
		}, []string{"path"}),
		nodeKey: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "headcni_node_key_expiry_timestamp_seconds", Help: "When this node's key in the tailnet expires, 0 where it is not known or never does.",
		}),
		smallestPath: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "headcni_smallest_path_bytes", Help: "Largest packet inside the tunnel that the paths to all peers with pods carry, 0 where it is not known.",
		}),
		rearmPings: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "headcni_rearm_pings_total", Help: "Pings sent to make, keep and heal WireGuard sessions.",
		}),
		corrections: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "headcni_corrections_total", Help: "Changes made to the node by part, the first set-up included.",
		}, []string{"part"}),
	}
	// A vector without labels exports nothing before the first value: nothing is known before the test has ended, and the test may not run
	// everywhere.
	m.selfTestRan = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "headcni_guard_self_test_ran", Help: "1 where the self-test of the guard ran, 0 where the daemon may not make a network namespace for it.",
	}, nil)
	m.selfTest = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "headcni_guard_self_test_ok", Help: "1 where the guard stopped and counted packets that were sent in clear on purpose, 0 where it did not.",
	}, nil)
	m.registry = NewRegistry(version, m.plugin, m.pools, m.drops, m.table, m.selfTest, m.selfTestRan, m.policy, m.passes, m.part, m.peers, m.podPeers, m.nodeKey, m.smallestPath, m.rearmPings, m.corrections)
	return m
}

// OpenSpool counts the plugin's records in the spool from now on, on top of the totals that an earlier daemon left at path. each is
// called with each record, more than once where that could not be counted at first, and log with each error.
func (m *Metrics) OpenSpool(path, spool string, each func(cmdlog.Record), log func(error)) error {
	m.plugin.each, m.plugin.log = each, log
	return m.plugin.open(path, spool)
}

// Pools sets the function that returns the use of pools. Each scrape calls it. It must be set before the first scrape.
func (m *Metrics) Pools(read func() []Pool) { m.pools.read = read }

// Drops sets the function that returns how many packets the node's rules dropped, by reason. Each scrape calls it. It must be set
// before the first scrape.
func (m *Metrics) Drops(read func() map[string]uint64) { m.drops.read = read }

// Conntrack sets the function that looks at the kernel's table of connections. Each scrape calls it. It must be set before the first scrape.
func (m *Metrics) Conntrack(read func() (entries, most, full uint64, err error)) { m.table.read = read }

// SelfTest records how the guard's self-test ended: nil where it could not run.
func (m *Metrics) SelfTest(passed *bool) {
	m.selfTestRan.WithLabelValues().Set(boolToFloat(passed != nil))
	if passed != nil {
		m.selfTest.WithLabelValues().Set(boolToFloat(*passed))
	}
}

// CountSpool counts what is in the spool. A scrape does so too.
func (m *Metrics) CountSpool() {
	if err := m.plugin.countSpool(); err != nil {
		m.plugin.log(err)
	}
}

// Gather implements prometheus.Gatherer.
func (m *Metrics) Gather() ([]*dto.MetricFamily, error) { return m.registry.Gather() }

// Released counts addresses that were freed without a DEL.
func (m *Metrics) Released(n int) {
	if err := m.plugin.update(func(t *totals) { t.Releases += uint64(n) }); err != nil {
		m.plugin.log(err)
	}
}

// Pass records one reconcile pass of the daemon, in seconds.
func (m *Metrics) Pass(seconds float64) { m.passes.Observe(seconds) }

// Part records whether a part of the node has no error, and how many changes a pass made to it.
func (m *Metrics) Part(name string, ok bool, changes int) {
	m.part.WithLabelValues(name).Set(boolToFloat(ok))
	m.corrections.WithLabelValues(name).Add(float64(changes))
}

// Tailnet is the state of the tailnet in a pass.
type Tailnet struct {
	// Peers are the numbers of peers by path (direct, relayed, idle, offline), PodPeers those of peers with pods.
	Peers, PodPeers map[string]int
	// KeyExpiry is when the node's key expires, the zero Time where it never does.
	KeyExpiry time.Time
	// SmallestPath is the largest packet inside the tunnel, in bytes, that the paths to all peers with pods carry.
	SmallestPath int
}

// Tailnet records the state of the tailnet.
func (m *Metrics) Tailnet(t Tailnet) {
	for path, n := range t.Peers {
		m.peers.WithLabelValues(path).Set(float64(n))
		m.podPeers.WithLabelValues(path).Set(float64(t.PodPeers[path]))
	}
	m.smallestPath.Set(float64(t.SmallestPath))
	m.nodeKey.Set(0)
	if !t.KeyExpiry.IsZero() {
		m.nodeKey.Set(float64(t.KeyExpiry.Unix()))
	}
}

// RearmPing counts one ping that makes, keeps or heals a WireGuard session.
func (m *Metrics) RearmPing() { m.rearmPings.Inc() }

// boolToFloat is 1 for true, 0 for false.
func boolToFloat(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
