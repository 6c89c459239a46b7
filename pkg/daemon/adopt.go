package daemon

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/headcni/headcni/internal/atomicfile"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/netconf"
	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/config/secret"
	"github.com/headcni/headcni/pkg/ipam"
)

// staticConf is what a conflist written by hand says that is of use to the daemon.
type staticConf struct {
	Type            string        `json:"type"`
	HeadscaleURL    string        `json:"headscale_url"`
	TailscaleSocket string        `json:"tailscale_socket"`
	PodCIDR         string        `json:"pod_cidr"`
	ServiceCIDR     string        `json:"service_cidr"`
	MTU             int           `json:"mtu"`
	AuthKey         secret.Secret `json:"auth_key"`
	IPAM            struct {
		Type   string        `json:"type"`
		Subnet string        `json:"subnet"`
		Ranges [][]rangeText `json:"ranges"`
	} `json:"ipam"`
	MagicDNS struct {
		Enable        bool     `json:"enable"`
		BaseDomain    string   `json:"base_domain"`
		Nameservers   []string `json:"nameservers"`
		SearchDomains []string `json:"search_domains"`
	} `json:"magic_dns"`
}

type rangeText struct {
	Subnet string `json:"subnet"`
}

// adopt fills what daemon.yaml does not say from the conflist that a person had put where ours goes, or that is kept
// for uninstall since. It returns that conflist's ipam object too, nil where there is none: ranges inside the pod CIDR
// must stay as they were given. In Kubernetes the pod CIDR is not that file's to say.
func adopt(c config.Config, kubernetes bool) (config.Config, json.RawMessage, error) {
	b, err := readStatic(c.CNI.ConfDir)
	if err != nil || b == nil {
		return c, nil, err
	}
	raw := headcniPlugin(b)
	var s staticConf
	if raw == nil || json.Unmarshal(raw, &s) != nil {
		return c, nil, nil // not about us
	}
	fill(&c.Headscale.URL, s.HeadscaleURL)
	if c.Headscale.AuthKey.Empty() {
		c.Headscale.AuthKey = s.AuthKey
	}
	if s.TailscaleSocket != paths.HostTailscaleSocket && c.Tailscale.Mode != config.ModeDaemon { // the usual one is no choice
		fill(&c.Tailscale.Socket, s.TailscaleSocket)
	}
	var own []string
	for _, r := range append([][]rangeText{{{s.PodCIDR}, {s.IPAM.Subnet}}}, s.IPAM.Ranges...) {
		for _, r := range r {
			if r.Subnet != "" && !slices.Contains(own, r.Subnet) {
				own = append(own, r.Subnet)
			}
		}
	}
	var ipam json.RawMessage
	if len(c.Network.PodCIDRs) == 0 && len(own) > 0 && !kubernetes {
		c.Network.PodCIDRs = own
		var parts struct {
			IPAM json.RawMessage `json:"ipam"`
		}
		if json.Unmarshal(raw, &parts) == nil && s.IPAM.Type != "" {
			ipam, c.IPAM.Type = parts.IPAM, s.IPAM.Type
		}
	}
	if len(c.Network.ServiceCIDRs) == 0 && s.ServiceCIDR != "" {
		c.Network.ServiceCIDRs = config.CIDRs{s.ServiceCIDR}
	}
	if c.Network.MTU == 0 {
		c.Network.MTU = s.MTU
	}
	if !c.DNS.MagicDNS.Enable && s.MagicDNS.Enable {
		c.DNS.MagicDNS = config.MagicDNS(s.MagicDNS)
	}
	if err := c.Validate(); err != nil {
		return c, nil, fmt.Errorf("with the settings of the conflist in %s that %s lacks: %w", c.CNI.ConfDir, paths.ConfigFile, err)
	}
	return c, ipam, nil
}

func fill(have *string, found string) {
	if *have == "" {
		*have = found
	}
}

// readStatic returns the conflist that is not ours, nil where there is none.
func readStatic(confDir string) ([]byte, error) {
	for _, path := range []string{originalConflist(), filepath.Join(confDir, paths.ConflistName)} {
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

// headcniPlugin finds our plugin in a conflist, or in a flat configuration under that name.
func headcniPlugin(b []byte) json.RawMessage {
	var list struct {
		Type    string            `json:"type"`
		Plugins []json.RawMessage `json:"plugins"`
	}
	if json.Unmarshal(b, &list) != nil {
		return nil
	}
	if list.Type == "headcni" {
		return b
	}
	for _, p := range list.Plugins {
		var t struct {
			Type string `json:"type"`
		}
		if json.Unmarshal(p, &t) == nil && t.Type == "headcni" {
			return p
		}
	}
	return nil
}

// ErrFlat means that a .conflist file holds a single plugin's configuration, which runtimes refuse under that name.
var ErrFlat = errors.New("a flat configuration under the name .conflist, which container runtimes refuse: run " +
	"`headcni-daemon config convert FILE`, or rename it to .conf")

// CheckConflist says what is wrong with a conflist on disk: its form, and what the plugin would refuse. It is nil where
// there is none.
func CheckConflist(path string) error {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	_, err = convert(b)
	switch {
	case errors.Is(err, errList):
		err = checkPlugins(b)
	case err == nil:
		err = ErrFlat
	}
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// checkPlugins reads our plugins' configurations as the plugin itself will, with what the runtime adds to them (CNI
// specification 1.1.0, section 3).
func checkPlugins(list []byte) error {
	var keys struct {
		CNIVersion json.RawMessage              `json:"cniVersion"`
		Name       string                       `json:"name"`
		Plugins    []map[string]json.RawMessage `json:"plugins"`
	}
	if err := json.Unmarshal(list, &keys); err != nil {
		return fmt.Errorf("not a list of plugins with a name: %w", err)
	}
	if keys.Name == "" {
		return errors.New("name: missing; every network has one")
	}
	name, err := json.Marshal(keys.Name)
	if err != nil {
		return err
	}
	for _, p := range keys.Plugins {
		if string(p["type"]) != `"headcni"` {
			continue
		}
		p["name"] = name
		if keys.CNIVersion != nil {
			p["cniVersion"] = keys.CNIVersion
		}
		conf, err := json.Marshal(p)
		if err != nil {
			return err
		}
		c, err := netconf.Parse(conf)
		if err == nil && c.IPAM.Type == netconf.IPAMType {
			if c.IPAM.Raw == nil {
				c.IPAM.Raw = json.RawMessage("{}")
			}
			_, err = ipam.ParseConfig(c.Name, c.IPAM.Raw)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// ConvertConflist makes a conflist of a flat configuration, in place. It reports whether there was something to do.
func ConvertConflist(path string) (bool, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return false, err
	}
	list, err := convert(b)
	if errors.Is(err, errList) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("convert %s: %w", path, err)
	}
	info, err := os.Stat(path)
	if err != nil {
		return false, err
	}
	return true, atomicfile.Write(path, list, info.Mode().Perm())
}

var errList = errors.New("a list already")

// convert wraps a single plugin's configuration into a list. The two keys of the list move up (CNI specification 1.1.0,
// section 1); all others stay with the plugin as they are.
func convert(flat []byte) ([]byte, error) {
	var keys map[string]json.RawMessage
	if err := json.Unmarshal(flat, &keys); err != nil {
		return nil, fmt.Errorf("not a JSON object: %w", err)
	}
	if _, ok := keys["plugins"]; ok {
		return nil, errList
	}
	if _, ok := keys["type"]; !ok {
		return nil, errors.New("neither a list with plugins nor a plugin with a type")
	}
	list := struct {
		CNIVersion json.RawMessage              `json:"cniVersion,omitempty"`
		Name       json.RawMessage              `json:"name,omitempty"`
		Plugins    []map[string]json.RawMessage `json:"plugins"`
	}{keys["cniVersion"], keys["name"], []map[string]json.RawMessage{keys}}
	delete(keys, "cniVersion")
	delete(keys, "name")
	b, err := json.MarshalIndent(list, "", "  ")
	return append(b, '\n'), err
}
