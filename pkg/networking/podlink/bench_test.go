package podlink

import (
	"testing"

	"github.com/headcni/headcni/internal/nstest"
)

// BenchmarkAttach is the kernel's part of ADD, dual stack. Detach, which waits for an RCU grace period, is not counted.
func BenchmarkAttach(b *testing.B) {
	n := node{host: nstest.New(b), pod: nstest.New(b)}
	n.host.Do(b, func() error {
		for b.Loop() {
			if _, err := (&Handle{}).Attach(n.spec(addr4, addr6)); err != nil {
				return err
			}
			b.StopTimer()
			if _, err := (&Handle{}).Detach("c1", "eth0"); err != nil {
				return err
			}
			b.StartTimer()
		}
		return nil
	})
}

// BenchmarkVacant is the look before ADD takes anything.
func BenchmarkVacant(b *testing.B) {
	n := node{host: nstest.New(b), pod: nstest.New(b)}
	n.host.Do(b, func() error {
		for b.Loop() {
			if err := (&Handle{}).Vacant(n.pod.Path, "eth0"); err != nil {
				return err
			}
		}
		return nil
	})
}
