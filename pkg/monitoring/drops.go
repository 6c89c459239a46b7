package monitoring

import "github.com/prometheus/client_golang/prometheus"

// drops exports the counters that read returns.
type drops struct{ read func() map[string]uint64 }

var dropsDesc = prometheus.NewDesc("headcni_guard_dropped_packets_total",
	"Packets that this node's rules dropped, by why: cluster_in_clear and tailnet_in_clear are 0 where the routing rules stand.", []string{"reason"}, nil)

// Describe implements prometheus.Collector.
func (d *drops) Describe(ch chan<- *prometheus.Desc) { ch <- dropsDesc }

// Collect implements prometheus.Collector.
func (d *drops) Collect(ch chan<- prometheus.Metric) {
	for reason, n := range d.read() {
		ch <- prometheus.MustNewConstMetric(dropsDesc, prometheus.CounterValue, float64(n), reason)
	}
}
