package corefile

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"k8s.io/apimachinery/pkg/util/validation"
)

// Zone is a domain that CoreDNS is to ask others for.
type Zone struct {
	// Name is the domain, in lower case without its final dot.
	Name string
	// Upstreams answer for it, the first that is there.
	Upstreams []netip.AddrPort
	// As is the domain below which the upstreams have the names, and "" where they have them below Name.
	As string
}

// CheckDomain says what is wrong with the name of a zone.
func CheckDomain(name string) error {
	if len(validation.IsDNS1123Subdomain(name)) > 0 {
		return fmt.Errorf("%.253q is no domain: want labels of lower-case letters, digits and dashes between dots, such as hc.example.com", name)
	}
	for label := range strings.SplitSeq(name, ".") {
		if len(label) > maxLabel {
			return fmt.Errorf("%q is no domain: %q is longer than %d characters", name, label, maxLabel)
		}
	}
	if isReverse(name) {
		return fmt.Errorf("%q is a domain of addresses", name)
	}
	return nil
}

// maxLabel is the longest label that DNS has, in bytes (RFC 1035, section 2.3.4).
const maxLabel = 63

// Apart says what is wrong with a zone beside the cluster's own domains: the more specific of two answers, so neither may hold the other.
func Apart(zone string, clusters []string) error {
	var errs []error
	for _, c := range clusters {
		if inside(zone, c) {
			errs = append(errs, fmt.Errorf("%s is inside the cluster's domain %s", zone, c))
		} else if inside(c, zone) {
			errs = append(errs, fmt.Errorf("the cluster's domain %s is inside %s", c, zone))
		}
	}
	return errors.Join(errs...)
}

// The answers live for 5 s at their source; more would keep a node that moved away out of reach by its name. Failures are kept for 5 s,
// which is CoreDNS' default: it does not start with an option that it does not know, and before 1.9.4 it does not know servfail.
const cacheLines = "success 9984 5\ndenial 1024 5"

// forwardLines are how the upstreams are asked: one after the other, but for those that do not answer a health check. Where there is one, that
// could only add failures.
func forwardLines(z Zone) string {
	if len(z.Upstreams) == 1 {
		return "max_fails 0"
	}
	return "policy sequential"
}

// Render makes the server blocks. Their port is that of CoreDNS' others. No zones are no text.
func Render(zones []Zone, port int) string {
	var out strings.Builder
	for _, z := range zones {
		rewrite := ""
		if z.As != "" {
			// Answers have the name that was asked for again.
			rewrite = fmt.Sprintf("    rewrite stop name suffix .%s. .%s. answer auto\n", z.Name, z.As)
		}
		fmt.Fprintf(&out, "%s:%d {\n    errors\n%s    cache 30 {\n%s    }\n    forward . %s {\n%s    }\n}\n",
			z.Name, port, rewrite, indented(cacheLines), addresses(z.Upstreams), indented(forwardLines(z)))
	}
	return out.String()
}

func indented(lines string) string {
	return "        " + strings.ReplaceAll(lines, "\n", "\n        ") + "\n"
}

// addresses are as forward takes them: without a port where it is 53.
func addresses(list []netip.AddrPort) string {
	var out []string
	for _, a := range list {
		if a.Port() == defaultPort {
			out = append(out, a.Addr().String())
		} else {
			out = append(out, a.String())
		}
	}
	return strings.Join(out, " ")
}
