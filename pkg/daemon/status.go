package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/monitoring"
	"github.com/headcni/headcni/pkg/tailscale"
)

// Status is what a running daemon knows of its node.
type Status struct {
	Version string `json:"version"`
	Ready   bool   `json:"ready"`
	// Mode is host or daemon, "" while auto has found no tailscaled.
	Mode string `json:"mode"`
	// Tun is the tailnet's interface, TunMTU its MTU in bytes, 0 while it has not been seen.
	Tun    string `json:"tun"`
	TunMTU int    `json:"tunMTU"`
	// Parts are those of the node, with the error and remedy of each that is not right.
	Parts []monitoring.PartStatus `json:"parts"`
	CIDRs []CIDRStatus            `json:"podCIDRs"`
	// Tailnet is nil while tailscaled does not answer.
	Tailnet *TailnetStatus `json:"tailnet,omitempty"`
}

// CIDRStatus tells how far the tailnet knows one of our pod CIDRs.
type CIDRStatus struct {
	CIDR       netip.Prefix `json:"cidr"`
	Advertised bool         `json:"advertised"`
	// Approved means that Headscale routes it to this node.
	Approved bool `json:"approved"`
}

// TailnetStatus is this node's place in the tailnet.
type TailnetStatus struct {
	Version    string       `json:"tailscaled"`
	State      string       `json:"state"`
	ControlURL string       `json:"controlURL"`
	Name       string       `json:"name"`
	IPs        []netip.Addr `json:"ips"`
	// KeyExpiry is when the node key expires, nil = never.
	KeyExpiry *time.Time `json:"keyExpiry,omitempty"`
	// Health holds what tailscaled itself complains of.
	Health []string     `json:"health,omitempty"`
	Peers  []PeerStatus `json:"peers"`
}

// PeerStatus is another node of the tailnet.
type PeerStatus struct {
	Name string       `json:"name"`
	IPs  []netip.Addr `json:"ips"`
	// Path is direct, relayed, idle or offline; Endpoint the address or the relay behind it.
	Path     string `json:"path"`
	Endpoint string `json:"endpoint,omitempty"`
	// Routes are what the tailnet routes to the peer; PodCIDRs those of them that are pods to us.
	Routes   []netip.Prefix `json:"routes,omitempty"`
	PodCIDRs []netip.Prefix `json:"podCIDRs,omitempty"`
}

// status gathers it from the last pass and, for what changes by the second, from tailscaled.
func (d *Daemon) status(ctx context.Context) Status {
	ready, parts := d.board.Ready()
	d.mu.Lock()
	s := Status{Version: d.version, Ready: ready, Parts: parts, Mode: d.last.mode, Tun: d.last.tun, TunMTU: d.last.tunMTU}
	approved := slices.Clone(d.confirmed)
	network := d.last.config.Network
	d.mu.Unlock()
	own := network.PodCIDRs.Prefixes()
	t, prefs := d.member.look(ctx)
	if t != nil {
		approved = append(approved, t.Self.Routes...)
		s.Tailnet = tailnetStatus(*t, prefs, union(own, network.ClusterCIDRs.Prefixes(), network.RemoteCIDRs.Prefixes()))
	}
	for _, p := range own {
		s.CIDRs = append(s.CIDRs, CIDRStatus{
			CIDR: p, Advertised: slices.Contains(prefs.AdvertiseRoutes, p), Approved: slices.Contains(approved, p),
		})
	}
	return s
}

func tailnetStatus(t tailscale.Status, prefs tailscale.Prefs, cluster []netip.Prefix) *TailnetStatus {
	out := &TailnetStatus{
		Version: t.Version, State: t.State, ControlURL: prefs.ControlURL, Name: t.Self.Name, IPs: t.Self.IPs, Health: t.Health,
		Peers: []PeerStatus{},
	}
	if !t.Self.KeyExpiry.IsZero() {
		out.KeyExpiry = &t.Self.KeyExpiry
	}
	for _, p := range t.Peers {
		peer := PeerStatus{Name: p.Name, IPs: p.IPs, Path: p.Path(), Routes: p.Routes}
		switch peer.Path {
		case "direct":
			peer.Endpoint = p.CurAddr
		case "relayed":
			peer.Endpoint = p.Relay
		}
		for _, r := range p.Routes {
			if slices.ContainsFunc(cluster, func(c netip.Prefix) bool { return c.Bits() <= r.Bits() && c.Contains(r.Addr()) }) {
				peer.PodCIDRs = append(peer.PodCIDRs, r)
			}
		}
		out.Peers = append(out.Peers, peer)
	}
	return out
}

// serveAPI answers GET /status on paths.APISocket, which only root can open, until ctx ends.
func (d *Daemon) serveAPI(ctx context.Context) error {
	if err := removeFile(paths.APISocket); err != nil {
		return err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: paths.APISocket, Net: "unix"})
	if err != nil {
		return err
	}
	l.SetUnlinkOnClose(false) // the next daemon's may be there by then
	if err := os.Chmod(paths.APISocket, 0o600); err != nil {
		l.Close()
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(d.status(r.Context())) // the client has gone
	})
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	stop := context.AfterFunc(ctx, func() { srv.Close() })
	defer stop()
	// From here on `headcni-daemon status` finds somebody: it may come right after `systemctl start`.
	if err := tellSystemd(d.member.getenv("NOTIFY_SOCKET"), "READY=1"); err != nil {
		d.log.Warn("tell systemd that the daemon is up", "err", err)
	}
	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// tellSystemd sends a state to the service manager's socket, as sd_notify(3) says; none is no error.
func tellSystemd(socket, state string) error {
	if socket == "" {
		return nil
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = c.Write([]byte(state))
	return err
}

// AskStatus asks the running daemon.
func AskStatus(ctx context.Context) (Status, error) {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	client := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", paths.APISocket)
	}}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://daemon/status", nil)
	if err != nil {
		return Status{}, err
	}
	resp, err := client.Do(req)
	switch {
	case errors.Is(err, os.ErrPermission):
		return Status{}, errors.New("ask the daemon: only root may: run it with sudo")
	case err != nil:
		return Status{}, fmt.Errorf("ask the daemon: %w; is headcni-daemon running? (systemctl status headcni-daemon)", errors.Unwrap(err))
	}
	defer resp.Body.Close()
	var s Status
	if err := json.NewDecoder(resp.Body).Decode(&s); err != nil {
		return Status{}, fmt.Errorf("ask the daemon: %w", err)
	}
	return s, nil
}
