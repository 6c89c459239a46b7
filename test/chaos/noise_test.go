package chaos

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
	"github.com/headcni/headcni/internal/nstest"
)

// silence is what a pod does not send to.
type silence uint

const (
	toTailnet silence = 1 << iota
	toOutside         // services too
)

// hushed is what nothing is promised for while faults on a node last, but for those that take all lines at once, whose packets are
// judged one by one. What hides a pod's source from the outside, and keeps services that
// nobody has from it, are our tables alone; tailnet addresses have rules as well.
func hushed(r round) (s silence) {
	switch l := r.taken(); {
	case l&tables != 0 && l&rules != 0:
		return toTailnet | toOutside
	case l&tables != 0:
		return toOutside
	}
	return 0
}

// noise is a pod that goes on sending to addresses of nobody, of the tailnet, of services and outside: none of it may be seen on a wire
// with the pod's source, or at all.
type noise struct {
	mu    sync.Mutex // is held while it sends
	quiet silence
	over  chan struct{}
	ended chan struct{}
}

const noiseEach = 50 * time.Millisecond

// startNoise has a node's second pod make noise.
func (w *world) startNoise(n *node) {
	z := &noise{over: make(chan struct{}), ended: make(chan struct{})}
	n.noise = z
	from := n.stay[1]
	go func() {
		defer close(z.ended)
		for v6 := false; ; v6 = !v6 {
			z.send(from, v6)
			select {
			case <-z.over:
				return
			case <-time.After(noiseEach):
			}
		}
	}()
}

// hush keeps from sending, and waits for what is being sent.
func (z *noise) hush(s silence) {
	z.mu.Lock()
	defer z.mu.Unlock()
	z.quiet = s
}

func (z *noise) end() {
	if z != nil {
		close(z.over)
		<-z.ended
	}
}

// outside are a service that nobody has made a pod of, and hosts of documentation networks.
var outside = [][]netip.Addr{
	{netip.MustParseAddr("10.96.0.10"), netip.MustParseAddr("192.0.2.7")},
	{netip.MustParseAddr("fd00:96::a"), netip.MustParseAddr("2001:db8::7")},
}

// send sends a datagram and a packet of any shape to each.
func (z *noise) send(from *lab.Pod, v6 bool) {
	z.mu.Lock()
	defer z.mu.Unlock()
	to := labtest.OfNobody(v6)
	if z.quiet&toTailnet == 0 {
		to = slices.Concat(to, labtest.OfTailnet(v6))
	}
	if z.quiet&toOutside == 0 {
		to = slices.Concat(to, outside[labtest.Index(v6)])
	}
	// What cannot be sent is as good as nothing on the wire.
	_ = labtest.Scatter(from, to...)
	_ = from.Do(func() error {
		for _, a := range to {
			for _, packet := range nstest.Shapes(from.Addr(v6), a, uint16(30000+rand.N(30000))) {
				_ = nstest.Send(packet)
				break // the first of a map is any
			}
		}
		return nil
	})
}
