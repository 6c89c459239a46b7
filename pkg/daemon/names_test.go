package daemon

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
		o             observation
		domain        string
		found         string // parts of their texts
		err, warnOnly bool
	}{
		"none":                    {observation{nameservers: server("192.0.2.2"), splits: []string{"corp.example", "local.example"}}, "", "", false, false},
		"resolv.conf":             {observation{nameservers: server("100.100.100.100")}, "", "resolvConf", true, true},
		"resolv.conf, IPv6":       {observation{nameservers: server("fd7a:115c:a1e0::53")}, "", "resolvConf", true, true},
		"accept-dns":              {observation{corpDNS: true}, "", "--accept-dns=false", false, false},
		"split":                   {observation{splits: []string{"cluster.local"}}, "", "nameservers.split", false, false},
		"split below":             {observation{splits: []string{"svc.cluster.local"}, corpDNS: true}, "", "--accept-dns=false nameservers.split", true, false},
		"split above":             {observation{splits: []string{"local"}, corpDNS: true}, "", "--accept-dns=false nameservers.split", true, false},
		"another cluster's split": {observation{splits: []string{"cluster.local"}, corpDNS: true}, "k8s.Example", "--accept-dns=false", false, false},
		"own domain":              {observation{splits: []string{"k8s.example"}, corpDNS: true}, "k8s.Example", "--accept-dns=false nameservers.split", true, false},
		"all":                     {observation{nameservers: server("100.100.100.100"), corpDNS: true, splits: []string{"cluster.local"}}, "", "resolvConf --accept-dns=false nameservers.split", true, false},
	} {
		r := nameRisksOf(c.o, c.domain)
		texts, err := strings.Join(r.texts(), "\n"), r.err()
		if (err != nil) != c.err || errors.As(err, new(reconcile.Warning)) != c.warnOnly || len(r.texts()) != len(strings.Fields(c.found)) {
			t.Errorf("%s: %q, %v", name, texts, err)
		}
		for _, want := range strings.Fields(c.found) {
			if !strings.Contains(texts, want) || err != nil && !strings.Contains(err.Error(), want) {
				t.Errorf("%s: want %s in %q and in %v", name, want, texts, err)
			}
		}
	}
}
