package controller

import (
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/validation/field"
	clienttesting "k8s.io/client-go/testing"

	"github.com/headcni/headcni/internal/kubetest"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/dns/corefile"
)

const (
	plain = ".:53 {\n    kubernetes cluster.local in-addr.arpa ip6.arpa\n    forward . /etc/resolv.conf\n    reload\n}\n"
	k3s   = plain + "import /etc/coredns/custom/*.server\n"
)

func configMap(name string, labels map[string]string, keysAndTexts ...string) *corev1.ConfigMap {
	m := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: corefile.Namespace, Labels: labels, ResourceVersion: "1"}, Data: map[string]string{}}
	for i := 0; i < len(keysAndTexts); i += 2 {
		m.Data[keysAndTexts[i]] = keysAndTexts[i+1]
	}
	return m
}

// named is a Node that says the tailnet's domain.
func named(name, domain string, cidrs ...string) node {
	n := kn(name, name, cidrs...)
	n.domain = domain
	return n
}

func namer(t *testing.T, mode config.Tristate, objects ...runtime.Object) (*Controller, kubetest.Client) {
	t.Helper()
	cfg := config.Default()
	cfg.Headscale.URL, cfg.DNS.ManageCoreDNS = "https://headscale.example.com", mode
	client := kubetest.New(objects...)
	return newController(cfg, slog.New(slog.NewTextHandler(t.Output(), nil)), func(string) string { return "" }, client, "test"), client
}

func dataOf(t *testing.T, client kubetest.Client, name string) map[string]string {
	t.Helper()
	m, err := client.ConfigMaps(corefile.Namespace).Get(t.Context(), name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		t.Fatal(err)
	}
	return m.Data
}

func TestNames(t *testing.T) {
	one := named("one", "hc.internal", "10.244.1.0/24")
	section, err := corefile.Set("", []corefile.Zone{{Name: "hc.internal", Upstreams: []netip.AddrPort{netip.MustParseAddrPort("169.254.116.52:53"), netip.MustParseAddrPort("100.100.100.100:53")}}}, 53)
	if err != nil {
		t.Fatal(err)
	}
	helm := map[string]string{managedBy: "Helm"}
	changed := strings.Replace(section, "denial 1024 5", "denial 1024 9", 1)
	own, _ := strings.CutPrefix(section, section[:strings.Index(section, "\n")+1])
	own = "# Written by headcni-controller: change dns.* and network.remoteClusters in HeadCNI's values.\n" + strings.TrimSuffix(own, "# END headcni\n")
	for name, tt := range map[string]struct {
		mode         config.Tristate
		main, custom *corev1.ConfigMap
		nodes        []node
		// wantMain "" means as it was; wantCustom nil means none.
		wantMain    string
		wantCustom  map[string]string
		wantFinding string
		wantWrites  int // at most 1 where it is not said
	}{
		"plain":               {main: configMap(corefile.ConfigMap, nil, corefile.Key, plain, "other", "x"), wantMain: plain + section},
		"as it should be":     {main: configMap(corefile.ConfigMap, nil, corefile.Key, plain+section), wantMain: plain + section},
		"changed by somebody": {main: configMap(corefile.ConfigMap, nil, corefile.Key, plain+changed), wantMain: plain + section},
		"false":               {mode: "false", main: configMap(corefile.ConfigMap, nil, corefile.Key, plain+section), wantMain: plain},
		"false, broken":       {mode: "false", main: configMap(corefile.ConfigMap, nil, corefile.Key, "{\n"+section), wantMain: "{\n"},
		"false, no domain":    {mode: "false", main: configMap(corefile.ConfigMap, nil, corefile.Key, plain), nodes: []node{named("one", "x {")}},
		"nobody says":         {main: configMap(corefile.ConfigMap, nil, corefile.Key, plain+changed), nodes: []node{named("one", "")}, wantMain: plain + changed},
		"a cluster without IPv4": {
			main: configMap(corefile.ConfigMap, nil, corefile.Key, plain), nodes: []node{named("one", "hc.internal", "fd00:244:1::/64")},
			wantMain: plain + strings.Replace(section, "169.254.116.52 100.100.100.100", "fd68:6561:6463:6e69::53 fd7a:115c:a1e0::53", 1),
		},
		"nodes disagree": {
			main: configMap(corefile.ConfigMap, nil, corefile.Key, plain+section), nodes: []node{one, named("two", "example.com")}, wantMain: plain + section,
			wantFinding: `nodes say different domains (two: "example.com", one: "hc.internal")`,
		},
		"no domain":            {main: configMap(corefile.ConfigMap, nil, corefile.Key, plain), nodes: []node{named("one", "x {\n}")}, wantFinding: "is no domain"},
		"the cluster's domain": {main: configMap(corefile.ConfigMap, nil, corefile.Key, plain), nodes: []node{named("one", "cluster.local")}, wantFinding: "inside the cluster's domain cluster.local"},
		"above the cluster's":  {main: configMap(corefile.ConfigMap, nil, corefile.Key, plain), nodes: []node{named("one", "local")}, wantFinding: "cluster.local is inside local"},
		"Headscale's own":      {main: configMap(corefile.ConfigMap, nil, corefile.Key, plain), nodes: []node{named("one", "example.com")}, wantFinding: "headscale.example.com is inside"},
		"does not parse":       {main: configMap(corefile.ConfigMap, nil, corefile.Key, plain+"x {"), wantFinding: "cannot be read: line 6"},
		"somebody else's":      {main: configMap(corefile.ConfigMap, nil, corefile.Key, plain+"hc.internal {\n whoami\n}\n"), wantFinding: "has a server block hc.internal already"},
		"no kubernetes":        {main: configMap(corefile.ConfigMap, nil, corefile.Key, ".:53 {\n whoami\n}\n"), wantFinding: "no server block with the plugin kubernetes"},
		"Helm's, auto":         {main: configMap(corefile.ConfigMap, helm, corefile.Key, plain)},
		"Helm's, true":         {mode: "true", main: configMap(corefile.ConfigMap, helm, corefile.Key, plain), wantMain: plain + section},
		"no CoreDNS, auto":     {},
		"no CoreDNS, true":     {mode: "true", wantFinding: "headcnictl dns corefile"},
		"imports":              {mode: "true", main: configMap(corefile.ConfigMap, nil, corefile.Key, plain+"import /x\n"), wantFinding: "imports /x"},
		"K3s":                  {main: configMap(corefile.ConfigMap, nil, corefile.Key, k3s), wantCustom: map[string]string{corefile.CustomKey: own}},
		"AKS": {
			main: configMap(corefile.ConfigMap, nil, corefile.Key, k3s), custom: configMap(corefile.Custom, nil, "a.server", "a.test {\n whoami\n}\n"),
			wantCustom: map[string]string{corefile.CustomKey: own, "a.server": "a.test {\n whoami\n}\n"},
		},
		"K3s, somebody else's": {
			main: configMap(corefile.ConfigMap, nil, corefile.Key, k3s), custom: configMap(corefile.Custom, nil, "a.server", "hc.internal {\n whoami\n}\n"),
			wantCustom: map[string]string{"a.server": "hc.internal {\n whoami\n}\n"}, wantFinding: "a.server has hc.internal already",
		},
		"imports since": {
			main: configMap(corefile.ConfigMap, nil, corefile.Key, k3s+section), wantMain: k3s, wantCustom: map[string]string{corefile.CustomKey: own}, wantWrites: 2,
		},
		"imports no more": {
			main: configMap(corefile.ConfigMap, nil, corefile.Key, plain), custom: configMap(corefile.Custom, map[string]string{managedBy: "headcni-controller"}, corefile.CustomKey, own),
			wantMain: plain + section, wantWrites: 2,
		},
		"false, in both": {
			mode: "false", main: configMap(corefile.ConfigMap, nil, corefile.Key, k3s+section), custom: configMap(corefile.Custom, nil, corefile.CustomKey, own, "a", "b"),
			wantMain: k3s, wantCustom: map[string]string{"a": "b"}, wantWrites: 2,
		},
		"false, CoreDNS is gone": {mode: "false", custom: configMap(corefile.Custom, map[string]string{managedBy: "headcni-controller"}, corefile.CustomKey, own)},
		"on one address": {
			main: configMap(corefile.ConfigMap, nil, corefile.Key, strings.Replace(plain, "reload", "bind 10.96.0.10", 1)), wantFinding: "with the same line bind",
		},
		"K3s, false": {mode: "false", main: configMap(corefile.ConfigMap, nil, corefile.Key, k3s), custom: configMap(corefile.Custom, map[string]string{managedBy: "headcni-controller"}, corefile.CustomKey, own)},
		"AKS, false": {
			mode: "false", main: configMap(corefile.ConfigMap, nil, corefile.Key, k3s), custom: configMap(corefile.Custom, nil, corefile.CustomKey, own), wantCustom: map[string]string{},
		},
	} {
		t.Run(name, func(t *testing.T) {
			if tt.mode == "" {
				tt.mode = config.Auto
			}
			if tt.nodes == nil {
				tt.nodes = []node{one}
			}
			var objects []runtime.Object
			var want map[string]string
			if tt.main != nil {
				objects, want = append(objects, tt.main), tt.main.DeepCopy().Data
				if tt.wantMain != "" {
					want[corefile.Key] = tt.wantMain
				}
			}
			if tt.custom != nil {
				objects = append(objects, tt.custom)
			}
			c, client := namer(t, tt.mode, objects...)
			for range 2 { // the second changes nothing more
				c.namesOf = ""
				if err := c.names(t.Context(), tt.nodes); err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(want, dataOf(t, client, corefile.ConfigMap)); diff != "" {
					t.Error(diff)
				}
				if diff := cmp.Diff(tt.wantCustom, dataOf(t, client, corefile.Custom)); diff != "" {
					t.Error(diff)
				}
			}
			text := c.announced[checkDNS]
			if !strings.Contains(text, tt.wantFinding) || (text == "") != (tt.wantFinding == "") || strings.Contains(text, "\n") {
				t.Errorf("finding %q, want %q", text, tt.wantFinding)
			}
			writes := 0
			for _, a := range client.Actions() {
				if a.GetResource().Resource == "configmaps" && a.GetVerb() != "get" {
					writes++
				}
			}
			if writes > max(1, tt.wantWrites) {
				t.Errorf("%d writes", writes)
			}
			if err := c.forgetNames(t.Context()); err != nil {
				t.Fatal(err)
			}
			if text := dataOf(t, client, corefile.ConfigMap)[corefile.Key] + dataOf(t, client, corefile.Custom)[corefile.CustomKey]; strings.Contains(text, "headcni") {
				t.Errorf("uninstall leaves %s", text)
			}
		})
	}
}

// TestNamesForbidden: a chart that gives no right yet is a finding; the pass goes on.
func TestNamesForbidden(t *testing.T) {
	for verb, mode := range map[string]config.Tristate{"get": config.Auto, "update": config.Auto} {
		c, client := namer(t, mode, configMap(corefile.ConfigMap, nil, corefile.Key, plain))
		client.PrependReactor(verb, "configmaps", func(clienttesting.Action) (bool, runtime.Object, error) {
			return true, nil, apierrors.NewForbidden(schema.GroupResource{Resource: "configmaps"}, corefile.ConfigMap, nil)
		})
		if err := c.names(t.Context(), []node{named("one", "hc.internal", "10.244.1.0/24")}); err != nil {
			t.Errorf("%s: %v", verb, err)
		}
		if text := c.announced[checkDNS]; !strings.Contains(text, "upgrade the chart") {
			t.Errorf("%s: %q", verb, text)
		}
	}
}

// TestNamesRefused: what the API server will never take is a finding, and neither the rest of a pass nor an uninstall ends with it.
func TestNamesRefused(t *testing.T) {
	c, client := namer(t, config.Auto, configMap(corefile.ConfigMap, nil, corefile.Key, plain))
	nodes := []node{named("one", "hc.internal", "10.244.1.0/24")}
	refuse := func(clienttesting.Action) (bool, runtime.Object, error) {
		return true, nil, apierrors.NewInvalid(schema.GroupKind{Kind: "ConfigMap"}, corefile.ConfigMap, field.ErrorList{field.Forbidden(field.NewPath("data"), "field is immutable when `immutable` is set")})
	}
	client.PrependReactor("update", "configmaps", refuse)
	if err := c.names(t.Context(), nodes); err != nil {
		t.Error(err)
	}
	if text := c.announced[checkDNS]; !strings.Contains(text, "immutable") || !strings.Contains(text, "headcnictl dns corefile") {
		t.Errorf("finding %q", text)
	}
	section, err := corefile.Set(plain, []corefile.Zone{{Name: "hc.internal", Upstreams: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:53")}}}, 53)
	if err != nil {
		t.Fatal(err)
	}
	c, client = namer(t, config.Auto, configMap(corefile.ConfigMap, nil, corefile.Key, section))
	client.PrependReactor("update", "configmaps", refuse)
	if err := c.forgetNames(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestNamesLost: where somebody takes our section out again and again, it is put back ever more seldom, and said who that is; an upgrade that
// does so once is none of these.
func TestNamesLost(t *testing.T) {
	for _, mode := range []config.Tristate{config.Auto, "true"} {
		t.Run(string(mode), func(t *testing.T) {
			c, client := namer(t, mode, configMap(corefile.ConfigMap, nil, corefile.Key, plain))
			now := time.Now()
			c.now = func() time.Time { return now }
			// minutes has somebody take the section out at the end of each minute, and counts how often it is there at all.
			minutes := func(n int, takes bool) (there int) {
				t.Helper()
				for range n {
					if err := c.names(t.Context(), []node{named("one", "hc.internal", "10.244.1.0/24")}); err != nil {
						t.Fatal(err)
					}
					now = now.Add(namesCheck)
					if dataOf(t, client, corefile.ConfigMap)[corefile.Key] == plain {
						continue
					}
					there++
					if !takes {
						continue
					}
					m := configMap(corefile.ConfigMap, nil, corefile.Key, plain)
					if _, err := client.ConfigMaps(corefile.Namespace).Update(t.Context(), m, metav1.UpdateOptions{FieldManager: "argocd-controller"}); err != nil {
						t.Fatal(err)
					}
				}
				return there
			}
			if minutes(1, true); minutes(1, false) != 1 || c.announced[checkDNS] != "" {
				t.Errorf("taken out once: %q", c.announced[checkDNS])
			}
			minutes(70, false)
			there := minutes(90, true)
			if text := c.announced[checkDNS]; !strings.Contains(text, "argocd-controller") || strings.Contains(text, "\n") {
				t.Errorf("finding %q", text)
			}
			if mode == config.Auto && there > 12 || mode == "true" && there != 90 {
				t.Errorf("written %d times in 90 minutes", there)
			}
			if c.section.lost += 100; mode == config.Auto && minutes(60, true) > 1 {
				t.Error("put back more than once an hour after a week")
			}
			if minutes(130, false); c.announced[checkDNS] != "" || dataOf(t, client, corefile.ConfigMap)[corefile.Key] == plain {
				t.Errorf("nobody takes it out any more: %q", c.announced[checkDNS])
			}
		})
	}
}

// FuzzPlanDNS: whatever CoreDNS' configuration is, no byte of others changes, there is nothing more to do afterwards, and all of ours can be
// taken out again.
func FuzzPlanDNS(f *testing.F) {
	for _, main := range []string{
		plain, k3s, "", plain + "# BEGIN headcni\n", strings.ReplaceAll(plain, "\n", "\r\n"), strings.ReplaceAll(plain, "    ", "\t"), strings.TrimSuffix(plain, "\n"),
		plain + "# a # BEGIN headcni (x\n", "cluster.local:1053 {\n kubernetes cluster.local\n}\n", plain + "import x", "\ufeff" + k3s, plain + "hc.internal:53 {\n}\n",
		plain + "# BEGIN headcni (x)\nhc.internal:53 {\n}\n# END headcni\nx {\n}", plain + "\n# BEGIN headcni, with the line end before it (\n# END headcni\r\n" + plain,
	} {
		f.Add(main, "", true)
		f.Add(main, "a {\n whoami\n}", false)
	}
	zones := []corefile.Zone{{Name: "hc.internal", Upstreams: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:53")}}}
	f.Fuzz(func(t *testing.T, main, custom string, alias bool) {
		cfg := config.DNS{ManageCoreDNS: config.Auto}
		if alias {
			cfg.Alias = "east.k8s"
		}
		have := dnsState{main: configMap(corefile.ConfigMap, nil, corefile.Key, main, "other", main)}
		if custom != "" {
			have.custom = configMap(corefile.Custom, nil, "a.server", custom)
		}
		others := func(s dnsState) (out []string) {
			text, err := corefile.Outside(s.main.Data[corefile.Key])
			if err != nil {
				text = s.main.Data[corefile.Key]
			}
			out = append(out, text, s.main.Data["other"])
			if s.custom != nil {
				out = append(out, s.custom.Data["a.server"])
			}
			return out
		}
		apply := func(s dnsState, p dnsPlan) dnsState {
			for _, w := range p.writes {
				object := w.object
				if w.verb == remove {
					object = nil
				}
				if w.object.Name == corefile.ConfigMap {
					s.main = object
				} else {
					s.custom = object
				}
			}
			return s
		}
		want := others(have)
		done := apply(have, planDNS(have, zones, cfg))
		if custom == "" && done.custom != nil {
			want = append(want, "")
		}
		if diff := cmp.Diff(want, others(done)); diff != "" {
			t.Fatalf("what is others' changed:\n%s", diff)
		}
		if p := planDNS(done, zones, cfg); len(p.writes) > 0 {
			t.Fatalf("there is more to do: %v", p.writes[0].object.Data)
		}
		before := withoutNames(have).finding
		out := withoutNames(done)
		if out.finding != before {
			t.Fatalf("cannot be taken out: %s", out.finding)
		}
		if done = apply(done, out); before == "" && (done.main.Data[corefile.Key] != want[0] || custom == "" && done.custom != nil || done.custom != nil && len(done.custom.Data) > 1) {
			t.Fatalf("left: %q %v", done.main.Data, done.custom)
		}
	})
}

// TestNamesOfOtherClusters: domains of other clusters, and the one by which they ask for ours, stand beside the tailnet's.
func TestNamesOfOtherClusters(t *testing.T) {
	one := named("one", "hc.internal", "10.244.1.0/24")
	for name, tt := range map[string]struct {
		domain, alias string
		want          []string // server blocks of ours
		wantFinding   string
	}{
		"a domain of its own":    {domain: "west.k8s", want: []string{"hc.internal:53", "west.k8s:53"}},
		"both":                   {domain: "west.k8s", alias: "east.k8s", want: []string{"hc.internal:53", "west.k8s:53", "east.k8s:53"}},
		"the cluster's as alias": {alias: "cluster.local", want: []string{"hc.internal:53"}},
		"inside the tailnet's":   {domain: "west.hc.internal", wantFinding: "west: west.hc.internal and the tailnet's domain hc.internal are inside each other"},
		"as ours":                {domain: "cluster.local", wantFinding: "cluster.local is inside the cluster's domain"},
		"the tailnet's as alias": {alias: "hc.internal", wantFinding: "dns.alias hc.internal and the tailnet's domain hc.internal are inside each other"},
		"inside it as alias":     {alias: "east.hc.internal", wantFinding: "dns.alias east.hc.internal and the tailnet's domain"},
		"an alias inside ours":   {alias: "east.cluster.local", wantFinding: "east.cluster.local is inside the cluster's domain"},
	} {
		t.Run(name, func(t *testing.T) {
			c, client := namer(t, config.Auto, configMap(corefile.ConfigMap, nil, corefile.Key, plain))
			c.cfg.DNS.Alias = tt.alias
			c.cfg.Network.RemoteClusters = []config.RemoteCluster{{Name: "west", ServiceCIDRs: config.CIDRs{"10.97.0.0/16"}}}
			if tt.domain != "" {
				c.cfg.Network.RemoteClusters[0].DNS = config.RemoteDNS{Domain: tt.domain, Servers: []string{"10.97.0.10", "fd00:97::a"}}
			}
			if err := c.names(t.Context(), []node{one}); err != nil {
				t.Fatal(err)
			}
			if text := c.announced[checkDNS]; !strings.Contains(text, tt.wantFinding) || (text == "") != (tt.wantFinding == "") {
				t.Errorf("finding %q, want %q", text, tt.wantFinding)
			}
			text := dataOf(t, client, corefile.ConfigMap)[corefile.Key]
			f, err := corefile.Parse(strings.TrimPrefix(text, plain))
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, b := range f.Blocks {
				got = append(got, b.Keys...)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Error(diff)
			}
			if tt.domain == "west.k8s" && !strings.Contains(text, "forward . 10.97.0.10 fd00:97::a {") {
				t.Error(text)
			}
			if line := "    rewrite stop name suffix .east.k8s. .cluster.local. answer auto\n"; (tt.alias == "east.k8s") != strings.Contains(text, line) {
				t.Error(text)
			}
		})
	}
}
