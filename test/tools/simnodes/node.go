package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"net/http"
	"net/netip"
	"time"

	"tailscale.com/control/ts2021"
	"tailscale.com/net/tsdial"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
	"tailscale.com/types/logger"
	"tailscale.com/util/backoff"
	"tailscale.com/util/zstdframe"
)

const (
	// maxBackoff is tailscaled's, for its control server; silence is how long it hears nothing before it polls anew.
	maxBackoff = 30 * time.Second
	silence    = 2 * time.Minute
	// relay is the region of Headscale's own relay in the tests.
	relay = 999
	// maxMap is more than any map is, packed.
	maxMap = 1 << 28
)

// node is one node. The fields below are the tailnet's, by its lock.
type node struct {
	newNode
	t    *tailnet
	key  key.NodePrivate
	disc key.DiscoPublic
	http *ts2021.Client

	began, first time.Time // to join, to poll
	polls        bool
	routes       map[netip.Prefix]bool // of others, now
	had          map[netip.Prefix]bool // of others, ever
}

func newNodeOf(t *tailnet, n newNode) (*node, error) {
	x := &node{newNode: n, t: t, key: key.NewNode(), disc: key.NewDisco().Public(), had: map[netip.Prefix]bool{}}
	var err error
	x.http, err = ts2021.NewClient(ts2021.ClientOpts{
		ServerURL: t.server, PrivKey: key.NewMachine(), ServerPubKey: t.serverKey, Dialer: tsdial.NewFromFuncForDebug(logger.Discard, t.dial), Logf: logger.Discard,
	})
	return x, err
}

// hostinfo is about as long as that of tailscaled.
func (x *node) hostinfo() *tailcfg.Hostinfo {
	return &tailcfg.Hostinfo{
		IPNVersion: "1.102.5", BackendLogID: "0000000000000000000000000000000000000000000000000000000000000000", OS: "linux", OSVersion: "6.1.0-40-amd64",
		Distro: "debian", DistroVersion: "12", DistroCodeName: "bookworm", Machine: "x86_64", GoArch: "amd64", GoVersion: "go1.26.6", Hostname: x.Name,
		RoutableIPs: []netip.Prefix{x.Route}, NetInfo: &tailcfg.NetInfo{PreferredDERP: relay},
	}
}

// register joins, and tries again until it has. Where the control server refuses, it says so.
func (x *node) register(ctx context.Context) {
	b := backoff.NewBackoff("register", logger.Discard, maxBackoff)
	for ctx.Err() == nil {
		err := x.tryRegister(ctx)
		if err == nil {
			return
		}
		if ctx.Err() == nil {
			log.Printf("%s: %v", x.Name, err)
		}
		b.BackOff(ctx, err)
	}
}

func (x *node) tryRegister(ctx context.Context) error {
	var answer tailcfg.RegisterResponse
	res, err := x.http.Post(ctx, "/machine/register", x.key.Public(), tailcfg.RegisterRequest{
		Version: tailcfg.CurrentCapabilityVersion, NodeKey: x.key.Public(), Auth: &tailcfg.RegisterResponseAuth{AuthKey: x.t.authKey}, Hostinfo: x.hostinfo(),
	})
	if err != nil {
		return fmt.Errorf("register: %w", err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("register: %s", res.Status)
	}
	if err := json.NewDecoder(res.Body).Decode(&answer); err != nil {
		return fmt.Errorf("register: %w", err)
	}
	if answer.Error != "" || !answer.MachineAuthorized {
		return fmt.Errorf("register: not taken: %s", answer.Error)
	}
	return nil
}

// poll keeps a poll open, as tailscaled does, until ctx ends.
func (x *node) poll(ctx context.Context) {
	b := backoff.NewBackoff("map", logger.Discard, maxBackoff)
	for ctx.Err() == nil {
		err := x.session(ctx, func() { b.BackOff(ctx, nil) })
		b.BackOff(ctx, err)
	}
}

func (x *node) ask(ctx context.Context, stream bool) (*http.Response, error) {
	res, err := x.http.Post(ctx, "/machine/map", x.key.Public(), tailcfg.MapRequest{
		Version: tailcfg.CurrentCapabilityVersion, NodeKey: x.key.Public(), DiscoKey: x.disc, Hostinfo: x.hostinfo(), Compress: "zstd",
		KeepAlive: stream, Stream: stream, OmitPeers: !stream,
		Endpoints: []netip.AddrPort{netip.AddrPortFrom(x.Route.Addr().Next(), 41641)}, EndpointTypes: []tailcfg.EndpointType{tailcfg.EndpointLocal},
	})
	if err == nil && res.StatusCode != http.StatusOK {
		res.Body.Close()
		err = errors.New(res.Status)
	}
	return res, err
}

// answer is what counts of a tailcfg.MapResponse.
type answer struct {
	Peers, PeersChanged []peer
	PeersRemoved        []int64
}

type peer struct {
	ID         int64
	AllowedIPs []netip.Prefix
}

// session is one poll: what comes is taken in until it ends.
func (x *node) session(ctx context.Context, heard func()) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	watchdog := time.AfterFunc(silence, cancel)
	defer watchdog.Stop()
	res, err := x.ask(ctx, true)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	routes := map[int64][]netip.Prefix{}
	for first := true; ; first = false {
		var a answer
		if err := x.next(res.Body, &a); err != nil {
			return err
		}
		watchdog.Reset(silence)
		heard()
		if first {
			x.t.begins(x)
			// tailscaled tells its endpoints and its relay once it has found them.
			if res, err := x.ask(ctx, false); err == nil {
				res.Body.Close()
			}
		}
		if len(a.Peers) > 0 {
			clear(routes)
		}
		for _, p := range append(a.Peers, a.PeersChanged...) {
			routes[p.ID] = p.AllowedIPs
		}
		for _, id := range a.PeersRemoved {
			delete(routes, id)
		}
		if first || len(a.Peers)+len(a.PeersChanged)+len(a.PeersRemoved) > 0 {
			x.t.has(x, maps.Values(routes))
		}
	}
}

// next reads one map: its length, and it, packed.
func (x *node) next(r io.Reader, a *answer) error {
	var length [4]byte
	if _, err := io.ReadFull(r, length[:]); err != nil {
		return err
	}
	n := binary.LittleEndian.Uint32(length[:])
	if n > maxMap {
		return fmt.Errorf("a map of %d bytes", n)
	}
	packed := make([]byte, n)
	if _, err := io.ReadFull(r, packed); err != nil {
		return err
	}
	x.t.decoding <- struct{}{}
	defer func() { <-x.t.decoding }()
	b, err := zstdframe.AppendDecode(nil, packed)
	if err != nil {
		return err
	}
	return json.Unmarshal(b, a)
}
