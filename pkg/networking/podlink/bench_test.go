package podlink

import (
	"log/slog"
	"testing"

	"github.com/headcni/headcni/internal/nstest"
)

// BenchmarkAttach is the kernel's part of ADD, dual stack. Detach, which waits for an RCU grace period, is not counted.
func BenchmarkAttach(b *testing.B) {
	n := node{host: nstest.New(b), pod: nstest.New(b)}
	log := slog.New(slog.DiscardHandler)
	n.host.Do(b, func() error {
		for b.Loop() {
			var h Handle
			ns, err := h.OpenVacant(n.pod.Path, "eth0")
			if err != nil {
				return err
			}
			if _, err := h.Attach(log, ns, n.spec(addr4, addr6)); err != nil {
				return err
			}
			ns.Close()
			b.StopTimer()
			if _, err := h.Detach("c1", "eth0", n.pod.Path); err != nil {
				return err
			}
			h.Close()
			b.StartTimer()
		}
		return nil
	})
}

// BenchmarkOpenVacant is the look before ADD takes anything.
func BenchmarkOpenVacant(b *testing.B) {
	n := node{host: nstest.New(b), pod: nstest.New(b)}
	on(b, n.host, func(h *Handle) error {
		for b.Loop() {
			ns, err := h.OpenVacant(n.pod.Path, "eth0")
			if err != nil {
				return err
			}
			ns.Close()
		}
		return nil
	})
}
