package e2e

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/headcni/headcni/internal/cluster"
	"github.com/headcni/headcni/internal/lab"
)

const (
	// askAtOnce is how many questions of a pod wait for their answers, each on a socket of its own.
	askAtOnce = 8
	// askFor is how long a pod asks for one kind of name in a row, askRounds how often each kind has its turn.
	askFor, askRounds = 2 * time.Second, 9
)

// subject is a kind of name that a pod asks for.
type subject struct {
	what   string
	server netip.AddrPort
	// name is of question n.
	name func(n int) string
	want dnsmessage.RCode
}

// turn is what one pod got in one turn.
type turn struct {
	perSecond float64
	p99       time.Duration
}

// TestNamesSpeed measures how fast a pod is answered for names of the cluster and of the tailnet, by a CoreDNS on another node, with all
// kinds in turns: what CoreDNS knows by itself is what it does without HeadCNI.
func TestNamesSpeed(t *testing.T) {
	w := start(t, cluster.Options{ProxyMode: *proxyMode})
	w.apply(t, "echo.yaml", echoManifest)
	w.install(t, nil)
	eventually(t, "nodes", 2*time.Minute, w.WaitReady)
	eventually(t, "pods", 2*time.Minute, w.findPods)
	w.apply(t, "names.yaml", namesManifest)
	a := &askers{world: w, addresses: map[string][]string{}}
	a.find(t)
	server := netip.AddrPortFrom(netip.MustParseAddr(a.servers[0].Status.PodIP), 53)
	from := a.pods[slices.IndexFunc(a.pods, func(p *corev1.Pod) bool { return p.Spec.NodeName != a.servers[0].Spec.NodeName })]
	if err := w.Client.NetworkingV1().NetworkPolicies(from.Namespace).Delete(t.Context(), "dns-only", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	_, ns := w.sandbox(t, from)
	place, err := lab.NetAt(ns.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer place.Close()

	same := func(name string) func(int) string { return func(int) string { return name } }
	each := func(below string) func(int) string {
		return func(n int) string { return fmt.Sprintf("nobody-%d.%s", n, below) }
	}
	subjects := []subject{
		{"a Service", server, same("echo.e2e.svc.cluster.local"), dnsmessage.RCodeSuccess},
		{"a node", server, same(w.Nodes[1].Name + "." + lab.BaseDomain), dnsmessage.RCodeSuccess},
		{"no Service, each time another name", server, each("e2e.svc.cluster.local"), dnsmessage.RCodeNameError},
		{"no node, each time another name", server, each(lab.BaseDomain), dnsmessage.RCodeNameError},
	}
	for _, s := range subjects {
		eventually(t, s.what, 4*time.Minute, func(context.Context) error { return place.Do(func() error { _, err := s.ask(1, 0); return err }) })
	}
	turns := map[string][]turn{}
	for round := range askRounds {
		for _, s := range subjects {
			got, err := s.turn(place, round)
			if err != nil {
				t.Fatalf("%s: %v", s.what, err)
			}
			turns[s.what] = append(turns[s.what], got)
		}
	}
	table := "| A pod asks for | questions/s | p99 |\n|---|---|---|\n"
	for _, s := range subjects {
		perSecond := func(a turn) float64 { return a.perSecond }
		p99 := func(a turn) float64 { return a.p99.Seconds() * 1000 }
		table += fmt.Sprintf("| %s | %.0f | %.1f ms |\n", s.what, middle(turns[s.what], perSecond), middle(turns[s.what], p99))
	}
	t.Log("\n" + table)
}

// middle is the median of a figure of turns.
func middle(turns []turn, of func(turn) float64) float64 {
	var all []float64
	for _, a := range turns {
		all = append(all, of(a))
	}
	slices.Sort(all)
	return all[len(all)/2]
}

// turn asks until the time is over.
func (s subject) turn(place *lab.Net, round int) (turn, error) {
	var mu sync.Mutex
	var took []time.Duration
	errs := make([]error, askAtOnce)
	var wg sync.WaitGroup
	for i := range askAtOnce {
		wg.Go(func() {
			errs[i] = place.Do(func() error {
				mine, err := s.ask(1<<30, (round*askAtOnce+i)<<20)
				mu.Lock()
				defer mu.Unlock()
				took = append(took, mine...)
				return err
			})
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return turn{}, err
	}
	slices.Sort(took)
	return turn{perSecond: float64(len(took)) / askFor.Seconds(), p99: took[len(took)*99/100]}, nil
}

// ask asks one question after another, at most so many, and returns how long each answer took.
func (s subject) ask(most, first int) (took []time.Duration, err error) {
	c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(s.server))
	if err != nil {
		return nil, err
	}
	defer c.Close()
	buf := make([]byte, 1500)
	for end, n := time.Now().Add(askFor), first; n < first+most && time.Now().Before(end); n++ {
		q := dnsmessage.Message{
			Header: dnsmessage.Header{ID: uint16(n), RecursionDesired: true},
			Questions: []dnsmessage.Question{{
				Name: dnsmessage.MustNewName(s.name(n) + "."), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}},
		}
		packed, err := q.Pack()
		if err != nil {
			return nil, err
		}
		began := time.Now()
		if _, err := c.Write(packed); err != nil {
			return nil, err
		}
		if err := c.SetReadDeadline(began.Add(askFor)); err != nil {
			return nil, err
		}
		size, err := c.Read(buf)
		if err != nil {
			return nil, err
		}
		var p dnsmessage.Parser
		h, err := p.Start(buf[:size])
		if err != nil {
			return nil, err
		}
		if h.ID != uint16(n) || h.RCode != s.want {
			return nil, fmt.Errorf("%s: question %d is answered by %d with %s", s.name(n), uint16(n), h.ID, h.RCode)
		}
		took = append(took, time.Since(began))
	}
	return took, nil
}
