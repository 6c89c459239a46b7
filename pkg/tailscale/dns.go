package tailscale

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// DNS is what the control server says of names, beside those of the devices.
type DNS struct {
	// Splits are the domains that have resolvers of their own at every device (Headscale's dns.nameservers.split), in lower case, in order.
	Splits []string
	// Records are the extra records (Headscale's dns.extra_records and extra_records_path) that are addresses, by name in lower case
	// without a final dot.
	Records map[string][]netip.Addr
}

// wireDNS is tailcfg.DNSConfig as far as it is used.
type wireDNS struct {
	Routes       map[string][]struct{ Addr string }
	ExtraRecords []struct{ Name, Type, Value string }
}

// DNS asks for it. tailscaled has it from its network map, also while the control server is away.
func (c *Client) DNS(ctx context.Context) (DNS, error) {
	var w wireDNS
	if err := c.call(ctx, "GET", "dns-config", nil, &w); err != nil {
		return DNS{}, fmt.Errorf("ask for the tailnet's DNS configuration: %w", err)
	}
	return w.dns(), nil
}

func (w wireDNS) dns() DNS {
	d := DNS{Records: map[string][]netip.Addr{}}
	for domain, resolvers := range w.Routes {
		if len(resolvers) > 0 { // else the tailnet's own
			d.Splits = append(d.Splits, plainName(domain))
		}
	}
	slices.Sort(d.Splits)
	for _, r := range w.ExtraRecords {
		a, err := netip.ParseAddr(r.Value)
		is4 := r.Type == "A" && a.Is4()
		is6 := r.Type == "AAAA" && a.Is6()
		if err != nil || a.Zone() != "" || r.Type != "" && !is4 && !is6 {
			continue // Headscale has no other types
		}
		name := plainName(r.Name)
		d.Records[name] = append(d.Records[name], a)
	}
	return d
}

func plainName(s string) string { return strings.ToLower(strings.TrimSuffix(s, ".")) }
