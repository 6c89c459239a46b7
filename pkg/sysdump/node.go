package sysdump

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/networking/podlink"
	"github.com/headcni/headcni/pkg/nodestatus"
	"github.com/headcni/headcni/pkg/tailscale"
)

// Part is what one node has gathered, as it is sent: secrets are masked before they leave the node.
type Part struct {
	Files   map[string][]byte `json:"files"`
	Missing map[string]string `json:"missing,omitempty"`
	Secrets int               `json:"secrets"`
	// Names are those of pods and their namespaces, which an anonymous archive masks.
	Names []string `json:"names,omitempty"`
}

// oneTimeout bounds what one file of a node may take.
const oneTimeout = 15 * time.Second

// sysctls are those that decide over pods' packets, below /proc/sys.
var sysctls = []string{
	"net/ipv4/conf/*/forwarding", "net/ipv4/conf/*/rp_filter", "net/ipv4/conf/*/accept_local", "net/ipv4/conf/*/send_redirects", "net/ipv6/conf/*/forwarding",
	"net/ipv6/conf/*/disable_ipv6", "net/ipv6/conf/*/accept_ra", "net/ipv4/ip_forward", "net/netfilter/nf_conntrack_max", "net/netfilter/nf_conntrack_count",
	"net/ipv4/neigh/default/gc_thresh3", "net/core/rmem_max", "net/bridge/bridge-nf-call-iptables", "kernel/osrelease", "kernel/hostname",
}

// Node gathers what is known on this node. c is its configuration, getenv finds its keys, so that they are masked in any place.
func Node(ctx context.Context, c config.Config, getenv func(string) string, socket string) Part {
	var secrets []string
	if cred, err := c.Headscale.Credential(getenv); err == nil {
		secrets = append(secrets, cred.Key.Reveal())
	}
	m := newMasker(false, secrets...)
	p := Part{Files: map[string][]byte{}, Missing: map[string]string{}}
	for _, one := range []struct {
		name string
		get  func(context.Context) ([]byte, error)
	}{
		{"status.json", func(ctx context.Context) ([]byte, error) {
			s, err := nodestatus.Ask(ctx, socket)
			return asJSON(s, err)
		}},
		{"config.yaml", func(context.Context) ([]byte, error) { return []byte(c.String()), nil }},
		{"rules.txt", func(context.Context) ([]byte, error) { return rules() }},
		{"routes.txt", func(context.Context) ([]byte, error) { return routes() }},
		{"links.txt", func(context.Context) ([]byte, error) { return links() }},
		{"sysctls.txt", func(context.Context) ([]byte, error) { return readAll("/proc/sys", sysctls...) }},
		{"nft.txt", func(ctx context.Context) ([]byte, error) { return run(ctx, "nft", "list", "ruleset") }},
		{"conflists.txt", func(context.Context) ([]byte, error) { return readAll(c.CNI.ConfDir, "*") }},
		{"leases.txt", func(context.Context) ([]byte, error) { return tree(paths.IPAMDir) }},
		{"state.json", func(context.Context) ([]byte, error) {
			return os.ReadFile(filepath.Join(paths.StateDir, "daemon.json"))
		}},
		{"resolv.conf", func(context.Context) ([]byte, error) { return os.ReadFile("/etc/resolv.conf") }},
		{"tailscale.json", tailscaleStatus},
		{"metrics.txt", func(ctx context.Context) ([]byte, error) { return metrics(ctx, c.Monitoring.Listen) }},
	} {
		ctx, cancel := context.WithTimeout(ctx, oneTimeout)
		b, err := one.get(ctx)
		cancel()
		if err != nil {
			p.Missing[one.name] = string(m.Mask([]byte(err.Error())))
		}
		if len(b) > 0 {
			p.Files[one.name] = m.Mask(b[:min(len(b), maxFile)])
		}
	}
	p.Secrets, p.Names = m.secrets, podNames()
	return p
}

// podNames are the names of the pods that have links here; without an answer of the kernel there are none.
func podNames() (out []string) {
	var pods podlink.Handle
	defer pods.Close()
	all, err := pods.Attached()
	if err != nil {
		return nil
	}
	for _, l := range all {
		namespace, name, _ := strings.Cut(l.Label, "/")
		out = append(out, namespace, name)
	}
	return out
}

// AddPart adds what a node has gathered, below a folder.
func (a *Archive) AddPart(folder string, p Part) {
	a.masker.secrets += p.Secrets
	a.Hide(p.Names...)
	for name, content := range p.Files {
		a.Add(folder+"/"+filepath.Base(name), content)
	}
	for name, why := range p.Missing {
		a.Lacks(folder+"/"+filepath.Base(name), errors.New(why))
	}
}

func asJSON(v any, err error) ([]byte, error) {
	if err != nil {
		return nil, err
	}
	return json.MarshalIndent(v, "", "  ")
}

func run(ctx context.Context, name string, args ...string) ([]byte, error) {
	var stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("%s: %w: %s", name, err, strings.TrimSpace(stderr.String()))
	}
	return out, err
}

// rules are in the words of ip-rule(8) where they have some.
func rules() ([]byte, error) {
	var b bytes.Buffer
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		list, err := netlink.RuleList(family)
		if err != nil {
			return b.Bytes(), fmt.Errorf("list rules: %w", err)
		}
		for _, r := range list {
			fmt.Fprintf(&b, "%d:\tfrom %s", r.Priority, orAll(r.Src))
			if r.Dst != nil {
				fmt.Fprintf(&b, " to %s", r.Dst)
			}
			if r.Mask != nil {
				fmt.Fprintf(&b, " fwmark %#x/%#x", r.Mark, *r.Mask)
			} else if r.Mark != 0 {
				fmt.Fprintf(&b, " fwmark %#x", r.Mark)
			}
			if r.IifName != "" {
				fmt.Fprintf(&b, " iif %s", r.IifName)
			}
			if r.OifName != "" {
				fmt.Fprintf(&b, " oif %s", r.OifName)
			}
			if r.Table > 0 {
				fmt.Fprintf(&b, " lookup %d", r.Table)
			}
			if r.SuppressPrefixlen >= 0 {
				fmt.Fprintf(&b, " suppress_prefixlength %d", r.SuppressPrefixlen)
			}
			if r.Type > 1 { // FR_ACT_TO_TBL is 1
				fmt.Fprintf(&b, " type %d", r.Type)
			}
			b.WriteByte('\n')
		}
	}
	return b.Bytes(), nil
}

func orAll(p fmt.Stringer) string {
	if text := p.String(); text != "<nil>" {
		return text
	}
	return "all"
}

// kinds of routes, in the words of ip-route(8).
var kinds = map[int]string{
	unix.RTN_UNICAST: "unicast", unix.RTN_LOCAL: "local", unix.RTN_BROADCAST: "broadcast", unix.RTN_ANYCAST: "anycast", unix.RTN_MULTICAST: "multicast",
	unix.RTN_BLACKHOLE: "blackhole", unix.RTN_UNREACHABLE: "unreachable", unix.RTN_PROHIBIT: "prohibit", unix.RTN_THROW: "throw",
}

// routes are those of all tables.
func routes() ([]byte, error) {
	var b bytes.Buffer
	names := map[int]string{}
	all, _ := netlink.LinkList() // as far as it can be read while links come and go
	for _, l := range all {
		names[l.Attrs().Index] = l.Attrs().Name
	}
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		err := netlink.RouteListFilteredIter(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE, func(r netlink.Route) bool {
			fmt.Fprintf(&b, "table %d: %s %s", r.Table, kinds[r.Type], orAll(r.Dst))
			if r.Gw != nil {
				fmt.Fprintf(&b, " via %s", r.Gw)
			}
			if name := names[r.LinkIndex]; name != "" {
				fmt.Fprintf(&b, " dev %s", name)
			}
			fmt.Fprintf(&b, " proto %d scope %s metric %d", r.Protocol, r.Scope, r.Priority)
			if r.Src != nil {
				fmt.Fprintf(&b, " src %s", r.Src)
			}
			if r.MTU != 0 {
				fmt.Fprintf(&b, " mtu %d", r.MTU)
			}
			b.WriteByte('\n')
			return true
		})
		if err != nil {
			return b.Bytes(), fmt.Errorf("list routes: %w", err)
		}
	}
	return b.Bytes(), nil
}

func links() ([]byte, error) {
	all, err := netlink.LinkList()
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, fmt.Errorf("list links: %w", err)
	}
	var b bytes.Buffer
	for _, l := range all {
		a := l.Attrs()
		fmt.Fprintf(&b, "%d: %s %s mtu %d state %s flags %s group %d master %d mac %s alias %q\n",
			a.Index, a.Name, l.Type(), a.MTU, a.OperState, a.Flags, a.Group, a.MasterIndex, a.HardwareAddr, a.Alias)
		addrs, _ := netlink.AddrList(l, netlink.FAMILY_ALL) // none where the link has gone
		for _, addr := range addrs {
			fmt.Fprintf(&b, "    %s\n", addr)
		}
	}
	return b.Bytes(), nil
}

// readAll reads the files of a folder that match, each under its name.
func readAll(dir string, patterns ...string) ([]byte, error) {
	var b bytes.Buffer
	for _, pattern := range patterns {
		found, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil {
			return nil, err
		}
		for _, path := range found {
			if info, err := os.Stat(path); err != nil || !info.Mode().IsRegular() {
				continue
			}
			content, err := os.ReadFile(path)
			if err != nil {
				fmt.Fprintf(&b, "%s: %v\n", path, err)
				continue
			}
			name, text := strings.TrimPrefix(path, dir+"/"), strings.TrimSpace(string(content))
			if strings.Contains(text, "\n") {
				fmt.Fprintf(&b, "--- %s\n%s\n", name, text)
			} else {
				fmt.Fprintf(&b, "%s = %s\n", name, text)
			}
		}
	}
	return b.Bytes(), nil
}

// tree are the names of the files below a folder: of leases, they say who has which address.
func tree(dir string) ([]byte, error) {
	var b bytes.Buffer
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // there were no pods yet, or one has just gone
		}
		if err != nil || d.IsDir() {
			return err
		}
		fmt.Fprintln(&b, strings.TrimPrefix(path, dir+"/"))
		return nil
	})
	return b.Bytes(), err
}

// tailscaleStatus asks the dedicated tailscaled, else the host's.
func tailscaleStatus(ctx context.Context) ([]byte, error) {
	var errs []error
	for _, socket := range []string{paths.DaemonTailscaleSocket, paths.HostTailscaleSocket} {
		if _, err := os.Stat(socket); err != nil {
			errs = append(errs, err)
			continue
		}
		c := tailscale.New(socket)
		s, err := c.Status(ctx)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		prefs, err := c.Prefs(ctx)
		return asJSON(struct {
			Socket string
			Status tailscale.Status
			Prefs  tailscale.Prefs
		}{socket, s, prefs}, err)
	}
	return nil, errors.Join(errs...)
}

func metrics(ctx context.Context, listen string) ([]byte, error) {
	if listen == "" {
		return nil, nil
	}
	if strings.HasPrefix(listen, ":") {
		listen = "127.0.0.1" + listen
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+listen+"/metrics", nil)
	if err != nil {
		return nil, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	return io.ReadAll(io.LimitReader(resp.Body, maxFile))
}
