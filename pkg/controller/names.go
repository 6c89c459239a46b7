package controller

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/dns/corefile"
	"github.com/headcni/headcni/pkg/dns/tailnet"
	"github.com/headcni/headcni/pkg/kube"
)

const (
	// checkDNS is the finding about the cluster's DNS.
	checkDNS = "dns"
	// namesCheck is how often ConfigMaps about names are looked at although what they are to hold is the same.
	namesCheck = time.Minute

	managedBy = "app.kubernetes.io/managed-by"
)

// dnsState is what there is of CoreDNS; nil where there is none.
type dnsState struct{ main, custom *corev1.ConfigMap }

// dnsPlan is what to write, with the resourceVersions that were read.
type dnsPlan struct {
	// writes are made one after the other, none after one that fails: what one takes away another gives, and CoreDNS does not start with both.
	writes []dnsWrite
	// added: CoreDNS' own ConfigMap had no section of ours at all. by is who wrote it last, if not we.
	added bool
	by    string
	// finding is what somebody has to do, note what is as it should be and good to know; "" = nothing.
	finding, note string
}

type dnsWrite struct {
	verb   string
	object *corev1.ConfigMap
}

const (
	update = "update"
	create = "create"
	remove = "remove"
)

// names keeps the tailnet's domain in the cluster's DNS, and the names of Services for the tailnet.
func (c *Controller) names(ctx context.Context, nodes []node) error {
	domain, zones, finding := c.zones(nodes)
	return errors.Join(c.serviceNames(ctx, domain), c.clusterDNS(ctx, zones, finding))
}

// clusterDNS keeps zones in the cluster's DNS. finding is why there are none.
func (c *Controller) clusterDNS(ctx context.Context, zones []corefile.Zone, finding string) error {
	text := fmt.Sprint(zones, finding)
	if text == c.namesOf && c.now().Sub(c.namesAt) < namesCheck {
		return nil
	}
	p, err := c.writeNames(ctx, zones)
	switch {
	case apierrors.IsForbidden(err):
		p, err = dnsPlan{finding: err.Error() + ": upgrade the chart, which gives that right, or set dns.manageCoreDNS to false"}, nil
	case isRefused(err):
		do := "put there by hand what `headcnictl dns corefile` prints, or set dns.manageCoreDNS to false"
		if c.cfg.DNS.ManageCoreDNS == "false" {
			do = "take the section of headcni out by hand"
		}
		p, err = dnsPlan{finding: err.Error() + ": " + do}, nil
	}
	if err != nil {
		return err
	}
	if finding == "" || c.cfg.DNS.ManageCoreDNS == "false" {
		finding = p.finding // where nothing is to be written, nothing is missing
	}
	c.metrics.findings.WithLabelValues(checkDNS).Set(0)
	if finding != "" {
		c.metrics.findings.WithLabelValues(checkDNS).Set(1)
	}
	c.announce(ctx, checkDNS, finding, c.about())
	if p.note != "" && p.note != c.namesNote {
		c.log.Info("the cluster's DNS", "note", p.note)
	}
	c.namesOf, c.namesAt, c.namesNote = text, c.now(), p.note
	return nil
}

// isRefused reports whether the API server will not take what is written, however often: a ConfigMap that is immutable, or too large.
func isRefused(err error) bool {
	return apierrors.IsInvalid(err) || apierrors.IsRequestEntityTooLargeError(err)
}

// zones are the tailnet's domain, and those that CoreDNS is to forward. None is known before a node says the tailnet's domain, and while
// nodes contradict each other: what stands there stays then.
func (c *Controller) zones(nodes []node) (domain string, zones []corefile.Zone, finding string) {
	var said []tailnet.Node
	for _, n := range nodes {
		if n.key != "" && !n.leaving {
			said = append(said, tailnet.Node{Name: n.name, Domain: n.domain, PodCIDRs: n.cidrs})
		}
	}
	z, ok, err := tailnet.Zone(said)
	if err == nil && ok {
		err = c.checkServer(z.Name)
	}
	switch {
	case err != nil:
		return "", nil, "names of the tailnet: " + err.Error()
	case !ok:
		return "", nil, ""
	}
	if a := c.cfg.DNS.Alias; a != "" && corefile.Apart(a, []string{z.Name}) != nil {
		return z.Name, nil, fmt.Sprintf("names for other clusters: dns.alias %s and the tailnet's domain %s are inside each other: choose another alias", a, z.Name)
	}
	remote, err := remoteZones(c.cfg.Network.RemoteClusters, z.Name)
	if err != nil {
		return z.Name, nil, "names of other clusters: " + err.Error()
	}
	return z.Name, append([]corefile.Zone{z}, remote...), ""
}

// remoteZones are the domains of other clusters. MagicDNS answers for all that is below the tailnet's domain itself.
func remoteZones(clusters []config.RemoteCluster, tailnet string) (zones []corefile.Zone, err error) {
	for _, c := range clusters {
		if c.DNS.Domain == "" {
			continue
		}
		z := corefile.Zone{Name: c.DNS.Domain}
		if err := corefile.Apart(z.Name, []string{tailnet}); err != nil {
			return nil, fmt.Errorf("%s: %s and the tailnet's domain %s are inside each other: give that cluster another domain (dns.alias there)", c.Name, z.Name, tailnet)
		}
		for _, s := range c.DNS.Servers {
			if a, err := netip.ParseAddr(s); err == nil { // validated
				z.Upstreams = append(z.Upstreams, netip.AddrPortFrom(a, 53))
			}
		}
		zones = append(zones, z)
	}
	return zones, nil
}

// withAlias adds the domain by which other clusters ask for this one's names: CoreDNS asks itself. port is its own.
func withAlias(zones []corefile.Zone, alias string, domains []string, port int) []corefile.Zone {
	if alias == "" || len(domains) == 0 || slices.Contains(domains, alias) {
		return zones
	}
	self := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), uint16(port))
	return append(slices.Clone(zones), corefile.Zone{Name: alias, As: domains[0], Upstreams: []netip.AddrPort{self}})
}

// checkServer says whether Headscale itself would have to be found by the tailnet's names.
func (c *Controller) checkServer(domain string) error {
	u, err := url.Parse(c.cfg.Headscale.URL)
	if err == nil && corefile.Apart(strings.ToLower(u.Hostname()), []string{domain}) != nil {
		return fmt.Errorf("headscale.url %s is inside the tailnet's domain %s, so that nobody finds Headscale before it is found: change dns.base_domain of Headscale",
			u.Hostname(), domain)
	}
	return nil
}

// writeNames observes, plans and writes. No zones write nothing, but where they are not wanted at all.
func (c *Controller) writeNames(ctx context.Context, zones []corefile.Zone) (dnsPlan, error) {
	mode := c.cfg.DNS.ManageCoreDNS
	if len(zones) == 0 && mode != "false" {
		return dnsPlan{}, nil
	}
	have, err := c.dnsState(ctx)
	if apierrors.IsForbidden(err) && mode == "false" {
		return dnsPlan{}, nil // who may not read has not written
	}
	if err != nil {
		return dnsPlan{}, err
	}
	p := planDNS(have, zones, c.cfg.DNS)
	if c.undone(&p); len(p.writes) == 0 {
		return p, nil
	}
	if err := c.applyDNS(ctx, p); err != nil {
		return p, err
	}
	c.section.wrote = c.now()
	return p, nil
}

// sectionLost is how often CoreDNS' ConfigMap may lose our section before that is a finding.
const sectionLost = 3

// section is what became of our section in CoreDNS' ConfigMap: wrote is when we wrote it last, lost how often it was gone since it stood for an hour.
type section struct {
	wrote time.Time
	lost  int
	by    string
}

// undone notes that somebody took our section out, and says so where that goes on: kubeadm does it once in an upgrade, a tool that keeps
// the ConfigMap as it has it does it again and again. With `auto` it is not put back each time then, as CoreDNS would load one after the other.
func (c *Controller) undone(p *dnsPlan) {
	s := &c.section
	since := c.now().Sub(s.wrote)
	if p.added && !s.wrote.IsZero() {
		wait := namesCheck << min(6, max(0, s.lost-sectionLost)) // at last an hour
		if s.lost >= sectionLost && c.cfg.DNS.ManageCoreDNS == config.Auto && since < wait {
			p.writes = nil
		} else {
			s.lost, s.by = s.lost+1, p.by
		}
	} else if !p.added && since > time.Hour {
		s.lost = 0
	}
	if s.lost >= sectionLost && p.finding == "" {
		p.finding = fmt.Sprintf("ConfigMap %s/%s loses the section of headcni again and again (%s wrote it): have that keep what `headcnictl dns corefile` prints, or set dns.manageCoreDNS to false",
			corefile.Namespace, corefile.ConfigMap, s.by)
	}
}

// lastWriter is who wrote an object last, but for us.
func lastWriter(m *corev1.ConfigMap) string {
	by, at := "somebody", time.Time{}
	for _, f := range m.ManagedFields {
		if f.Manager != kube.Controller && f.Time != nil && f.Time.After(at) {
			by, at = f.Manager, f.Time.Time
		}
	}
	return by
}

func (c *Controller) dnsState(ctx context.Context) (s dnsState, err error) {
	if s.main, err = c.dnsMap(ctx, corefile.ConfigMap); err != nil {
		return s, err
	}
	s.custom, err = c.dnsMap(ctx, corefile.Custom)
	return s, err
}

func (c *Controller) dnsMap(ctx context.Context, name string) (*corev1.ConfigMap, error) {
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	m, err := c.client.ConfigMaps(corefile.Namespace).Get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read ConfigMap %s/%s: %w", corefile.Namespace, name, err)
	}
	return m, nil
}

// applyDNS writes. Somebody who wrote since wins: the next pass looks again.
func (c *Controller) applyDNS(ctx context.Context, p dnsPlan) error {
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	objects := c.client.ConfigMaps(corefile.Namespace)
	for _, w := range p.writes {
		var err error
		switch m := w.object; w.verb {
		case update:
			_, err = objects.Update(ctx, m, metav1.UpdateOptions{})
		case create:
			_, err = objects.Create(ctx, m, metav1.CreateOptions{})
		case remove:
			err = objects.Delete(ctx, m.Name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &m.UID, ResourceVersion: &m.ResourceVersion}})
		}
		if err != nil {
			return fmt.Errorf("write ConfigMap %s/%s: %w", corefile.Namespace, w.object.Name, err)
		}
		c.log.Info("wrote CoreDNS' configuration", "configmap", w.object.Name)
	}
	return nil
}

// planDNS says what to write so that CoreDNS has these zones; where it is not to be managed it has none of ours. It does no I/O.
func planDNS(have dnsState, zones []corefile.Zone, c config.DNS) dnsPlan {
	mode := c.ManageCoreDNS
	if mode == "false" {
		return withoutNames(have)
	}
	if have.main == nil || have.main.Data[corefile.Key] == "" {
		return notOurs(mode, fmt.Sprintf("the cluster's DNS is not CoreDNS with a ConfigMap %s/%s", corefile.Namespace, corefile.ConfigMap))
	}
	text, err := corefile.Outside(have.main.Data[corefile.Key])
	if err != nil {
		return dnsPlan{finding: dnsFinding(corefile.ConfigMap, err)}
	}
	file, err := corefile.Parse(text)
	if err != nil {
		return dnsPlan{finding: dnsFinding(corefile.ConfigMap, fmt.Errorf("cannot be read: %w", err))}
	}
	domains, port, err := file.Cluster()
	if err != nil {
		return dnsPlan{finding: dnsFinding(corefile.ConfigMap, err)}
	}
	zones = withAlias(zones, c.Alias, domains, port)
	for _, z := range zones {
		if err := corefile.Apart(z.Name, domains); err != nil {
			return dnsPlan{finding: "names of the tailnet: " + strings.ReplaceAll(err.Error(), "\n", "; ") +
				": change dns.base_domain of Headscale, dns.alias or network.remoteClusters, or set dns.manageCoreDNS to false"}
		}
	}
	foreign := slices.DeleteFunc(slices.Clone(file.Imports), isCustomImport)
	switch {
	case len(foreign) > 0:
		return notOurs(mode, fmt.Sprintf("the Corefile imports %s, which may serve the zone already", strings.Join(foreign, ", ")))
	case len(file.Imports) > 0:
		return planCustom(have, file, zones, port)
	}
	if by := writtenBy(have.main); by != "" && mode == config.Auto {
		return notOurs(mode, fmt.Sprintf("%s writes ConfigMap %s/%s", by, corefile.Namespace, corefile.ConfigMap))
	}
	next, err := corefile.Set(have.main.Data[corefile.Key], zones, port)
	if err != nil {
		return dnsPlan{finding: dnsFinding(corefile.ConfigMap, err)}
	}
	p := dnsPlan{writes: outOfCustom(have)}
	if next == have.main.Data[corefile.Key] {
		return p
	}
	p.added, p.by = text == have.main.Data[corefile.Key], lastWriter(have.main)
	p.writes = append(p.writes, dnsWrite{update, withKey(have.main, corefile.Key, next)})
	if !file.Reloads() {
		p.note = "the Corefile has no plugin reload: kubectl -n kube-system rollout restart deployment coredns"
	}
	return p
}

// notOurs is a cluster's DNS that we do not write to: to be done by hand where it was asked for.
func notOurs(mode config.Tristate, why string) dnsPlan {
	text := why + ": pods do not resolve the tailnet's names until you put there what `headcnictl dns corefile` prints"
	if mode == config.Auto {
		return dnsPlan{note: text}
	}
	return dnsPlan{finding: text}
}

func dnsFinding(name string, err error) string {
	return fmt.Sprintf("ConfigMap %s/%s %s; it stays as it is, and pods do not resolve the tailnet's names", corefile.Namespace, name,
		strings.ReplaceAll(err.Error(), "\n", "; "))
}

// isCustomImport reports whether a Corefile's import is that of corefile.Custom, which K3s and AKS have.
func isCustomImport(pattern string) bool {
	return strings.HasSuffix(pattern, "custom/*"+corefile.ServerKeys)
}

// writtenBy names who keeps a ConfigMap as it is and would undo what we write, or fail at it.
func writtenBy(m *corev1.ConfigMap) string {
	if m.Labels["addonmanager.kubernetes.io/mode"] == "Reconcile" {
		return "the add-on manager"
	}
	if m.Labels[managedBy] == "Helm" {
		return "Helm"
	}
	return ""
}

// planCustom keeps the server blocks in a key of our own.
func planCustom(have dnsState, main corefile.File, zones []corefile.Zone, port int) dnsPlan {
	want := "# Written by headcni-controller: change dns.* and network.remoteClusters in HeadCNI's values.\n" + corefile.Render(zones, port)
	others := map[string]corefile.File{corefile.ConfigMap: main}
	if have.custom != nil {
		for key, text := range have.custom.Data {
			if key == corefile.CustomKey || !strings.HasSuffix(key, corefile.ServerKeys) {
				continue
			}
			f, err := corefile.Parse(text)
			if err != nil {
				return dnsPlan{finding: dnsFinding(corefile.Custom, fmt.Errorf("(%s) cannot be read: %w", key, err))}
			}
			others[key] = f
		}
	}
	for _, where := range slices.Sorted(maps.Keys(others)) {
		for _, z := range zones {
			if key := others[where].Serves(z.Name, port); key != "" {
				return dnsPlan{finding: dnsFinding(corefile.Custom, fmt.Errorf("cannot have a server block for %s: %s has %s already, which is not of headcni: "+
					"remove that one, or set dns.manageCoreDNS to false", z.Name, where, key))}
			}
		}
	}
	p, _ := outOfMain(have) // which can be read
	switch {
	case have.custom == nil:
		p.writes = append(p.writes, dnsWrite{create, &corev1.ConfigMap{
			ObjectMeta: metav1.ObjectMeta{Name: corefile.Custom, Namespace: corefile.Namespace, Labels: map[string]string{managedBy: kube.Controller}},
			Data:       map[string]string{corefile.CustomKey: want},
		}})
	case have.custom.Data[corefile.CustomKey] != want:
		p.writes = append(p.writes, dnsWrite{update, withKey(have.custom, corefile.CustomKey, want)})
	}
	return p
}

// withoutNames takes out what is ours.
func withoutNames(have dnsState) dnsPlan {
	p, err := outOfMain(have)
	if err != nil {
		p.finding = dnsFinding(corefile.ConfigMap, err)
	}
	p.writes = append(outOfCustom(have), p.writes...)
	return p
}

// outOfCustom takes our key out of the ConfigMap for users of K3s and AKS, and that itself where we made it and nobody else uses it.
func outOfCustom(have dnsState) []dnsWrite {
	m := have.custom
	if m == nil {
		return nil
	}
	if _, ok := m.Data[corefile.CustomKey]; !ok {
		return nil
	}
	if len(m.Data) == 1 && len(m.BinaryData) == 0 && m.Labels[managedBy] == kube.Controller {
		return []dnsWrite{{remove, m}}
	}
	m = m.DeepCopy()
	delete(m.Data, corefile.CustomKey)
	return []dnsWrite{{update, m}}
}

// outOfMain takes our section out of CoreDNS' own ConfigMap.
func outOfMain(have dnsState) (p dnsPlan, err error) {
	if have.main == nil {
		return p, nil
	}
	next, err := corefile.Set(have.main.Data[corefile.Key], nil, 0)
	if err == nil && next != have.main.Data[corefile.Key] {
		p.writes = []dnsWrite{{update, withKey(have.main, corefile.Key, next)}}
	}
	return p, err
}

func withKey(m *corev1.ConfigMap, key, text string) *corev1.ConfigMap {
	next := m.DeepCopy()
	if next.Data == nil {
		next.Data = map[string]string{}
	}
	next.Data[key] = text
	return next
}

// forgetNames takes what is ours out of the cluster's DNS.
func (c *Controller) forgetNames(ctx context.Context) error {
	have, err := c.dnsState(ctx)
	if err != nil {
		return err
	}
	p := withoutNames(have)
	if p.finding != "" {
		c.log.Warn("CoreDNS' configuration stays as it is", "why", p.finding)
	}
	if err = c.applyDNS(ctx, p); isRefused(err) {
		c.log.Warn("CoreDNS' configuration stays as it is: take the section of headcni out by hand", "err", err)
		return nil
	}
	return err
}
