package plugin

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"

	"github.com/headcni/headcni/pkg/config/names"
	"github.com/headcni/headcni/pkg/config/netconf"
)

// errEnvironment marks a CNI variable that cannot be used (CNI error code 4).
var errEnvironment = errors.New("invalid environment variable")

// Args holds the values of CNI_ARGS. It ignores keys that are unknown here: they are for other plugins.
type Args struct {
	PodNamespace, PodName string
	PodUID                string // "" where it is nothing that could be one
	IPs                   []netip.Addr
	MAC                   net.HardwareAddr
}

// parseArgs reads "KEY=VALUE;KEY=VALUE".
func parseArgs(s string) (a Args, err error) {
	for _, pair := range strings.Split(s, ";") {
		key, value, ok := strings.Cut(pair, "=")
		// As headcni-ipam reads it: a request that has a space beside it is one too.
		if key, value = strings.TrimSpace(key), strings.TrimSpace(value); value == "" && (ok || key == "") {
			continue
		}
		var fault error
		switch {
		case !ok:
			fault = fmt.Errorf("%q: want KEY=VALUE pairs separated by semicolons", pair)
		case key == "K8S_POD_NAMESPACE":
			a.PodNamespace = value
		case key == "K8S_POD_NAME":
			a.PodName = value
		case key == "K8S_POD_UID":
			if names.Valid(value) {
				a.PodUID = value
			}
		case key == "IP":
			for _, one := range strings.Split(value, ",") { // several, one a family, for dual stack
				var ip netip.Addr
				if ip, fault = netconf.ParseIP(one); fault != nil {
					break
				}
				a.IPs = append(a.IPs, ip)
			}
		case key == "MAC":
			a.MAC, fault = netconf.ParseMAC(value)
		}
		if fault != nil {
			err = errors.Join(err, fmt.Errorf("%w CNI_ARGS: %w", errEnvironment, fault))
		}
	}
	return a, err
}

// checkIfName refuses what the kernel would make something else of.
func checkIfName(name string) error {
	switch {
	case strings.Contains(name, "%"):
		// It would take it for a pattern and choose a name of its own (net/core/dev.c, dev_alloc_name).
		return fmt.Errorf("%w CNI_IFNAME: %q: must not contain %%", errEnvironment, name)
	case name == "all" || name == "default":
		return fmt.Errorf("%w CNI_IFNAME: %q: sysctls of that name are all interfaces'; choose another", errEnvironment, name)
	}
	return nil
}

// requestedIPs follows CNI's conventions: what the runtime says in the configuration is stronger than CNI_ARGS.
func (r *Request) requestedIPs() []netip.Addr {
	if ips := r.Config.Runtime.IPs; len(ips) > 0 {
		return ips
	}
	return r.Args.IPs
}

func (r *Request) requestedMAC() net.HardwareAddr {
	if mac := r.Config.Runtime.MAC; mac != nil {
		return mac
	}
	return r.Args.MAC
}

func (r *Request) podLabel() string {
	if r.Args.PodName == "" {
		return ""
	}
	return r.Args.PodNamespace + "/" + r.Args.PodName
}
