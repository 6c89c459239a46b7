package nodedns

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/headcni/headcni/pkg/reconcile"
)

// Each of three is found, with what to do; one alone is no error but the first, which is a warning; two are.
func TestNameRisks(t *testing.T) {
	server := func(s string) []netip.Addr {
		return []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr(s)}
	}
	for name, c := range map[string]struct {
		o             Seen
		domain        string
		found         string // parts of their texts
		err, warnOnly bool
	}{
		"none":                    {Seen{Nameservers: server("192.0.2.2"), Splits: []string{"corp.example", "local.example"}}, "", "", false, false},
		"resolv.conf":             {Seen{Nameservers: server("100.100.100.100")}, "", "resolvConf", true, true},
		"resolv.conf, IPv6":       {Seen{Nameservers: server("fd7a:115c:a1e0::53")}, "", "resolvConf", true, true},
		"accept-dns":              {Seen{CorpDNS: true}, "", "--accept-dns=false", false, false},
		"split":                   {Seen{Splits: []string{"cluster.local"}}, "", "nameservers.split", false, false},
		"split below":             {Seen{Splits: []string{"svc.cluster.local"}, CorpDNS: true}, "", "--accept-dns=false nameservers.split", true, false},
		"split above":             {Seen{Splits: []string{"local"}, CorpDNS: true}, "", "--accept-dns=false nameservers.split", true, false},
		"another cluster's split": {Seen{Splits: []string{"cluster.local"}, CorpDNS: true}, "k8s.Example", "--accept-dns=false", false, false},
		"own domain":              {Seen{Splits: []string{"k8s.example"}, CorpDNS: true}, "k8s.Example", "--accept-dns=false nameservers.split", true, false},
		"all":                     {Seen{Nameservers: server("100.100.100.100"), CorpDNS: true, Splits: []string{"cluster.local"}}, "", "resolvConf --accept-dns=false nameservers.split", true, false},
	} {
		r := RisksOf(c.o, c.domain)
		texts, err := strings.Join(r.Texts(), "\n"), r.Err()
		if (err != nil) != c.err || errors.As(err, new(reconcile.Warning)) != c.warnOnly || len(r.Texts()) != len(strings.Fields(c.found)) {
			t.Errorf("%s: %q, %v", name, texts, err)
		}
		for _, want := range strings.Fields(c.found) {
			if !strings.Contains(texts, want) || err != nil && !strings.Contains(err.Error(), want) {
				t.Errorf("%s: want %s in %q and in %v", name, want, texts, err)
			}
		}
	}
}
