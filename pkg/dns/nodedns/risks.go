package nodedns

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/dns/corefile"
	"github.com/headcni/headcni/pkg/findings"
	"github.com/headcni/headcni/pkg/reconcile"
)

// Seen is what is seen on a node of who is asked for names.
type Seen struct {
	// Nameservers are the host's.
	Nameservers []netip.Addr
	// CorpDNS is tailscaled's accept-dns, Splits are the domains that the tailnet sends to resolvers of their own.
	CorpDNS bool
	Splits  []string
}

// Risks are things that may lead questions for names in a circle, or to nobody, each with what to do. Any of the last two alone is
// somebody's good right.
type Risks struct {
	resolvConf error // pods with the host's resolver, which CoreDNS forwards to, are sent to the tailnet's
	acceptDNS  error // tailscaled writes the host's resolver
	split      error // the tailnet's devices, this one among them, ask the cluster for the cluster's own domain
}

// RisksOf finds them. clusterDomain is Kubernetes' own, "" = cluster.local.
func RisksOf(o Seen, clusterDomain string) (r Risks) {
	own := func(a netip.Addr) bool { return a == netset.ResolverIPv4 || a == netset.ResolverIPv6 }
	if i := slices.IndexFunc(o.Nameservers, own); i >= 0 {
		r.resolvConf = fmt.Errorf("the host's resolv.conf names tailscaled's resolver %s, and pods with the host's (dnsPolicy Default), as CoreDNS is, ask it for "+
			"everything: give kubelet a file with other name servers (resolvConf in its configuration, --resolv-conf)", o.Nameservers[i])
	}
	if o.CorpDNS {
		r.acceptDNS = errors.New("tailscaled's accept-dns is on, by which it writes the host's resolv.conf: run `tailscale set --accept-dns=false`")
	}
	domain := strings.ToLower(cmp.Or(clusterDomain, corefile.ClusterDomain))
	for _, s := range o.Splits {
		if s == domain || strings.HasSuffix(domain, "."+s) || strings.HasSuffix(s, "."+domain) {
			r.split = fmt.Errorf("Headscale's dns.nameservers.split sends %s, the cluster's own, to the cluster: this is for devices outside it, and must not reach CoreDNS' own questions", s)
			break
		}
	}
	return r
}

// found are those that are there.
func (r Risks) found() []error {
	return slices.DeleteFunc([]error{r.resolvConf, r.acceptDNS, r.split}, func(err error) bool { return err == nil })
}

// Err is an error where two of them make a circle possible, and where CoreDNS asks somebody who answers for nothing but the tailnet.
func (r Risks) Err() error {
	switch found := r.found(); {
	case len(found) >= 2:
		return findings.Errorf(findings.NamesCircle, "questions for names can go in a circle: %w", errors.Join(found...))
	case r.resolvConf != nil:
		return reconcile.Warning{Err: findings.With(findings.NamesRisk, r.resolvConf)}
	}
	return nil
}

// Texts are for people.
func (r Risks) Texts() (out []string) {
	for _, err := range r.found() {
		out = append(out, err.Error())
	}
	return out
}
