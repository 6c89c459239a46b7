package why

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/headcni/headcni/internal/golden"
	"github.com/headcni/headcni/pkg/findings"
	"github.com/headcni/headcni/pkg/tailscale"
)

func ips(n byte) []netip.Addr { return []netip.Addr{netip.AddrFrom4([4]byte{100, 64, 0, n})} }

func routes(n byte) []netip.Prefix {
	return []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, n, 0}), 24)}
}

// meshOf is a cluster of three nodes and a laptop: one pair goes by a relay, one node does not answer.
func meshOf() Mesh {
	peer := func(n byte, name, path, by string, ms float64) Peer {
		return Peer{Name: name, IPs: ips(n), Path: path, Endpoint: by, Millis: ms, Routes: routes(n), Node: true}
	}
	laptop := Peer{Name: "laptop", IPs: ips(9), Path: pathOffline}
	return NewMesh("1", []Row{
		{Node: "fra-1", Peers: Peers{Name: "fra-1-x", IPs: ips(1), State: tailscale.Running, Peers: []Peer{
			peer(2, "fra-2-x", pathDirect, "203.0.113.2:41641", 0.61), peer(3, "home-x", pathDirect, "203.0.113.3:41641", 18.2), laptop}}},
		{Node: "fra-2", Peers: Peers{Name: "fra-2-x", IPs: ips(2), State: tailscale.Running, Peers: []Peer{
			peer(1, "fra-1-x", pathDirect, "203.0.113.1:41641", 0.63), peer(3, "home-x", pathRelayed, "fra", 84.4), laptop}}},
		{Node: "home", Peers: Peers{Name: "home-x", IPs: ips(3), State: tailscale.Running, Peers: []Peer{
			peer(1, "fra-1-x", pathDirect, "203.0.113.1:41641", 18.4), peer(2, "fra-2-x", pathSilent, "", 0), laptop}}},
		{Node: "gone", Error: "ask pod headcni-x: no answer in time"},
	})
}

func TestMesh(t *testing.T) {
	m := meshOf()
	var got []string
	for _, f := range m.Findings {
		got = append(got, f.Where+" "+string(f.ID)+" "+f.Cause)
	}
	want := []string{"fra-2 HC401 home is reached by the relay fra, in 84 ms", "home HC406 fra-2 is online and does not answer", "gone HC121 ask pod headcni-x: no answer in time"}
	if diff := cmp.Diff(want, got); diff != "" || m.OK || m.Warnings() != 1 {
		t.Error(diff, m.OK, m.Warnings())
	}
	if m := NewMesh("1", m.Nodes[:2]); !m.OK || m.Warnings() != 1 || m.Findings[0].ID != findings.PeerRelayed {
		t.Errorf("without the others: %+v", m.Findings)
	}
}

func TestMeshText(t *testing.T) {
	var b strings.Builder
	m := meshOf()
	many := NewMesh("1", m.Nodes)
	for i, n := range many.Nodes {
		many.Nodes[i].Node = n.Node + ".a-long-domain.example.com"
	}
	for _, c := range []struct {
		title string
		print func() error
	}{
		{"table", func() error { return meshOf().Table(&b, 0) }},
		{"a node alone", func() error { return NewMesh("1", meshOf().Nodes[1:2]).Table(&b, 0) }},
		{"a node that could not be asked", func() error { return NewMesh("1", meshOf().Nodes[3:]).Table(&b, 0) }},
		{"more than fit", func() error { return many.Table(&b, 0) }},
		{"dot", func() error { return meshOf().Dot(&b) }},
		{"mermaid", func() error { return meshOf().Mermaid(&b) }},
	} {
		b.WriteString("== " + c.title + "\n")
		if err := c.print(); err != nil {
			t.Fatal(err)
		}
	}
	golden.Check(t, "testdata/peers.txt", b.String())
	for line := range strings.Lines(b.String()) {
		if utf8.RuneCountInString(line) > 81 || strings.Contains(line, "\x1b") {
			t.Errorf("too wide, or with colours: %q", line)
		}
	}
	if got := quote(`a" b\` + "\n"); got != `"a' b/; "` {
		t.Errorf("quoted: %s", got)
	}
}

// pinged is a tailscaled that answers pings in turn.
type pinged struct {
	status tailscale.Status
	pongs  []tailscale.Pong // the zero Pong: no answer
	asked  []netip.Addr
}

func (p *pinged) Status(context.Context) (tailscale.Status, error) { return p.status, nil }

func (p *pinged) Ping(_ context.Context, to netip.Addr, _ int) (tailscale.Pong, error) {
	p.asked = append(p.asked, to)
	pong := p.pongs[0]
	if p.pongs = p.pongs[1:]; pong == (tailscale.Pong{}) {
		return pong, errors.New("no answer")
	}
	return pong, nil
}

// Only who leads somewhere is pinged, until it answers directly.
func TestAskPeers(t *testing.T) {
	relay, direct := tailscale.Pong{Relay: "fra", Latency: 80 * time.Millisecond}, tailscale.Pong{Endpoint: "203.0.113.2:41641", Latency: 1500 * time.Microsecond}
	for name, c := range map[string]struct {
		pongs []tailscale.Pong
		want  Peer
	}{
		"direct at once":         {[]tailscale.Pong{direct}, Peer{Path: pathDirect, Endpoint: direct.Endpoint, Millis: 1.5}},
		"direct after the relay": {[]tailscale.Pong{relay, {}, direct}, Peer{Path: pathDirect, Endpoint: direct.Endpoint, Millis: 1.5}},
		"by the relay":           {[]tailscale.Pong{relay, relay, {}}, Peer{Path: pathRelayed, Endpoint: "fra", Millis: 80}},
		"silent":                 {[]tailscale.Pong{{}, {}, {}}, Peer{Path: pathSilent}},
	} {
		synctest.Test(t, func(t *testing.T) {
			own := tailscale.Peer{Tags: []string{"tag:headcni"}}
			node := tailscale.Peer{Name: "b", IPs: ips(2), Routes: routes(2), Online: true}
			tail := &pinged{pongs: c.pongs, status: tailscale.Status{State: tailscale.Running, Self: own, Peers: []tailscale.Peer{
				node, {Name: "laptop", IPs: ips(9), Online: true}, {Name: "off", IPs: ips(8), Tags: own.Tags}, {Name: "asleep", IPs: ips(7), Active: true}}}}
			got, err := AskPeers(t.Context(), tail)
			want := c.want
			want.Name, want.IPs, want.Routes, want.Node = "b", ips(2), routes(2), true
			if diff := cmp.Diff(want, got.Peers[0], cmp.Comparer(func(a, b netip.Addr) bool { return a == b }), cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); err != nil || diff != "" {
				t.Errorf("%s: %v %s", name, err, diff)
			}
			if got.Peers[1].Path != "idle" || got.Peers[2].Path != pathOffline || !got.Peers[2].Node || got.Peers[3].Path != pathOffline || got.Peers[3].Node || len(tail.pongs) != 0 {
				t.Errorf("%s: %+v, %v", name, got.Peers[1:], tail.pongs)
			}
		})
	}
}
