package monitoring

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"sync"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/headcni/headcni/internal/atomicfile"
	"github.com/headcni/headcni/internal/trusted"
	"github.com/headcni/headcni/pkg/cmdlog"
)

// batch bounds how many records are counted in one step.
const batch = 1024

// setupBuckets are the upper bounds of the histogram of ADD, in seconds.
var setupBuckets = prometheus.ExponentialBuckets(0.001, 2, 14)

// totals are the four metrics of the specification. A restart of the daemon loses none of them: they are kept on the
// tmpfs on which the records are, until the next boot.
type totals struct {
	Allocations uint64            `json:"allocations"`
	Releases    uint64            `json:"releases"`
	Errors      map[string]uint64 `json:"errors"`
	// Setups counts ADDs by the bucket that they fell into; what is longer than the last bound is in one more.
	Setups   []uint64 `json:"setups"`
	SetupSum float64  `json:"setupSeconds"`
	// Counted are records in these totals whose files may still be in the spool.
	Counted []string `json:"counted,omitempty"`
}

func newTotals() totals {
	t := totals{Errors: map[string]uint64{}, Setups: make([]uint64, len(setupBuckets)+1)}
	for _, stage := range []string{"config", "gate", "ipam", "attach", "detach", "ports", "other"} {
		t.Errors[stage] = 0 // so that a rate is right from the first scrape
	}
	return t
}

func (t totals) clone() totals {
	t.Errors, t.Setups, t.Counted = maps.Clone(t.Errors), slices.Clone(t.Setups), slices.Clone(t.Counted)
	return t
}

// add counts one finished command of the CNI plugin.
func (t *totals) add(r cmdlog.Record) {
	switch {
	case r.ErrorCode != 0 && r.Stage != "":
		t.Errors[r.Stage]++
	case r.ErrorCode != 0:
		t.Errors["other"]++
	case r.Command == "ADD":
		t.Allocations += uint64(len(r.Addrs))
		i, _ := slices.BinarySearch(setupBuckets, r.Duration.Seconds())
		t.Setups[i]++
		t.SetupSum += r.Duration.Seconds()
	case r.Command == "DEL":
		t.Releases += uint64(len(r.Addrs))
	}
}

// spoolCounter counts the plugin's records of the folder spool into totals, which it keeps in the file path. Where both are "", it counts
// in memory only.
type spoolCounter struct {
	path, spool string
	each        func(cmdlog.Record)
	log         func(error)

	mu sync.Mutex
	t  totals
}

// open reads the totals of an earlier daemon. Where they cannot be read, it starts from zero.
func (c *spoolCounter) open(path, spool string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.path, c.spool = path, spool
	if err := c.makeSpool(); err != nil {
		return err
	}
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read the kept metrics: %w", err)
	}
	t := newTotals()
	if json.Unmarshal(text, &t) == nil && len(t.Setups) == len(setupBuckets)+1 && t.Errors != nil {
		c.t = t
	}
	return nil
}

// makeSpool makes the folder that the plugin puts records into, also where somebody has wiped /run.
func (c *spoolCounter) makeSpool() error {
	if c.spool == "" {
		return nil
	}
	if err := trusted.MkdirAll(c.spool, 0o700); err != nil {
		return fmt.Errorf("make the spool of records: %w", err)
	}
	return nil
}

// countSpool counts what is in the spool. Killed between any two steps it counts nothing twice and leaves out nothing: a record is
// in the kept totals from the rename on, and its name beside it until its file is gone.
func (c *spoolCounter) countSpool() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.makeSpool(); err != nil {
		return err
	}
	for c.spool != "" {
		if err := cmdlog.RemoveSpooled(c.spool, c.t.Counted); err != nil {
			return fmt.Errorf("take records out of the spool: %w", err)
		}
		found, err := cmdlog.ReadSpool(c.spool, batch)
		if err != nil {
			return fmt.Errorf("read the spool of records: %w", err)
		}
		if len(found) == 0 {
			return nil
		}
		next := c.t.clone()
		next.Counted = nil
		for _, s := range found {
			c.each(s.Record)
			next.add(s.Record)
			next.Counted = append(next.Counted, s.Name)
		}
		if err := c.save(next); err != nil {
			return err
		}
	}
	return nil
}

// update changes the totals by what no record tells.
func (c *spoolCounter) update(do func(*totals)) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	next := c.t.clone()
	do(&next)
	return c.save(next)
}

// save writes the totals in one step and then uses them. A tmpfs needs no sync.
func (c *spoolCounter) save(next totals) error {
	if c.path != "" {
		text, err := json.Marshal(next)
		if err != nil {
			return err
		}
		if err := atomicfile.WriteUnsynced(c.path, text, 0o600); err != nil {
			return fmt.Errorf("keep the metrics: %w", err)
		}
	}
	c.t = next
	return nil
}

var (
	allocationsDesc = prometheus.NewDesc("headcni_ip_allocations_total", "Addresses given to pods.", nil, nil)
	releasesDesc    = prometheus.NewDesc("headcni_ip_releases_total", "Addresses taken back from pods.", nil, nil)
	errorsDesc      = prometheus.NewDesc("headcni_network_errors_total", "Failed network operations by what failed.", []string{"stage"}, nil)
	setupDesc       = prometheus.NewDesc("headcni_pod_network_setup_duration_seconds",
		"Duration of successful CNI ADD commands inside the plugin.", nil, nil)
)

// Describe implements prometheus.Collector.
func (c *spoolCounter) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{allocationsDesc, releasesDesc, errorsDesc, setupDesc} {
		ch <- d
	}
}

// Collect implements prometheus.Collector: a scrape has every command that has ended.
func (c *spoolCounter) Collect(ch chan<- prometheus.Metric) {
	if err := c.countSpool(); err != nil {
		c.log(err)
	}
	c.mu.Lock()
	t := c.t.clone()
	c.mu.Unlock()
	counter := func(d *prometheus.Desc, n uint64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(n), labels...)
	}
	counter(allocationsDesc, t.Allocations)
	counter(releasesDesc, t.Releases)
	for stage, n := range t.Errors {
		counter(errorsDesc, n, stage)
	}
	buckets, count := map[float64]uint64{}, uint64(0)
	for i, n := range t.Setups {
		if count += n; i < len(setupBuckets) {
			buckets[setupBuckets[i]] = count // they are cumulative
		}
	}
	ch <- prometheus.MustNewConstHistogram(setupDesc, count, t.SetupSum, buckets)
}
