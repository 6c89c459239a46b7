package conflist

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"

	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/paths"
)

// Adopt fills what daemon.yaml does not say from the conflist that a person had put where ours goes, or that is kept for
// Restore since. It returns that conflist's ipam object too, nil where there is none: ranges inside the pod CIDR must stay as
// they were given. In Kubernetes the pod CIDR is not that file's to say.
func Adopt(c config.Config, kubernetes bool) (config.Config, json.RawMessage, error) {
	b, err := readPersons(c.CNI.ConfDir)
	if err != nil || b == nil {
		return c, nil, err
	}
	var p plugin
	if json.Unmarshal(ownPlugin(b), &p) != nil {
		return c, nil, nil // not about us
	}
	fill(&c.Headscale.URL, p.HeadscaleURL)
	if c.Headscale.AuthKey.Empty() {
		c.Headscale.AuthKey = p.AuthKey
	}
	if p.TailscaleSocket != paths.HostTailscaleSocket && c.Tailscale.Mode != config.ModeDaemon { // the usual one is no choice
		fill(&c.Tailscale.Socket, p.TailscaleSocket)
	}
	var theirs ipamConf
	if p.IPAM != nil && json.Unmarshal(p.IPAM, &theirs) != nil {
		return c, nil, nil
	}
	own := podCIDRs(p, theirs)
	var adopted json.RawMessage
	if len(c.Network.PodCIDRs) == 0 && len(own) > 0 && !kubernetes {
		c.Network.PodCIDRs = own
		if theirs.Type != "" {
			adopted, c.IPAM.Type = p.IPAM, theirs.Type
		}
	}
	if len(c.Network.ServiceCIDRs) == 0 && p.ServiceCIDR != "" {
		c.Network.ServiceCIDRs = config.CIDRs{p.ServiceCIDR}
	}
	if c.Network.MTU == 0 {
		c.Network.MTU = p.MTU
	}
	if m := p.MagicDNS; m != nil && m.Enable && !c.DNS.MagicDNS.Enable {
		c.DNS.MagicDNS = config.MagicDNS(*m)
	}
	if p.NetworkPolicy != nil && !*p.NetworkPolicy {
		c.Network.NetworkPolicy = false
	}
	if err := c.Validate(); err != nil {
		return c, nil, fmt.Errorf("with the settings of the conflist in %s that %s lacks: %w", c.CNI.ConfDir, paths.ConfigFile, err)
	}
	return c, adopted, nil
}

// podCIDRs are those that a person's configuration names, each once.
func podCIDRs(p plugin, i ipamConf) (out config.CIDRs) {
	for _, set := range append([][]ipamRange{{{p.PodCIDR}, {i.Subnet}}}, i.Ranges...) {
		for _, r := range set {
			if r.Subnet != "" && !slices.Contains(out, r.Subnet) {
				out = append(out, r.Subnet)
			}
		}
	}
	return out
}

func fill(have *string, found string) {
	if *have == "" {
		*have = found
	}
}

// readPersons returns the conflist that a person wrote, nil where there is none.
func readPersons(confDir string) ([]byte, error) {
	for _, path := range []string{originalPath(), Path(confDir)} {
		b, err := os.ReadFile(path)
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			return nil, fmt.Errorf("read the conflist: %w", err)
		case !isOurs(b):
			return b, nil
		}
	}
	return nil, nil
}
