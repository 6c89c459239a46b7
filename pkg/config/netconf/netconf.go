// Package netconf reads the configuration that a container runtime gives to the CNI plugin on standard input
// (CNI specification 1.1.0, section 1 and section 3).
package netconf

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"

	"github.com/headcni/headcni/internal/jsonobj"
	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/config/secret"
)

// IPAMType is the IPAM plugin whose code is part of the headcni plugin itself.
const IPAMType = "headcni-ipam"

// LogLevelEnv overrides the key log_level.
const LogLevelEnv = "HEADCNI_LOG_LEVEL"

// MagicDNSServer answers for the tailnet's names on every node; it is the name server where magic_dns names none.
const MagicDNSServer = "100.100.100.100"

// ErrInvalid marks every fault of a configuration (CNI error code 7).
var ErrInvalid = errors.New("invalid network config")

// ErrUnsupported marks a configuration whose only faults are unknown keys (CNI error code 2). It matches ErrInvalid.
var ErrUnsupported = fmt.Errorf("%w: unsupported field", ErrInvalid)

// Config is one plugin's configuration as the runtime derives it from the file on disk.
type Config struct {
	CNIVersion string
	Name       string // of the network

	PodCIDR     netip.Prefix // zero: not given
	ServiceCIDR netip.Prefix // zero: not given
	IPAM        IPAM
	MTU         int   // of the pod's link in bytes; 0: as the tunnel's
	EnableIPv6  *bool // nil: whatever addresses IPAM gives

	// PortMap is options of the plugin portmap, which headcni runs for pods that ask for ports of the node; nil: it does not.
	PortMap map[string]json.RawMessage

	DNS      DNS // the well-known key dns
	MagicDNS MagicDNS

	// Gate is nil where no daemon stands behind the configuration: then ADD does not ask whether the node is programmed.
	Gate *Gate
	// NetworkPolicy: where there is a gate, ADD asks for the table of NetworkPolicies too.
	NetworkPolicy bool

	LogLevel     slog.Level
	LogFile      string // empty: standard error
	DaemonSocket string

	Runtime    Runtime
	PrevResult json.RawMessage // nil: none

	// ValidAttachments is what GC must keep; none, where the list is empty or null. HasValidAttachments is false where the key is
	// missing: then nothing is known to be stale.
	ValidAttachments    []Attachment
	HasValidAttachments bool

	// AuthKey is not used by the plugin. It is read only to be kept out of everything that is printed.
	AuthKey secret.Secret
	// Warnings are for the log. They hold no secret.
	Warnings []string
}

// IPAM is the part for the IPAM plugin.
type IPAM struct {
	Type string
	Raw  json.RawMessage // the whole object
	// Subnets and Gateways are those that the configuration names, as far as its format is known.
	Subnets  []netip.Prefix
	Gateways []netip.Addr
}

// DNS is as in a CNI result.
type DNS struct {
	Nameservers []string `json:"nameservers"`
	Domain      string   `json:"domain"`
	Search      []string `json:"search"`
	Options     []string `json:"options"`
}

// MagicDNS is what pods are told about name resolution.
type MagicDNS struct {
	Enable        bool
	BaseDomain    string
	Nameservers   []string
	SearchDomains []string
}

// Gate asks ADD to wait until the daemon has programmed the node.
type Gate struct{ PodCIDRs []netip.Prefix }

// Runtime is what the container runtime asks for this attachment (runtimeConfig and args; CONVENTIONS.md of CNI).
type Runtime struct {
	IPs      []netip.Addr
	MAC      net.HardwareAddr // nil: any
	DNS      DNS              // the capability dns; it has no domain
	IPRanges json.RawMessage  // the capability ipRanges; nil: none
	Ports    json.RawMessage  // the capability portMappings; nil: none
}

// Attachment is one interface of one container.
type Attachment struct {
	ContainerID string `json:"containerID"`
	IfName      string `json:"ifname"`
}

// Parse decodes strictly, fills in defaults and validates. The error, if any, matches ErrInvalid and joins all faults.
// The Config then holds whatever could be read: DEL has to go on with that.
func Parse(stdin []byte) (Config, error) {
	o, err := jsonobj.Parse(stdin)
	if err != nil {
		// The decoder's own message could repeat a piece of the input, which may hold a secret.
		return defaults(), fmt.Errorf("%w: not a JSON object", ErrInvalid)
	}
	return ParseObject(o)
}

// ParseObject is Parse for a configuration that has been taken apart.
func ParseObject(o jsonobj.Object) (Config, error) {
	c := defaults()
	d := decoder{c: &c}
	d.top(o)
	c.logLevelFromEnv(&d)
	d.validate()
	return c, d.err()
}

func defaults() Config { return Config{DaemonSocket: paths.DaemonSocket, LogLevel: slog.LevelWarn} }

func (c *Config) logLevelFromEnv(d *decoder) {
	if level := os.Getenv(LogLevelEnv); level != "" {
		if err := c.LogLevel.UnmarshalText([]byte(level)); err != nil {
			d.fault("environment variable "+LogLevelEnv, "%q: want debug, info, warn or error", level)
		}
	}
}
