package nft

import (
	"net/netip"
	"runtime"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nstest"
)

// BenchmarkSources sends datagrams from a pod to another of its node, in bursts with and without the cache of pods' sources, in turn. It
// tells the time for one, of the fastest tenth of the bursts of each, and their ratio.
func BenchmarkSources(b *testing.B) {
	w := newWorld(b)
	w.sync(typical())
	for family, a := range worldAddrs {
		b.Run(family, func(b *testing.B) {
			send, receive := w.socket(w.podA, a.podA), w.socket(w.podB, a.podB)
			to := sockaddr(a.podB)
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			const burst = 400
			text := make([]byte, 64)
			var with, without []time.Duration
			for b.Loop() {
				for _, known := range []bool{true, false} {
					sources := map[int][]netip.Addr{}
					if known {
						sources = w.sources()
					}
					w.say(w.tables, sources)
					began := time.Now()
					for range burst {
						if err := unix.Sendto(send, text, 0, to); err != nil {
							b.Fatal(err)
						}
						if _, err := unix.Read(receive, text); err != nil {
							b.Fatal(err)
						}
					}
					took := time.Since(began) / burst
					if known {
						with = append(with, took)
					} else {
						without = append(without, took)
					}
				}
			}
			fast := func(all []time.Duration) float64 {
				slices.Sort(all)
				return float64(all[len(all)/10].Nanoseconds())
			}
			b.ReportMetric(fast(with), "ns/with")
			b.ReportMetric(fast(without), "ns/without")
			b.ReportMetric(fast(with)/fast(without), "with/without")
		})
	}
}

// socket is a UDP socket of a pod's, which has only that much time to read.
func (w *world) socket(pod *nstest.NS, a netip.Addr) (fd int) {
	w.t.Helper()
	pod.Do(w.t, func() (err error) {
		family := unix.AF_INET
		if a.Is6() {
			family = unix.AF_INET6
		}
		if fd, err = unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5}); err != nil {
			return err
		}
		return unix.Bind(fd, sockaddr(a))
	})
	w.t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func sockaddr(a netip.Addr) unix.Sockaddr {
	if a.Is4() {
		return &unix.SockaddrInet4{Port: testPort, Addr: a.As4()}
	}
	return &unix.SockaddrInet6{Port: testPort, Addr: a.As16()}
}
