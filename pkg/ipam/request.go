package ipam

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// OwnerOf makes an owner from what the runtime says in the environment. Of cniArgs (CNI_ARGS, "K=V;K=V") it takes the
// pod's name; other keys are left to others.
func OwnerOf(containerID, ifName, cniArgs string) Owner {
	o := Owner{ContainerID: containerID, IfName: ifName}
	for key, value := range args(cniArgs) {
		switch key {
		case "K8S_POD_NAMESPACE":
			o.PodNamespace = value
		case "K8S_POD_NAME":
			o.PodName = value
		}
	}
	return o
}

func args(cniArgs string) func(yield func(key, value string) bool) {
	return func(yield func(key, value string) bool) {
		for pair := range strings.SplitSeq(cniArgs, ";") {
			key, value, _ := strings.Cut(pair, "=")
			if !yield(strings.TrimSpace(key), strings.TrimSpace(value)) {
				return
			}
		}
	}
}

// RequestedIPs gathers the addresses that a runtime or user asks for, from the three places that the CNI conventions
// name: IP in CNI_ARGS (several with commas), args.cni.ips and runtimeConfig.ips of the network configuration, which is
// given by its keys. Prefix lengths are allowed and ignored: the range gives the length. As the conventions want it, CNI_ARGS
// is ignored where the configuration asks for any.
func RequestedIPs(cniArgs string, netConf map[string]json.RawMessage) ([]netip.Addr, error) {
	var conventional struct {
		CNI struct {
			IPs []string `json:"ips"`
		} `json:"cni"`
	}
	var runtime struct {
		IPs []string `json:"ips"`
	}
	for key, to := range map[string]any{"args": &conventional, "runtimeConfig": &runtime} {
		if v := netConf[key]; v != nil && json.Unmarshal(v, to) != nil {
			return nil, fmt.Errorf("%w: %s: want an object with addresses in a list called ips", ErrConfig, key)
		}
	}
	var out []netip.Addr
	add := func(from string, texts []string) error {
		for _, text := range texts {
			a, err := parseRequested(text)
			if err != nil {
				return fmt.Errorf("%s: %q: want an address, with or without a prefix length", from, text)
			}
			if !slices.Contains(out, a) {
				out = append(out, a)
			}
		}
		return nil
	}
	for _, c := range []struct {
		from string
		ips  []string
	}{{"args.cni.ips", conventional.CNI.IPs}, {"runtimeConfig.ips", runtime.IPs}} {
		if err := add(c.from, c.ips); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrConfig, err)
		}
	}
	elsewhere := len(out) > 0
	for key, value := range args(cniArgs) {
		if key == "IP" && value != "" && !elsewhere {
			if err := add("CNI_ARGS IP", strings.Split(value, ",")); err != nil {
				return nil, fmt.Errorf("%w: %w", ErrArgs, err)
			}
		}
	}
	return out, nil
}

func parseRequested(text string) (netip.Addr, error) {
	text, _, _ = strings.Cut(strings.TrimSpace(text), "/")
	a, err := netip.ParseAddr(text)
	if err != nil || a.Zone() != "" {
		return netip.Addr{}, fmt.Errorf("%q is no address", text)
	}
	return a.Unmap(), nil
}
