package monitoring

import "github.com/prometheus/client_golang/prometheus"

// conntrack exports how many connections the kernel follows, how many it may, and how often there was no room for a new one: what read
// returns, and nothing where there is no such table.
type conntrack struct {
	read func() (entries, most, full uint64, err error)
}

var (
	conntrackEntriesDesc = prometheus.NewDesc("headcni_conntrack_entries", "Connections that the kernel follows, of the whole node.", nil, nil)
	conntrackMaxDesc     = prometheus.NewDesc("headcni_conntrack_max_entries", "How many connections the kernel may follow (net.netfilter.nf_conntrack_max).", nil, nil)
	conntrackFullDesc    = prometheus.NewDesc("headcni_conntrack_full_total", "Packets of new connections that were dropped, and connections that had to go for new ones.", nil, nil)
)

// Describe implements prometheus.Collector.
func (c *conntrack) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{conntrackEntriesDesc, conntrackMaxDesc, conntrackFullDesc} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c *conntrack) Collect(ch chan<- prometheus.Metric) {
	entries, most, full, err := c.read()
	if err != nil || most == 0 {
		return // the daemon's own look says why
	}
	ch <- prometheus.MustNewConstMetric(conntrackEntriesDesc, prometheus.GaugeValue, float64(entries))
	ch <- prometheus.MustNewConstMetric(conntrackMaxDesc, prometheus.GaugeValue, float64(most))
	ch <- prometheus.MustNewConstMetric(conntrackFullDesc, prometheus.CounterValue, float64(full))
}
