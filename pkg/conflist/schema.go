// Package conflist is the node's CNI configuration file: one schema in which it is rendered, read, adopted and compared, and
// the configurations of others beside it.
package conflist

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/headcni/headcni/pkg/config/netconf"
	"github.com/headcni/headcni/pkg/config/secret"
	"github.com/headcni/headcni/pkg/ipam"
)

// NetworkName is the CNI network's. Leases are kept under it.
const NetworkName = "headcni"

// pluginType is the name of our plugin's program.
const pluginType = "headcni"

// list is a network configuration list (CNI specification 1.1.0, section 1), as far as it is ours to write or of use to read.
type list struct {
	// A runtime of old reads CNIVersion, a new one takes the highest of CNIVersions that it knows.
	CNIVersion  string            `json:"cniVersion,omitempty"`
	CNIVersions []string          `json:"cniVersions,omitempty"`
	Name        string            `json:"name,omitempty"`
	Plugins     []json.RawMessage `json:"plugins"`
}

// plugin is our plugin's configuration, as far as the daemon writes it or takes it over from a person's.
type plugin struct {
	Type         string          `json:"type"`
	Capabilities map[string]bool `json:"capabilities,omitempty"`
	// PortMap makes the plugin run portmap for pods that ask for a port of the node.
	PortMap json.RawMessage `json:"portmap,omitempty"`

	HeadscaleURL    string        `json:"headscale_url,omitempty"`
	TailscaleSocket string        `json:"tailscale_socket,omitempty"`
	AuthKey         secret.Secret `json:"auth_key,omitzero"`

	PodCIDR     string          `json:"pod_cidr,omitempty"`
	ServiceCIDR string          `json:"service_cidr,omitempty"`
	MTU         int             `json:"mtu"`
	EnableIPv6  bool            `json:"enable_ipv6"`
	IPAM        json.RawMessage `json:"ipam,omitempty"`
	MagicDNS    *magicDNS       `json:"magic_dns,omitempty"`
	// NetworkPolicy has ADD wait for the table that enforces NetworkPolicies too, where there is a gate.
	NetworkPolicy *bool `json:"enable_network_policy,omitempty"`
	// Gate is what the plugin asks the kernel before an ADD. Only the daemon writes one.
	Gate *gate `json:"gate,omitempty"`
}

type ipamConf struct {
	Type     string        `json:"type"`
	Subnet   string        `json:"subnet,omitempty"`
	Ranges   [][]ipamRange `json:"ranges,omitempty"`
	Strategy string        `json:"strategy,omitempty"`
}

type ipamRange struct {
	Subnet string `json:"subnet"`
}

type magicDNS struct {
	Enable        bool     `json:"enable"`
	BaseDomain    string   `json:"base_domain,omitempty"`
	Nameservers   []string `json:"nameservers,omitempty"`
	SearchDomains []string `json:"search_domains,omitempty"`
}

type gate struct {
	PodCIDRs []string `json:"podCIDRs"`
}

// ownPlugin finds our plugin's configuration in a list, or in a flat configuration under that name; nil where there is none.
func ownPlugin(b []byte) json.RawMessage {
	var file struct {
		list
		Type string `json:"type"`
	}
	if json.Unmarshal(b, &file) != nil {
		return nil
	}
	if file.Type == pluginType {
		return b
	}
	for _, raw := range file.Plugins {
		var p struct {
			Type string `json:"type"`
		}
		if json.Unmarshal(raw, &p) == nil && p.Type == pluginType {
			return raw
		}
	}
	return nil
}

// isOurs tells a conflist that the daemon wrote: only those have a gate.
func isOurs(b []byte) bool {
	var p plugin
	return json.Unmarshal(ownPlugin(b), &p) == nil && p.Gate != nil
}

// IPAM is the address management of our network as the conflist in confDir says, the zero Config where there is none or another
// plugin does it.
func IPAM(confDir string) (ipam.Config, error) {
	b, err := os.ReadFile(Path(confDir))
	if errors.Is(err, fs.ErrNotExist) {
		return ipam.Config{}, nil
	}
	if err != nil {
		return ipam.Config{}, fmt.Errorf("read the conflist: %w", err)
	}
	var l list
	var p plugin
	var kind ipamConf
	if json.Unmarshal(b, &l) != nil || json.Unmarshal(ownPlugin(b), &p) != nil || json.Unmarshal(p.IPAM, &kind) != nil || kind.Type != netconf.IPAMType {
		return ipam.Config{}, nil
	}
	return ipam.ParseConfig(l.Name, p.IPAM)
}
