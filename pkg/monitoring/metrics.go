// Package monitoring is how the daemon shows itself: Prometheus metrics, liveness and readiness.
package monitoring

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/headcni/headcni/pkg/hint"
)

// Metrics are the daemon's. The four of the specification are counted from the plugin's hints.
type Metrics struct {
	registry *prometheus.Registry

	allocations prometheus.Counter
	releases    prometheus.Counter
	errors      *prometheus.CounterVec
	setup       prometheus.Histogram

	passes      prometheus.Histogram
	part        *prometheus.GaugeVec
	peers       *prometheus.GaugeVec
	rearmPings  prometheus.Counter
	corrections *prometheus.CounterVec
}

// NewMetrics registers everything at zero, so that a rate over a fresh daemon is right from the first scrape.
func NewMetrics(version string) *Metrics {
	m := &Metrics{
		registry: prometheus.NewRegistry(),
		allocations: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "headcni_ip_allocations_total", Help: "Addresses given to pods.",
		}),
		releases: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "headcni_ip_releases_total", Help: "Addresses taken back from pods.",
		}),
		errors: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "headcni_network_errors_total", Help: "Failed network operations by what failed.",
		}, []string{"stage"}),
		setup: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "headcni_pod_network_setup_duration_seconds", Help: "Duration of successful CNI ADD commands inside the plugin.",
			Buckets: prometheus.ExponentialBuckets(0.001, 2, 14),
		}),
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
		rearmPings: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "headcni_rearm_pings_total", Help: "Pings sent to renew WireGuard sessions after a restart of tailscaled.",
		}),
		corrections: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "headcni_corrections_total", Help: "Changes made to the node by part, the first set-up included.",
		}, []string{"part"}),
	}
	build := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "headcni_build_info", Help: "Always 1."}, []string{"version"})
	build.WithLabelValues(version).Set(1)
	m.registry.MustRegister(m.allocations, m.releases, m.errors, m.setup, m.passes, m.part, m.peers, m.rearmPings, m.corrections, build,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	for _, stage := range []string{"config", "gate", "ipam", "attach", "detach", "other"} {
		m.errors.WithLabelValues(stage)
	}
	return m
}

// Plugin counts one finished command of the CNI plugin.
func (m *Metrics) Plugin(h hint.Hint) {
	if h.ErrorCode != 0 {
		stage := h.Stage
		if stage == "" {
			stage = "other"
		}
		m.errors.WithLabelValues(stage).Inc()
		return
	}
	switch h.Command {
	case "ADD":
		m.allocations.Add(float64(len(h.Addrs)))
		m.setup.Observe(h.Duration.Seconds())
	case "DEL":
		m.releases.Add(float64(len(h.Addrs)))
	}
}

// Released counts addresses that were freed without a DEL.
func (m *Metrics) Released(n int) { m.releases.Add(float64(n)) }

// Pass records one reconcile pass of the daemon, in seconds.
func (m *Metrics) Pass(seconds float64) { m.passes.Observe(seconds) }

// Part records whether a part of the node is right, and how many changes it took.
func (m *Metrics) Part(name string, ok bool, changes int) {
	v := 0.0
	if ok {
		v = 1
	}
	m.part.WithLabelValues(name).Set(v)
	m.corrections.WithLabelValues(name).Add(float64(changes))
}

// Peers records how many peers there are on each path.
func (m *Metrics) Peers(byPath map[string]int) {
	for path, n := range byPath {
		m.peers.WithLabelValues(path).Set(float64(n))
	}
}

// RearmPing counts one ping.
func (m *Metrics) RearmPing() { m.rearmPings.Inc() }
