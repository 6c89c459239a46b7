// Package records makes names in the tailnet for Services, as the extra records that Headscale reads from a file. It does no I/O.
package records

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/util/validation"
)

// Service is one that wants a name.
type Service struct {
	Namespace, Name string
	// Label is the name that it wants, without the tailnet's domain.
	Label string
	// IPs are its addresses; a headless one has none.
	IPs     []netip.Addr
	Created time.Time
}

// Record is one of Headscale's extra records.
type Record struct {
	Name  string `json:"name"`
	Type  string `json:"type"`
	Value string `json:"value"`
}

// Refusal says why a Service has no name.
type Refusal struct {
	Service Service
	Reason  string
}

// MaxNames is how many Services have a name: each is in the file that Headscale sends to every device, and who may make Services names them.
const MaxNames = 1000

// Plan gives each Service its name below the tailnet's domain, where it may have it.
func Plan(domain string, services []Service, taken []string, had []Record) (out []Record, refused []Refusal) {
	accepted, refused := Accept(services, taken, had)
	for _, s := range accepted {
		out = append(out, recordsOf(domain, s)...)
	}
	slices.SortFunc(out, func(a, b Record) int { return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.Type, b.Type)) })
	return out, refused
}

// Accept says which Services may have the names that they want. taken are the names of the tailnet's nodes, had the records as they are now. Who
// has a name keeps it, also where an older Service wants it too: else whoever has an old one could take what others use. Of those that have
// none the oldest come first.
func Accept(services []Service, taken []string, had []Record) (accepted []Service, refused []Refusal) {
	holds := map[string][]string{}
	for _, r := range had {
		label, _, _ := strings.Cut(r.Name, ".")
		holds[label] = append(holds[label], r.Value)
	}
	isHolder := func(s Service) bool {
		return slices.ContainsFunc(s.IPs, func(ip netip.Addr) bool { return slices.Contains(holds[s.Label], ip.String()) })
	}
	services = slices.Clone(services)
	slices.SortFunc(services, func(a, b Service) int {
		if x, y := isHolder(a), isHolder(b); x != y {
			if x {
				return -1
			}
			return 1
		}
		return cmp.Or(a.Created.Compare(b.Created), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	has := map[string]Service{}
	for _, s := range services {
		reason := ""
		other, dup := has[s.Label]
		switch {
		case len(validation.IsDNS1123Label(s.Label)) > 0:
			reason = fmt.Sprintf("%.253q is no name: want lower-case letters, digits and dashes, 63 at most, and no domain behind it", s.Label)
		case slices.ContainsFunc(taken, func(n string) bool { return strings.EqualFold(n, s.Label) }):
			reason = fmt.Sprintf("a node of the tailnet has the name %s", s.Label)
		case dup:
			reason = fmt.Sprintf("the Service %s/%s has the name %s", other.Namespace, other.Name, s.Label)
		case len(s.IPs) == 0:
			reason = "it has no address of its own (ClusterIP): names lead to one address of each family"
		case len(accepted) == MaxNames:
			reason = fmt.Sprintf("%d Services have names already, and no more are told to Headscale", MaxNames)
		}
		if reason != "" {
			refused = append(refused, Refusal{s, reason})
			continue
		}
		has[s.Label] = s
		accepted = append(accepted, s)
	}
	return accepted, refused
}

// recordsOf makes one record of each family: of two the tailnet's resolver answers the first only.
func recordsOf(domain string, s Service) (out []Record) {
	for _, r := range []struct {
		kind string
		of   func(netip.Addr) bool
	}{{"A", netip.Addr.Is4}, {"AAAA", netip.Addr.Is6}} {
		if i := slices.IndexFunc(s.IPs, r.of); i >= 0 {
			out = append(out, Record{s.Label + "." + domain, r.kind, s.IPs[i].String()})
		}
	}
	return out
}

// JSON is the file for dns.extra_records_path.
func JSON(list []Record) (string, error) {
	if list == nil {
		list = []Record{} // Headscale refuses null
	}
	b, err := json.MarshalIndent(list, "", "  ")
	return string(b) + "\n", err
}

// FromJSON reads what JSON made. What cannot be read are no records.
func FromJSON(text string) (list []Record) {
	if json.Unmarshal([]byte(text), &list) != nil {
		return nil
	}
	return list
}
