package controller

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/headcni/headcni/pkg/monitoring"
)

// metrics are the controller's.
type metrics struct {
	registry *prometheus.Registry

	leader    prometheus.Gauge
	headscale prometheus.Gauge
	nodes     *prometheus.GaugeVec
	findings  *prometheus.GaugeVec
	joinKey   prometheus.Gauge
	apiKey    prometheus.Gauge
	passes    *prometheus.CounterVec
}

func newMetrics(version string) *metrics {
	m := &metrics{
		leader: prometheus.NewGauge(prometheus.GaugeOpts{Name: "headcni_controller_leader", Help: "1 where this controller leads."}),
		headscale: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "headcni_controller_headscale_up", Help: "1 where Headscale answered the leader's last call.",
		}),
		nodes: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "headcni_controller_nodes", Help: "Nodes by how Headscale sees them: routed, pending, refused, unknown, unseen, or unjoined.",
		}, []string{"state"}),
		findings: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "headcni_policy_findings", Help: "1 for each thing in Headscale that somebody should see to, by what was checked.",
		}, []string{"check"}),
		joinKey: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "headcni_join_key_expiry_timestamp_seconds", Help: "When the key that nodes join with expires, 0 where it is not known.",
		}),
		apiKey: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "headcni_headscale_api_key_expiry_timestamp_seconds", Help: "When the API key for Headscale expires, 0 where it is not known or never does.",
		}),
		passes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "headcni_controller_passes_total", Help: "Passes of the leader by result: right or failed.",
		}, []string{"result"}),
	}
	m.registry = monitoring.NewRegistry(version, m.leader, m.headscale, m.nodes, m.findings, m.joinKey, m.apiKey, m.passes)
	for _, result := range []string{"right", "failed"} {
		m.passes.WithLabelValues(result)
	}
	for _, check := range checks {
		m.findings.WithLabelValues(check)
	}
	return m
}
