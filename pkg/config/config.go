// Package config is the configuration of the daemon and the controller: a file, then environment variables and flags, decoded
// strictly over defaults and then checked as a whole.
package config

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"

	"github.com/headcni/headcni/internal/nearest"
	"github.com/headcni/headcni/pkg/config/names"
	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/config/secret"
)

// Config is daemon.yaml. Helm's config.* has the same keys.
type Config struct {
	Headscale  Headscale  `json:"headscale"`
	Tailscale  Tailscale  `json:"tailscale"`
	Network    Network    `json:"network"`
	IPAM       IPAM       `json:"ipam"`
	CNI        CNI        `json:"cni"`
	DNS        DNS        `json:"dns"`
	Kubernetes Kubernetes `json:"kubernetes"`
	Monitoring Monitoring `json:"monitoring"`
	Logging    Logging    `json:"logging"`
}

// Headscale says where the control server is and how to prove who we are.
type Headscale struct {
	// URL is the control server's, http or https. Empty means the one that the node's tailscaled is joined to.
	URL string `json:"url"`
	// APIKeyFile and AuthKeyFile name files that hold an API key or a pre-auth key; either may hold either kind.
	APIKeyFile  string `json:"apiKeyFile"`
	AuthKeyFile string `json:"authKeyFile"`
	// AuthKey is the key itself. A file or an environment variable is safer.
	AuthKey secret.Secret `json:"authKey"`
	// CAFile is a PEM bundle to trust for an https URL beside the system's.
	CAFile string `json:"caFile"`
	// Proxy is the HTTP proxy by which Headscale and relays are reached where nothing else leads there; empty means what the
	// environment says, if anything.
	Proxy string `json:"proxy"`
}

// Modes of tailscaled.
const (
	ModeAuto   = "auto"   // host where the host's LocalAPI socket answers, else daemon
	ModeHost   = "host"   // the host's own tailscaled
	ModeDaemon = "daemon" // a dedicated tailscaled, started by `headcni-daemon tailscaled`
)

// Tailscale says which tailscaled carries the pods' traffic.
type Tailscale struct {
	Mode string `json:"mode"`
	// Socket is the LocalAPI socket, under auto the host's; empty means the usual one of the mode.
	Socket string `json:"socket"`
	// InterfaceName is the tun of the dedicated tailscaled. In host mode the tun is found.
	InterfaceName string   `json:"interfaceName"`
	Tags          []string `json:"tags"`
	// Hostname is the node's name in the tailnet; empty means the host's.
	Hostname string `json:"hostname"`
	// Port is the dedicated tailscaled's UDP port, 0 = any.
	Port int `json:"port"`
}

// What happens to a pod's packets to tailnet devices outside the cluster.
const (
	EgressMasquerade = "masquerade" // from the node's tailnet address
	EgressPreserve   = "preserve"   // from the pod's address; the device must accept the node's routes
	EgressDeny       = "deny"       // what a pod begins is dropped; it may answer
)

// What hosts beside the node can reach.
const (
	LANDeny  = "deny"  // ports of the node that lead to pods (NodePort, hostPort, load balancers)
	LANAllow = "allow" // all pods, by a route over the node
)

// Who may use networks behind devices of the tailnet that are not the cluster's.
const (
	SubnetsDeny  = "deny"  // pods whose Namespace names them
	SubnetsAllow = "allow" // all pods
)

// What a pod may do whose policies are not known yet.
const (
	PolicyStrict = "strict" // reach its own node, and nobody else
	PolicyOpen   = "open"   // everything
)

// Off is the other value of what is Auto where it can be.
const Off = "off"

// Network is what the node's network looks like. Pod CIDRs are this node's, cluster CIDRs this cluster's pools.
type Network struct {
	PodCIDRs     CIDRs `json:"podCIDRs"`
	ClusterCIDRs CIDRs `json:"clusterCIDRs"`
	// RemoteCIDRs are the pods of other clusters on the same tailnet.
	RemoteCIDRs CIDRs `json:"remoteCIDRs"`
	// RemoteClusters are other clusters on the same tailnet; their ranges count as RemoteCIDRs.
	RemoteClusters []RemoteCluster `json:"remoteClusters"`
	ServiceCIDRs   CIDRs           `json:"serviceCIDRs"`
	// MTU of pods in bytes; 0 = the tun's.
	MTU           int    `json:"mtu"`
	Masquerade    bool   `json:"masquerade"`
	TailnetEgress string `json:"tailnetEgress"`
	// TailnetSubnets is who may use networks behind devices of the tailnet that are not the cluster's.
	TailnetSubnets string   `json:"tailnetSubnets"`
	LANFirst       Tristate `json:"lanFirst"`
	LANIngress     string   `json:"lanIngress"`
	// NetworkPolicy has Kubernetes' NetworkPolicies enforced, on a node with a Kubernetes API.
	NetworkPolicy bool `json:"networkPolicy"`
	// PolicyStartup is what a pod may do whose policies are not known yet.
	PolicyStartup string `json:"policyStartup"`
	// FastPath has flows between pods of one node go past the node's rules once they stand: Auto, where the kernel can, or Off.
	FastPath string `json:"fastPath"`
	// PeerMTU has packets between pods of two nodes be as large as the path between these was seen to carry: Auto, or Off, where they are as
	// large as the tun's.
	PeerMTU string `json:"peerMTU"`
	// AdvertiseServices leads the tailnet to the cluster's services.
	AdvertiseServices AdvertiseServices `json:"advertiseServices"`
}

// OnlyNamed is AdvertiseServices.Only for Services that have a name in the tailnet.
const OnlyNamed = "named"

// AdvertiseServices says by which Nodes the tailnet reaches services. The zero value is by none.
type AdvertiseServices struct {
	// NodeSelector are labels that a Node must have, all of them; without any no Node has them.
	NodeSelector map[string]string `json:"nodeSelector"`
	// Only is OnlyNamed, or empty: all addresses in the ranges of services.
	Only string `json:"only"`
	// HealthURL is where each of these Nodes asks its kube-proxy whether services work; empty: nowhere.
	HealthURL string `json:"healthURL"`
}

// WithoutKubernetes says why a node without a Kubernetes API cannot have it, nil where it is not asked for.
func (a AdvertiseServices) WithoutKubernetes() error {
	if len(a.NodeSelector) == 0 {
		return nil
	}
	return errors.New("network.advertiseServices: labels of Node objects choose who leads the tailnet to services, and this node has no Kubernetes API: " +
		"remove the key, set kubernetes.kubeconfig, or advertise a range by hand (tailscale set --advertise-routes)")
}

// Selects reports whether a Node with these labels is to lead the tailnet to services.
func (a AdvertiseServices) Selects(labels map[string]string) bool {
	for key, want := range a.NodeSelector {
		if have, ok := labels[key]; !ok || have != want {
			return false
		}
	}
	return len(a.NodeSelector) > 0
}

// RemoteCluster is another cluster on the same tailnet.
type RemoteCluster struct {
	Name         string    `json:"name"`
	PodCIDRs     CIDRs     `json:"podCIDRs"`
	ServiceCIDRs CIDRs     `json:"serviceCIDRs"`
	DNS          RemoteDNS `json:"dns"`
}

// RemoteDNS says who answers for the names of another cluster: Servers, addresses in its ranges, for Domain. Both or neither are given.
type RemoteDNS struct {
	Domain  string   `json:"domain"`
	Servers []string `json:"servers"`
}

// ranges are all that the cluster has.
func (r RemoteCluster) ranges() CIDRs { return slices.Concat(r.PodCIDRs, r.ServiceCIDRs) }

// IPAM is the conflist's `ipam`.
type IPAM struct {
	Type     string `json:"type"`
	Strategy string `json:"strategy"`
	// GCInterval is how often leases of pods that are gone are looked for, such as 1m; 0 = never.
	GCInterval string `json:"gcInterval"`
}

// CNI says where the runtime looks. A folder that is not given is found (paths.DetectCNI).
type CNI struct {
	BinDir  string `json:"binDir"`
	ConfDir string `json:"confDir"`
	// Exclusive puts other CNIs' configurations that sort before ours out of the runtime's sight until uninstall.
	Exclusive bool `json:"exclusive"`
}

// DNS is how names are resolved: by pods, and by the cluster for the tailnet's names.
type DNS struct {
	// ManageCoreDNS has the controller keep the tailnet's domain in the cluster's DNS; auto means where it is CoreDNS with a
	// ConfigMap that nobody else writes.
	ManageCoreDNS Tristate `json:"manageCoreDNS"`
	// Alias is the domain by which other clusters ask for this cluster's names; empty means the cluster's own domain.
	Alias string `json:"alias"`
	// MagicDNS is what pods are told.
	MagicDNS MagicDNS `json:"magicDNS"`
}

// MagicDNS goes into the conflist as `magic_dns`.
type MagicDNS struct {
	Enable        bool     `json:"enable"`
	BaseDomain    string   `json:"baseDomain"`
	Nameservers   []string `json:"nameservers"`
	SearchDomains []string `json:"searchDomains"`
}

// Kubernetes says whether the node is one of a cluster, and which.
type Kubernetes struct {
	// Enable takes pod CIDRs and the join key from Kubernetes; auto means in a pod, or where Kubeconfig is set.
	Enable Tristate `json:"enable"`
	// NodeName is the Node object's name; empty means the variable NODE_NAME, else the host name in lower case.
	NodeName string `json:"nodeName"`
	// Kubeconfig is a file that says where the API server is; empty means the pod's service account.
	Kubeconfig string `json:"kubeconfig"`
	// NodeGrace is how long the controller leaves a node in Headscale whose Node object is gone, such as 10m: one that was
	// deleted by mistake, or that a kubelet registers anew, keeps its place.
	NodeGrace string `json:"nodeGrace"`
}

// InKubernetes reports whether the node is to be one of a cluster.
func (c Config) InKubernetes(getenv func(string) string) bool {
	if c.Kubernetes.Enable == Auto {
		return c.Kubernetes.Kubeconfig != "" || getenv("KUBERNETES_SERVICE_HOST") != ""
	}
	return c.Kubernetes.Enable == "true"
}

// Node is the name of our Node object: what is configured, what the pod was told, else what kubelet makes of the host name.
func (k Kubernetes) Node(getenv func(string) string) (string, error) {
	if k.NodeName != "" {
		return k.NodeName, nil
	}
	if n := getenv("NODE_NAME"); n != "" {
		return n, nil
	}
	h, err := os.Hostname()
	return strings.ToLower(h), err
}

// Monitoring is the HTTP server for /healthz, /readyz and /metrics.
type Monitoring struct {
	// Listen is an address and port; empty switches the server off.
	Listen string `json:"listen"`
}

// Logging is the daemon's own.
type Logging struct {
	Level  string `json:"level"`  // debug, info, warn, error
	Format string `json:"format"` // text, json
}

// CIDRs are network prefixes as written. Prefixes is for use after Validate.
type CIDRs []string

// Prefixes parses the list; what Validate would refuse is left out.
func (c CIDRs) Prefixes() []netip.Prefix {
	out := make([]netip.Prefix, 0, len(c))
	for _, s := range c {
		if p, err := netip.ParsePrefix(s); err == nil {
			out = append(out, p)
		}
	}
	return out
}

// Tristate is "auto", "true" or "false", written with or without quotes.
type Tristate string

// Auto lets the daemon choose.
const Auto Tristate = "auto"

// UnmarshalJSON takes a string or a bool.
func (t *Tristate) UnmarshalJSON(b []byte) error {
	*t = Tristate(strings.Trim(string(b), `"`))
	return nil
}

// Default is the configuration where nothing is set.
func Default() Config {
	return Config{
		Tailscale: Tailscale{Mode: ModeAuto, InterfaceName: names.DaemonTun, Tags: []string{"tag:headcni"}, Port: 41641},
		Network: Network{Masquerade: true, TailnetEgress: EgressMasquerade, TailnetSubnets: SubnetsDeny, LANFirst: Auto, LANIngress: LANDeny, NetworkPolicy: true, PolicyStartup: PolicyStrict, FastPath: string(Auto), PeerMTU: Off,
			AdvertiseServices: AdvertiseServices{NodeSelector: map[string]string{}, HealthURL: "http://127.0.0.1:10256/healthz"}},
		IPAM:       IPAM{Type: "headcni-ipam", Strategy: "sequential", GCInterval: "1m"},
		CNI:        CNI{BinDir: paths.CNIBinDir, ConfDir: paths.CNIConfDir},
		DNS:        DNS{ManageCoreDNS: Auto},
		Kubernetes: Kubernetes{Enable: Auto, NodeGrace: "10m"},
		Monitoring: Monitoring{Listen: "127.0.0.1:9669"},
		Logging:    Logging{Level: "info", Format: "text"},
	}
}

// Load reads path over the defaults, then the environment, then sets (key=value, as in Set), and checks the result.
// A missing file is an error unless optional.
func Load(path string, optional bool, environ, sets []string) (Config, error) {
	c := Default()
	c.CNI.BinDir, c.CNI.ConfDir = "", ""
	b, err := os.ReadFile(path)
	switch {
	case err == nil:
		if err := decodeFile(path, b, &c); err != nil {
			return Config{}, err
		}
	case optional && errors.Is(err, fs.ErrNotExist):
	default:
		return Config{}, fmt.Errorf("read the configuration: %w; give --config or write %s", err, paths.ConfigFile)
	}
	if err := c.override(environ, sets); err != nil {
		return Config{}, err
	}
	c.CNI.find("/")
	if err := c.Validate(); err != nil {
		return Config{}, err
	}
	return c, nil
}

// find sets the folders that are not given to those of the host's container runtime.
func (c *CNI) find(root string) {
	binDir, confDir := paths.DetectCNI(root)
	if c.BinDir == "" {
		c.BinDir = binDir
	}
	if c.ConfDir == "" {
		c.ConfDir = confDir
	}
}

// override applies HEADCNI_SECTION_KEY variables and then key=value settings, for instance
// HEADCNI_NETWORK_PODCIDRS=10.244.1.0/24,fd00:244:1::/64 or network.podCIDRs=10.244.1.0/24.
func (c *Config) override(environ, sets []string) error {
	byEnv := map[string]string{}
	for _, key := range Keys() {
		byEnv[EnvName(key)] = key
	}
	var errs []error
	for _, e := range environ {
		name, value, _ := strings.Cut(e, "=")
		if key := byEnv[name]; key != "" {
			if err := c.Set(key, value); err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", name, err))
			}
		} else if meant := mistypedEnv(name); meant != "" {
			errs = append(errs, fmt.Errorf("%s: no such variable; did you mean %s?", name, meant))
		}
	}
	for _, s := range sets {
		key, value, ok := strings.Cut(s, "=")
		if !ok {
			errs = append(errs, fmt.Errorf("--set %s: want key=value", s))
			continue
		}
		if key == "headscale.authKey" {
			errs = append(errs, fmt.Errorf("--set %s: a command line can be read by everybody; use a file or an environment variable", key))
			continue
		}
		if err := c.Set(key, value); err != nil {
			errs = append(errs, fmt.Errorf("--set %s: %w", key, err))
		}
	}
	return errors.Join(errs...)
}

// EnvName is the environment variable of a key: network.podCIDRs -> HEADCNI_NETWORK_PODCIDRS.
func EnvName(key string) string {
	return "HEADCNI_" + strings.ToUpper(strings.ReplaceAll(key, ".", "_"))
}

// serviceVariable matches the variables that Kubernetes sets in a container for each Service, after the Service's name.
var serviceVariable = regexp.MustCompile(`_(SERVICE_(HOST|PORT(_\w+)?)|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)$`)

// mistypedEnv returns the variable that somebody probably meant by one that is none of ours, or "". Other programs have variables
// that begin with HEADCNI_ too (our tests, Kubernetes for a Service called headcni-...): only what looks like a key is taken for one.
func mistypedEnv(name string) string {
	rest, ours := strings.CutPrefix(name, "HEADCNI_")
	if !ours || !strings.Contains(rest, "_") || serviceVariable.MatchString(name) || name == authKeyVariable || name == authKeyFileVariable {
		return ""
	}
	known := []string{authKeyVariable, authKeyFileVariable}
	for _, key := range Keys() {
		known = append(known, EnvName(key))
	}
	for i, name := range known {
		known[i] = strings.TrimPrefix(name, "HEADCNI_")
	}
	if meant := nearest.Key(rest, known); meant != "" {
		return "HEADCNI_" + meant
	}
	return ""
}

// Keys lists every key as section.key, in the order of the file.
func Keys() []string {
	var keys []string
	walk(&Config{}, func(key string, _ field) bool {
		keys = append(keys, key)
		return true
	})
	return keys
}

// Set changes one key. Lists are separated by commas.
func (c *Config) Set(key, value string) error {
	var found bool
	var err error
	walk(c, func(k string, f field) bool {
		if k != key {
			return true
		}
		found, err = true, f.set(value)
		return false
	})
	if !found {
		return fmt.Errorf("no such key%s", didYouMean(key, Keys()))
	}
	return err
}

// String shows the configuration as YAML, secrets masked.
func (c Config) String() string {
	b, err := yaml.Marshal(c)
	if err != nil {
		return err.Error()
	}
	return string(b)
}
