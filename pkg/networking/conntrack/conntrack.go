// Package conntrack finds that the kernel's table of connections is full: then packets that begin connections of pods are dropped, and
// nobody is told.
package conntrack

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/sysctl"
	"github.com/headcni/headcni/pkg/findings"
	"github.com/headcni/headcni/pkg/reconcile"
)

const (
	countKey = "net/netfilter/nf_conntrack_count"
	maxKey   = "net/netfilter/nf_conntrack_max"
)

// Usage is how full the table of the calling thread's network namespace is. All is 0 where the kernel has none.
type Usage struct {
	// Entries are connections, of any state and both families, Max how many there may be.
	Entries, Max uint64
	// Dropped are packets that were dropped since they could not begin a connection, Evicted connections that had to go for new ones
	// before their time. Both count since the namespace was made, and start again at 2^32 for each CPU. A kernel without ctnetlink tells
	// neither.
	Dropped, Evicted uint64
}

// Look asks the kernel.
func Look() (u Usage, err error) {
	if u.Entries, err = number(countKey); errors.Is(err, fs.ErrNotExist) {
		return Usage{}, nil // the kernel follows no connections
	}
	if err == nil {
		u.Max, err = number(maxKey)
	}
	if err != nil {
		return Usage{}, err
	}
	u.Dropped, u.Evicted, err = counters()
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPROTONOSUPPORT) {
		err = nil // no ctnetlink: what the sysctls say is enough for a finding
	}
	return u, err
}

// Totals are for a scrape: full is how often there was no room for a new connection.
func Totals() (entries, most, full uint64, err error) {
	u, err := Look()
	return u.Entries, u.Max, u.Dropped + u.Evicted, err
}

func number(key string) (uint64, error) {
	text, err := sysctl.Read(key)
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("read %s: %w", key, err)
	}
	return n, nil
}

// Parts of the kernel's ABI (linux/netfilter/nfnetlink_conntrack.h) that no package has.
const (
	getStatsCPU  = unix.NFNL_SUBSYS_CTNETLINK<<8 | 4 // IPCTNL_MSG_CT_GET_STATS_CPU
	attrDrop     = 10                                // CTA_STATS_DROP
	attrEvicted  = 11                                // CTA_STATS_EARLY_DROP
	nfgenmsgSize = 4
)

// counters adds up what the kernel counts for each CPU.
func counters() (dropped, evicted uint64, err error) {
	r := nl.NewNetlinkRequest(getStatsCPU, unix.NLM_F_DUMP)
	r.AddData(&nl.Nfgenmsg{NfgenFamily: unix.AF_UNSPEC, Version: nl.NFNETLINK_V0})
	answers, err := r.Execute(unix.NETLINK_NETFILTER, 0)
	for _, a := range answers {
		d, e, err := decode(a)
		if err != nil {
			return 0, 0, err
		}
		dropped, evicted = dropped+uint64(d), evicted+uint64(e)
	}
	if err != nil {
		return 0, 0, fmt.Errorf("read conntrack's counters: %w", err)
	}
	return dropped, evicted, nil
}

// decode reads the counters of one CPU.
func decode(b []byte) (dropped, evicted uint32, err error) {
	if len(b) < nfgenmsgSize {
		return 0, 0, fmt.Errorf("read conntrack's counters: an answer of %d bytes", len(b))
	}
	attrs, err := nl.ParseRouteAttr(b[nfgenmsgSize:])
	if err != nil {
		return 0, 0, fmt.Errorf("read conntrack's counters: %w", err)
	}
	for _, a := range attrs {
		if len(a.Value) < 4 {
			continue
		}
		switch a.Attr.Type {
		case attrDrop:
			dropped = binary.BigEndian.Uint32(a.Value)
		case attrEvicted:
			evicted = binary.BigEndian.Uint32(a.Value)
		}
	}
	return dropped, evicted, nil
}

// recently is how long a table counts as full after it was: it fills and empties by bursts, which a look can miss.
const recently = 5 * time.Minute

// Watch says what is wrong with the table. The zero value is ready. It is not for several goroutines at once.
type Watch struct {
	look func() (Usage, error) // nil means Look
	now  func() time.Time      // nil means time.Now

	last      Usage
	seen      bool
	high      bool
	fullUntil time.Time
}

// Err looks, and is nil while there is room. The text stays the same while nothing changes but numbers.
func (w *Watch) Err() error {
	look, now := w.look, w.now
	if look == nil {
		look, now = Look, time.Now
	}
	u, err := look()
	if err != nil {
		return err
	}
	// At nine tenths it is said, and until there are two tenths of room again.
	w.high = u.Entries*10 >= u.Max*9 && u.Max > 0 || w.high && u.Entries*10 >= u.Max*8
	// A packet is also dropped where two flows begin as one, and nothing is evicted but from a table that is full.
	if w.seen && (u.Evicted > w.last.Evicted || w.high && u.Dropped > w.last.Dropped) || u.Entries >= u.Max && u.Max > 0 {
		w.fullUntil = now().Add(recently)
	}
	w.last, w.seen = u, true
	raise := fmt.Sprintf("allow more: `sysctl -w net.netfilter.nf_conntrack_max=%d`", 2*u.Max)
	switch {
	case now().Before(w.fullUntil):
		return findings.Errorf(findings.ConntrackFull, "the kernel's table of connections was full within the last %s: new connections of pods, and of the node, get no answer; %s",
			recently, raise)
	case w.high:
		return reconcile.Warning{Err: findings.Errorf(findings.ConntrackFull,
			"the kernel's table of connections is nearly full: when it is, new connections of pods, and of the node, get no answer; %s", raise)}
	}
	return nil
}
