package monitoring

import "github.com/prometheus/client_golang/prometheus"

// Pool is how much of a network's addresses of one family is in use on this node.
type Pool struct {
	// Network is the CNI network's name, Family ipv4 or ipv6.
	Network, Family string
	InUse           float64
	// Size is the number of addresses that can be given, 0 where it is not known.
	Size float64
}

// pools exports the pools that read returns.
type pools struct{ read func() []Pool }

var (
	poolLabels = []string{"network", "family"}
	inUseDesc  = prometheus.NewDesc("headcni_ip_pool_addresses_in_use", "Addresses of this node's pool that pods have.", poolLabels, nil)
	sizeDesc   = prometheus.NewDesc("headcni_ip_pool_addresses", "Addresses that this node's pool can give to pods.", poolLabels, nil)
)

// Describe implements prometheus.Collector.
func (p *pools) Describe(ch chan<- *prometheus.Desc) {
	ch <- inUseDesc
	ch <- sizeDesc
}

// Collect implements prometheus.Collector.
func (p *pools) Collect(ch chan<- prometheus.Metric) {
	for _, f := range p.read() {
		ch <- prometheus.MustNewConstMetric(inUseDesc, prometheus.GaugeValue, f.InUse, f.Network, f.Family)
		if f.Size > 0 {
			ch <- prometheus.MustNewConstMetric(sizeDesc, prometheus.GaugeValue, f.Size, f.Network, f.Family)
		}
	}
}
