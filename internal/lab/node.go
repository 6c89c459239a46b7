package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/paths"
)

// hostTun is the tun of a host's own tailscaled, as upstream's unit has it.
const hostTun = "tailscale0"

// KeyFile is where a node has the key for Headscale.
const KeyFile = "/etc/headcni/api-key"

// Node is a machine that joins the tailnet and holds pods.
type Node struct {
	*Machine
	// Mode is config.ModeHost or config.ModeDaemon.
	Mode string
	// PodCIDRs are the node's own, an IPv4 and an IPv6 one.
	PodCIDRs []netip.Prefix
	// Underlay are the node's addresses on the underlay, IPv4 first, where it has that; those of its router, where it has one.
	Underlay []netip.Addr
	// Tun is the name of tailscaled's interface, Port the one of the node on the underlay bridge.
	Tun, Port string

	// Routers are between the node and the underlay, the outermost last.
	Routers []*Router

	Tailscaled, Daemon *Process
	// Env is what the environment of the node's tailscaled has beside what the lab needs, as NAME=VALUE. Configure may set it.
	Env []string

	lab   *Lab
	index int
	disk  *os.File     // the mount namespace of a node that crashed
	front *http.Server // before the LocalAPI, where pings are refused
}

// plugIn says what node number i, from 0, is to be and plugs it into the underlay.
func (n *Node) plugIn(ctx context.Context, i int) error {
	n.index = i
	n.Mode, n.Port, n.Tun = n.lab.opt.Modes[i%len(n.lab.opt.Modes)], "port"+strconv.Itoa(i+1), hostTun
	if n.Mode == config.ModeDaemon {
		n.Tun = "headcni01"
	}
	host := i + 11
	for _, a := range n.lab.opt.outside(n.lab.opt.site(i), host) {
		n.Underlay = append(n.Underlay, a.Addr())
	}
	n.PodCIDRs = podCIDRs(i + 1)
	if err := n.addRouters(ctx); err != nil {
		return err
	}
	return n.plug(ctx, n.lab.Control.Machine)
}

// plug connects the node to the underlay.
func (n *Node) plug(ctx context.Context, control *Machine) error {
	if len(n.Routers) > 0 {
		return n.plugSite(ctx, control)
	}
	if err := n.Machine.plugBy(n.wire(), control, n.Port, n.lab.opt.UnderlayMTU); err != nil {
		return err
	}
	return n.configure("eth0", n.lab.opt.underlay(n.index+11), n.lab.opt.underlay(1))
}

// wireLinks are the links on the control host that make up the node's wire, but for their other ends.
func (n *Node) wireLinks() []string {
	if n.line == nil {
		return []string{n.Port}
	}
	return []string{n.Port, n.Port + "near"}
}

// wire is the node's, or its outermost router's, to the underlay.
func (n *Node) wire() (w Wire) {
	if len(n.Routers) > 0 {
		return n.Routers[0].Site.Wire
	}
	if d := n.lab.opt.Delays; len(d) > 0 {
		w.Delay = d[n.index%len(d)]
	}
	return w
}

// unplug ends what the lab itself does for the node.
func (n *Node) unplug() {
	if n.front != nil {
		_ = n.front.Close() // connections that are going anyway
		n.front = nil
	}
}

// podCIDRs are 10.244.N.0/24 and fd00:244:N::/64.
func podCIDRs(n int) []netip.Prefix {
	a4, a6 := ClusterCIDRs[0].Addr().As4(), ClusterCIDRs[1].Addr().As16()
	a4[2], a6[5] = byte(n), byte(n)
	return []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4(a4), 24), netip.PrefixFrom(netip.AddrFrom16(a6), 64)}
}

// install links the plugins into the node's CNI folder.
func (n *Node) install() error {
	for name, path := range n.lab.plugins() {
		if err := os.Symlink(path, filepath.Join(n.Path(paths.CNIBinDir), name)); err != nil {
			return fmt.Errorf("install %s on %s: %w", name, n.Name, err)
		}
	}
	return nil
}

// spare tells whether the lab leaves the node alone.
func (n *Node) spare() bool { return n.index >= n.lab.opt.Nodes-n.lab.opt.Spare }

// ConfigureDaemon writes the API key and daemon.yaml, as an administrator would. change, where it is not nil, may change
// the latter first.
func (n *Node) ConfigureDaemon(change func(n *Node, c map[string]any)) error {
	if err := os.WriteFile(n.Path(KeyFile), []byte(n.lab.Control.APIKey+"\n"), 0o600); err != nil {
		return err
	}
	headscale := object{"url": n.lab.Control.URL, "apiKeyFile": KeyFile}
	if n.lab.opt.TLS {
		if err := n.lab.Control.trust(n.Machine); err != nil {
			return err
		}
		headscale["caFile"] = CAFile
	}
	if proxy := n.proxy(); proxy != "" {
		headscale["proxy"] = proxy
	}
	c := object{
		"headscale": headscale,
		"tailscale": object{"mode": n.Mode},
		"network":   object{"podCIDRs": n.PodCIDRs, "clusterCIDRs": ClusterCIDRs},
	}
	if change != nil {
		change(n, c)
	}
	b, err := json.Marshal(c) // JSON is valid YAML
	if err != nil {
		return err
	}
	return os.WriteFile(n.Path(paths.ConfigFile), b, 0o644)
}

// tailscaledEnv makes an offline tailnet work: the embedded DERP server speaks plain HTTP here, or has a certificate of its own.
func (n *Node) tailscaledEnv() []string {
	env := append([]string{"TS_NO_LOGS_NO_SUPPORT=true"}, n.Env...)
	if n.lab.opt.TLS {
		return append(env, "SSL_CERT_FILE="+CAFile)
	}
	return append(env, "TS_DEBUG_USE_DERP_HTTP=true")
}

// StartTailscaled starts the node's tailscaled: the host's own, or in daemon mode the dedicated one.
func (n *Node) StartTailscaled() (err error) {
	if n.Mode == config.ModeDaemon {
		env := append(n.tailscaledEnv(), "HEADCNI_TAILSCALED="+n.lab.dedicatedTailscaled())
		if n.lab.opt.NoPings {
			if err := n.refusePings(); err != nil {
				return fmt.Errorf("put a proxy before the LocalAPI of %s: %w", n.Name, err)
			}
			env = append(env, "HEADCNI_TAILSCALE_SOCKET="+behindSocket)
		}
		n.Tailscaled, err = n.Start(n.lab.ours("headcni-daemon"), env, "tailscaled")
		return err
	}
	// As the unit in tailscale's packages has it.
	if err := os.MkdirAll(n.Path("/run/tailscale"), 0o755); err != nil {
		return err
	}
	env := n.tailscaledEnv()
	if proxy := n.proxy(); proxy != "" {
		env = append(env, "HTTPS_PROXY="+proxy)
	}
	n.Tailscaled, err = n.Start("tailscaled", env, "--state=/var/lib/tailscale/tailscaled.state",
		"--socket="+paths.HostTailscaleSocket, "--tun="+hostTun, fmt.Sprintf("--port=%d", tailscaledPort), "--no-logs-no-support")
	return err
}

// Socket is the LocalAPI socket of the node's tailscaled, on the node.
func (n *Node) Socket() string {
	if n.Mode == config.ModeDaemon {
		return paths.DaemonTailscaleSocket
	}
	return paths.HostTailscaleSocket
}

// WaitSocket waits until tailscaled listens: mode auto looks for it once.
func (n *Node) WaitSocket(ctx context.Context) error {
	return until(ctx, 10*time.Millisecond, n.Tailscaled, func() error {
		c, err := dial(ctx, namespaces{mnt: n.ns.mnt}, "unix", n.Socket())
		if err != nil {
			return err
		}
		return c.Close()
	})
}

// StartDaemon starts headcni-daemon. It does not wait; see WaitReady.
func (n *Node) StartDaemon() (err error) {
	n.Daemon, err = n.Start(n.lab.ours("headcni-daemon"), nil, "run")
	return err
}

// WaitReady waits until the daemon says that every part of the node is right.
func (n *Node) WaitReady(ctx context.Context) error {
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DialContext: n.Dial, DisableKeepAlives: true}}
	err := until(ctx, 20*time.Millisecond, n.Daemon, func() error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://127.0.0.1:9669/readyz", nil)
		if err != nil {
			return err
		}
		resp, err := client.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			body, err := io.ReadAll(resp.Body)
			return errors.Join(errors.New(string(body)), err)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("wait until %s is ready: %w", n.Name, err)
	}
	return nil
}

// TailnetAddrs are the addresses of the tun, IPv4 first. They are gone while tailscaled is dead.
func (n *Node) TailnetAddrs() ([]netip.Addr, error) {
	link, err := n.Net.LinkByName(n.Tun)
	if err != nil {
		return nil, fmt.Errorf("look for %s on %s: %w", n.Tun, n.Name, err)
	}
	var addrs []netip.Addr
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		list, err := n.Net.AddrList(link, family)
		if err != nil {
			return nil, err
		}
		for _, a := range list {
			if ip, ok := netip.AddrFromSlice(a.IP); ok && !ip.Unmap().IsLinkLocalUnicast() {
				addrs = append(addrs, ip.Unmap())
			}
		}
	}
	return addrs, nil
}

// WaitRoutes waits until the kernel sends what is meant for the pods of all other nodes, but spare ones, into the tun.
func (n *Node) WaitRoutes(ctx context.Context) error {
	for _, other := range n.lab.Nodes {
		if other == n || other.spare() {
			continue
		}
		for _, cidr := range other.PodCIDRs {
			if err := n.WaitRoute(ctx, cidr.Addr().Next()); err != nil {
				return err
			}
		}
	}
	return nil
}

// WaitRoute waits until addr is reached through the tun. A socket connected before has the wrong source address for good.
func (n *Node) WaitRoute(ctx context.Context, addr netip.Addr) error {
	link, err := n.Net.LinkByName(n.Tun)
	if err != nil {
		return fmt.Errorf("look for %s on %s: %w", n.Tun, n.Name, err)
	}
	err = until(ctx, 10*time.Millisecond, n.Tailscaled, func() error {
		routes, err := n.Net.RouteGet(addr.AsSlice())
		if err != nil {
			return err
		}
		if len(routes) != 1 || routes[0].LinkIndex != link.Attrs().Index {
			return fmt.Errorf("not through %s", n.Tun)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("wait on %s for a route to %s: %w", n.Name, addr, err)
	}
	return nil
}
