package daemon

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/atomicfile"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/paths"
)

// networkName is the CNI network's. Leases are kept under it.
const networkName = "headcni"

// defaultMTU is tailscaled's own where there is no tun yet.
const defaultMTU = 1280

type conflist struct {
	// A runtime of old reads CNIVersion, a new one takes the highest of CNIVersions that it knows (CNI spec 1.1.0, section 1).
	CNIVersion  string   `json:"cniVersion"`
	CNIVersions []string `json:"cniVersions"`
	Name        string   `json:"name"`
	Plugins     []any    `json:"plugins"`
}

type pluginConf struct {
	Type string `json:"type"`
	// The plugin runs portmap for pods that ask for a port of the node.
	Capabilities map[string]bool `json:"capabilities"`
	PortMap      struct{}        `json:"portmap"`

	PodCIDR     string        `json:"pod_cidr,omitempty"`
	ServiceCIDR string        `json:"service_cidr,omitempty"`
	MTU         int           `json:"mtu"`
	EnableIPv6  bool          `json:"enable_ipv6"`
	IPAM        any           `json:"ipam"`
	MagicDNS    *magicDNSConf `json:"magic_dns,omitempty"`
	Gate        gateConf      `json:"gate"`
}

type ipamConf struct {
	Type     string        `json:"type"`
	Ranges   [][]rangeConf `json:"ranges,omitempty"`
	Strategy string        `json:"strategy,omitempty"`
}

type rangeConf struct {
	Subnet netip.Prefix `json:"subnet"`
}

type magicDNSConf struct {
	Enable        bool     `json:"enable"`
	BaseDomain    string   `json:"base_domain,omitempty"`
	Nameservers   []string `json:"nameservers,omitempty"`
	SearchDomains []string `json:"search_domains,omitempty"`
}

type gateConf struct {
	PodCIDRs []netip.Prefix `json:"podCIDRs"`
}

// planConflist renders the conflist of this node. ipam is the object of a conflist written by hand, nil = make one. It
// is pure.
func planConflist(c config.Config, ipam json.RawMessage, mtu int) ([]byte, error) {
	pods := c.Network.PodCIDRs.Prefixes()
	p := pluginConf{
		Type: "headcni", Capabilities: map[string]bool{"portMappings": true}, MTU: mtu, IPAM: ipam, Gate: gateConf{PodCIDRs: pods},
	}
	if ipam == nil {
		p.IPAM = planIPAM(c, pods)
	}
	for _, cidr := range pods {
		// The key of the specification holds one CIDR; the ranges below hold them all.
		if p.PodCIDR == "" {
			p.PodCIDR = cidr.String()
		}
		p.EnableIPv6 = p.EnableIPv6 || cidr.Addr().Is6()
	}
	if s := c.Network.ServiceCIDRs; len(s) > 0 {
		p.ServiceCIDR = s[0]
	}
	if m := c.DNS.MagicDNS; m.Enable {
		p.MagicDNS = &magicDNSConf{Enable: true, BaseDomain: m.BaseDomain, Nameservers: m.Nameservers, SearchDomains: m.SearchDomains}
	}
	list := conflist{
		CNIVersion: "0.4.0", CNIVersions: []string{"0.4.0", "1.0.0", "1.1.0"}, Name: networkName, Plugins: []any{p},
	}
	b, err := json.MarshalIndent(list, "", "  ")
	return append(b, '\n'), err
}

func planIPAM(c config.Config, pods []netip.Prefix) ipamConf {
	i := ipamConf{Type: c.IPAM.Type}
	if i.Type != "headcni-ipam" && i.Type != "host-local" {
		return i // other plugins have ranges of their own
	}
	for _, cidr := range pods {
		i.Ranges = append(i.Ranges, []rangeConf{{Subnet: cidr}})
	}
	if i.Type == "headcni-ipam" {
		i.Strategy = c.IPAM.Strategy
	}
	return i
}

// originalConflist is where a conflist that a person had put in our place is kept for uninstall.
func originalConflist() string { return filepath.Join(paths.StateDir, "conflist.orig") }

// writeConflist puts want in place, if it is not there already. A conflist of that name that is not ours is kept for
// uninstall, after remember has stored its mode.
func writeConflist(dir string, want []byte, remember func(os.FileMode) error) (changed bool, err error) {
	path := filepath.Join(dir, paths.ConflistName)
	have, err := os.ReadFile(path)
	switch {
	case err == nil && bytes.Equal(have, want):
		return false, nil
	case err == nil && !isOurs(have):
		if err := keepOriginal(path, have, remember); err != nil {
			return false, err
		}
	case err == nil || errors.Is(err, fs.ErrNotExist):
	default:
		return false, fmt.Errorf("read the conflist: %w", err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return false, fmt.Errorf("make the CNI configuration folder: %w; set cni.confDir to one that can be written", err)
	}
	err = atomicfile.Write(path, want, 0o644)
	if errors.Is(err, unix.EROFS) {
		err = fmt.Errorf("%w; set cni.confDir to one that can be written, and tell the runtime of it (conf_dir in containerd's configuration)", err)
	}
	return err == nil, err
}

func keepOriginal(path string, content []byte, remember func(os.FileMode) error) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if err := remember(info.Mode().Perm()); err != nil {
		return err
	}
	return atomicfile.Write(originalConflist(), content, 0o600) // it may hold a key
}

// isOurs tells a conflist that the daemon wrote: only those have a gate.
func isOurs(b []byte) bool {
	var list struct {
		Plugins []struct {
			Type string    `json:"type"`
			Gate *gateConf `json:"gate"`
		} `json:"plugins"`
	}
	if json.Unmarshal(b, &list) != nil {
		return false
	}
	for _, p := range list.Plugins {
		if p.Type == "headcni" && p.Gate != nil {
			return true
		}
	}
	return false
}

// removeConflist takes ours away and puts the original back, with its mode. What somebody has put there since is theirs.
func removeConflist(dir string, mode os.FileMode) error {
	path := filepath.Join(dir, paths.ConflistName)
	have, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err == nil && !isOurs(have) {
		return atomicfile.Remove(originalConflist()) // also where we were killed after it was put back
	}
	orig, err := os.ReadFile(originalConflist())
	if errors.Is(err, fs.ErrNotExist) {
		return atomicfile.Remove(path)
	}
	if err != nil {
		return err
	}
	if mode == 0 {
		mode = 0o600 // the state that knew it was moved away; there may be a key in it
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := atomicfile.Write(path, orig, mode); err != nil {
		return err
	}
	return atomicfile.Remove(originalConflist())
}
