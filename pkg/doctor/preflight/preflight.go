// Package preflight looks at a machine before anything of HeadCNI is on it: does it have what a node needs, and does it reach Headscale?
package preflight

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/names"
	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/conflist"
	"github.com/headcni/headcni/pkg/doctor"
	"github.com/headcni/headcni/pkg/findings"
	"github.com/headcni/headcni/pkg/headscale"
	"github.com/headcni/headcni/pkg/networking/ipvs"
	"github.com/headcni/headcni/pkg/nft"
	"github.com/headcni/headcni/pkg/nft/selftest"
)

const (
	// headscaleTimeout bounds what Headscale may take, selftestTimeout the guard's self-test.
	headscaleTimeout = 15 * time.Second
	selftestTimeout  = 60 * time.Second
	tunDevice        = "/dev/net/tun"
)

// Checks asks everything. getenv finds the keys' variables.
func Checks(ctx context.Context, c config.Config, getenv func(string) string) []doctor.Check {
	root := rootOnly()
	out := []doctor.Check{root, nftProgram(ctx), tun()}
	if len(root.Found) == 0 {
		out = append(out, kernel(ctx))
	}
	if c.Network.NetworkPolicy {
		if err := ipvs.Find(); err != nil {
			services := doctor.Check{Where: here, Count: 1}
			services.Add(findings.PolicyNot, "%v", err)
			out = append(out, services)
		}
	}
	return append(out, otherCNIs(c.CNI.ConfDir), ranges(c), ports(ctx, c), Control(ctx, c, getenv))
}

const here = "this node"

func rootOnly() doctor.Check {
	c := doctor.Check{Where: here, OK: "is looked at as root", Count: 1}
	if os.Geteuid() != 0 {
		c.Add(findings.NotRoot, "without root neither the kernel nor the ports can be tried")
	}
	return c
}

var nftVersion = regexp.MustCompile(`v(\d+)\.(\d+)(?:\.(\d+))?`)

func nftProgram(ctx context.Context) doctor.Check {
	c := doctor.Check{Where: here, Count: 1}
	out, err := exec.CommandContext(ctx, "nft", "--version").Output()
	if err != nil {
		c.Add(findings.NoNFT, "%v", err)
		return c
	}
	text := strings.TrimSpace(string(out))
	c.OK = "has " + text
	if !recent(text) {
		c.Add(findings.NoNFT, "%s is older than 1.0.1", text)
	}
	return c
}

// recent reports whether it is nft 1.0.1 or later. A version that cannot be read is taken for one.
func recent(text string) bool {
	m := nftVersion.FindStringSubmatch(text)
	if m == nil {
		return true
	}
	var have [3]int
	for i, digits := range m[1:] {
		have[i], _ = strconv.Atoi(digits) // "" is 0
	}
	return slices.Compare(have[:], []int{1, 0, 1}) >= 0
}

func tun() doctor.Check {
	c := doctor.Check{Where: here, OK: "opens " + tunDevice, Count: 1}
	f, err := os.OpenFile(tunDevice, os.O_RDWR, 0)
	if err == nil {
		defer f.Close()
		// Another device may stand in its place, as in a container that was given an empty file.
		if _, err = unix.IoctlGetUint32(int(f.Fd()), unix.TUNGETFEATURES); err != nil {
			err = fmt.Errorf("%s is no tun device: %w", tunDevice, err)
		}
	}
	if err != nil {
		c.Add(findings.NoTunDevice, "%v", err)
	}
	return c
}

// kernel tries links, rules and the guard in a namespace of its own, which loads the kernel's modules as a node would.
func kernel(ctx context.Context) doctor.Check {
	c := doctor.Check{Where: here, OK: "its kernel makes pods' links and rules, and the guard stops what goes in clear", Count: 1}
	within, cancel := context.WithTimeout(ctx, selftestTimeout)
	defer cancel()
	_, err := selftest.Run(within, nft.Config{
		Own:     []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24"), netip.MustParsePrefix("fd42:6864:1::/64")},
		Cluster: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd42:6864::/48")},
		TunName: names.DaemonTun, Masquerade: true,
	})
	within, cancel = context.WithTimeout(ctx, selftestTimeout)
	defer cancel()
	missing, bad := lacking(within)
	switch {
	case len(missing) > 0 && err != nil:
		c.Add(findings.KernelLacks, "it takes no rules of %s, so: %v", strings.Join(missing, ", "), err)
	case len(missing) > 0:
		c.Add(findings.KernelLacks, "it takes no rules of %s", strings.Join(missing, ", "))
	case cmp.Or(err, bad) != nil:
		c.Add(findings.KernelLacks, "%v", cmp.Or(err, bad))
	}
	return c
}

func otherCNIs(dir string) doctor.Check {
	c := doctor.Check{Where: here, OK: "no other CNI's configuration comes first in " + dir, Count: 1}
	others, err := conflist.Before(dir)
	switch {
	case err != nil:
		c.Add(findings.Conflist, "%v", err)
	case len(others) > 0:
		c.Add(findings.OtherCNI, "%s has %s", dir, strings.Join(others, ", "))
	}
	return c
}

// ranges compares what is to be pods and services, and the tailnet's range, with the host's own networks: of homes and carriers, too.
func ranges(c config.Config) doctor.Check {
	r := c.Network.Ranges()
	pods := netset.Union(r.Pods, r.Cluster)
	out := doctor.Check{Where: here, OK: fmt.Sprintf("none of its networks overlaps %v", slices.Concat(pods, r.Services)), Count: 1}
	if len(pods) == 0 { // Kubernetes gives them later
		out.OK = fmt.Sprintf("none of its networks is in the tailnet's %s", netset.TailnetIPv4)
	}
	links, err := net.Interfaces()
	if err != nil {
		out.Add(findings.RangeOverlapsHost, "list the host's interfaces: %v", err)
		return out
	}
	for _, l := range links {
		if names.CountsAsPodLink(l.Name) {
			out.Add(findings.NamedAsPods, "%s counts as a pod's link: its name begins with %q", l.Name, names.PodLinkPrefix)
		} else if l.Flags&net.FlagLoopback != 0 || strings.HasPrefix(l.Name, names.PodLinkPrefix) {
			continue
		}
		addrs, err := l.Addrs()
		if err != nil {
			continue // the link has gone
		}
		for _, a := range addrs {
			p, err := netip.ParsePrefix(a.String())
			if err != nil {
				continue
			}
			if netset.TailnetIPv4.Overlaps(p) && l.Name != names.DaemonTun && l.Name != names.HostTun {
				out.Add(findings.HostInTailnet, "%s of %s is in the tailnet's %s, as the networks of carriers are", p.Masked(), l.Name, netset.TailnetIPv4)
			}
			for _, want := range slices.Concat(pods, r.Services) {
				if want.Overlaps(p) {
					out.Add(findings.RangeOverlapsHost, "%s of %s overlaps %s", p.Masked(), l.Name, want)
				}
			}
		}
	}
	return out
}

// ports tries those that we will listen on. Where our daemon runs they are its own.
func ports(ctx context.Context, c config.Config) doctor.Check {
	out := doctor.Check{Where: here, Count: 1}
	if _, err := os.Stat(paths.APISocket); err == nil {
		return doctor.Check{Where: here}
	}
	var free []string
	try := func(what, network, address string) {
		var lc net.ListenConfig
		var err error
		if network == "udp" {
			var l net.PacketConn
			if l, err = lc.ListenPacket(ctx, network, address); err == nil {
				l.Close()
			}
		} else {
			var l net.Listener
			if l, err = lc.Listen(ctx, network, address); err == nil {
				l.Close()
			}
		}
		switch {
		case errors.Is(err, unix.EADDRINUSE):
			out.Add(findings.PortInUse, "%s: %s %s is in use", what, network, address)
		case err == nil:
			free = append(free, network+" "+address)
		}
	}
	if c.Monitoring.Listen != "" {
		try("monitoring.listen", "tcp", c.Monitoring.Listen)
	}
	if c.Tailscale.Port != 0 && c.Tailscale.Mode != config.ModeHost {
		try("tailscale.port", "udp", fmt.Sprintf(":%d", c.Tailscale.Port))
	}
	if free != nil {
		out.OK = "free: " + strings.Join(free, ", ")
	}
	return out
}

// Control asks Headscale: is it there, is its certificate good, are the clocks together, does it take the key, does its policy know the pods?
func Control(ctx context.Context, c config.Config, getenv func(string) string) doctor.Check {
	out := doctor.Check{Where: "Headscale", Count: 1}
	if c.Headscale.URL == "" {
		return doctor.Check{Where: "Headscale"} // the host's tailscaled knows
	}
	if err := config.Lasting(c.Headscale.URL); err != nil {
		out.Add(findings.URLNotLasting, "%s: %v", c.Headscale.URL, err)
	}
	add := func(err error, otherwise findings.ID) {
		id := findings.IDOf(err)
		if id == "" {
			id = otherwise
		}
		out.Add(id, "%s", strings.ReplaceAll(err.Error(), "\n", "; "))
	}
	ctx, cancel := context.WithTimeout(ctx, headscaleTimeout)
	defer cancel()
	began := time.Now()
	api, cred, err := headscale.NewConnector(c.Headscale, getenv).Connect(ctx)
	if bad := cred.Exposed(paths.ConfigFile); bad != nil {
		add(bad, findings.KeyExposed)
	}
	anonymous := api
	if api == nil {
		var bad error
		if anonymous, bad = headscale.New(headscale.Options{URL: c.Headscale.URL, CAFile: c.Headscale.CAFile, Proxy: c.Headscale.Proxy}); bad != nil {
			add(bad, findings.ConfigUnusable)
			return out
		}
		began = time.Now()
	}
	h, bad := anonymous.Health(ctx)
	if bad != nil {
		add(bad, findings.HeadscaleOther)
		return out
	}
	out.OK = fmt.Sprintf("%s answers, version %s (%d ms)", c.Headscale.URL, h.Version, time.Since(began).Milliseconds())
	if h.Skew.Abs() > headscale.MaxSkew {
		out.Add(findings.ClocksApart, "Headscale's clock is about %s from this machine's", h.Skew.Round(time.Second))
	}
	if !headscale.Tried(h.Version) {
		out.Add(findings.HeadscaleUntried, "%s is %s", c.Headscale.URL, h.Version)
	}
	switch {
	case errors.Is(err, config.ErrNoCredential): // before an installation there may be none
	case err != nil:
		add(err, findings.NoKey)
	case api != nil:
		if _, err := api.Nodes(ctx); err != nil {
			add(fmt.Errorf("%s: %w", cred.Source, err), findings.HeadscaleOther)
		} else {
			out.OK += ", and takes the API key"
			policy(ctx, api, h.Version, c, &out)
		}
	}
	return out
}

// policy looks for the ranges of pods in Headscale's policy, which without them drops all their packets.
func policy(ctx context.Context, api *headscale.Client, version string, c config.Config, out *doctor.Check) {
	r := c.Network.Ranges()
	text, err := api.Policy(ctx)
	if errors.Is(err, headscale.ErrNotFound) {
		return // without a policy everything is allowed
	}
	file, bad := headscale.ReadPolicy(text)
	if err = cmp.Or(err, bad); err != nil {
		out.Add(findings.HeadscaleOther, "%v", err)
		return
	}
	if lacks := file.MissingRules(netset.Union(r.Pods, r.Cluster), c.Tailscale.Tags, headscale.StarCoversRoutes(version)); lacks != "" {
		out.Add(findings.PolicyLacksRanges, "%s", lacks)
	}
}
