package corefile

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/coredns/caddy/caddyfile"
	"github.com/google/go-cmp/cmp"
)

const kubeadm = `.:53 {
    errors
    health {
       lameduck 5s
    }
    ready
    kubernetes cluster.local in-addr.arpa ip6.arpa {
       pods insecure
       fallthrough in-addr.arpa ip6.arpa
       ttl 30
    }
    prometheus :9153
    forward . /etc/resolv.conf {
       max_concurrent 1000
    }
    cache 30
    loop
    reload
    loadbalance
}
`

var tailnet = []Zone{{Name: "hc.internal", Upstreams: []netip.AddrPort{netip.MustParseAddrPort("169.254.116.52:53"), netip.MustParseAddrPort("100.100.100.100:53")}}}

const section = `# BEGIN headcni (written by headcni-controller: change dns.* and network.remoteClusters in HeadCNI's values)
hc.internal:53 {
    errors
    cache 30 {
        success 9984 5
        denial 1024 5
    }
    forward . 169.254.116.52 100.100.100.100 {
        policy sequential
    }
}
# END headcni
`

func TestSet(t *testing.T) {
	glued := strings.Replace(section, "# BEGIN headcni", "# BEGIN headcni, with the line end before it", 1)
	for name, tt := range map[string]struct{ text, want string }{
		"kubeadm":              {kubeadm, kubeadm + section},
		"empty":                {"", section},
		"no final line end":    {strings.TrimSuffix(kubeadm, "\n"), kubeadm + glued},
		"as it should be":      {kubeadm + section, kubeadm + section},
		"stays where it is":    {section + kubeadm, section + kubeadm},
		"somebody changed it":  {kubeadm + strings.Replace(section, "denial 1024 5\n    }", "", 1), kubeadm + section},
		"a comment at the end": {kubeadm + "# mine {", kubeadm + "# mine {\n" + glued},
		"a zone of their own":  {kubeadm + "x.hc.internal {\n whoami\n}\n", kubeadm + "x.hc.internal {\n whoami\n}\n" + section},
		"another port":         {kubeadm + "hc.internal:5353 {\n whoami\n}\n", kubeadm + "hc.internal:5353 {\n whoami\n}\n" + section},
		"another transport":    {kubeadm + "tls://hc.internal {\n whoami\n}\n", kubeadm + "tls://hc.internal {\n whoami\n}\n" + section},
		"a snippet":            {"(hc.internal) {\n errors\n}\n" + kubeadm, "(hc.internal) {\n errors\n}\n" + kubeadm + section},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := Set(tt.text, tailnet, 53)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Error(diff)
			}
			again, err := Set(got, tailnet, 53)
			if err != nil || again != got {
				t.Errorf("a second time: %v\n%s", err, cmp.Diff(got, again))
			}
		})
	}
}

func TestSetRefuses(t *testing.T) {
	for name, tt := range map[string]struct{ text, want string }{
		"theirs":              {kubeadm + "hc.internal {\n whoami\n}\n", "hc.internal already"},
		"theirs, by case":     {kubeadm + "a.test, HC.Internal.:53 {\n whoami\n}\n", "HC.Internal.:53 already"},
		"theirs, by scheme":   {kubeadm + "dns://hc.internal {\n whoami\n}\n", "dns://hc.internal already"},
		"no closing brace":    {strings.TrimSuffix(kubeadm, "}\n"), "line 1: a server block without its closing brace"},
		"one brace too many":  {kubeadm + "}\n", "line 21: } where a zone should be"},
		"no braces":           {".:53\nforward . 192.0.2.1\n", "line 1: a server block without braces"},
		"an open quote":       {kubeadm + "\"x", "without braces"},
		"no end mark":         {kubeadm + strings.TrimSuffix(section, "# END headcni\n"), "has no \"# END headcni\""},
		"no begin mark":       {kubeadm + "# END headcni\n", "not where headcni-controller wrote it"},
		"two sections":        {section + kubeadm + section, "not where headcni-controller wrote it"},
		"inside another":      {strings.Replace(kubeadm, "    ready\n", section, 1), "without its closing brace"},
		"without its marks":   {kubeadm + strings.TrimSuffix(section[strings.Index(section, "\n")+1:], "# END headcni\n"), "hc.internal:53 of headcni without its marks"},
		"a mark that changed": {kubeadm + "# BEGIN headcni\n", "not where headcni-controller wrote it"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := Set(tt.text, tailnet, 53)
			if err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("%v, want %q, on one line\n%s", err, tt.want, got)
			}
		})
	}
}

func TestCluster(t *testing.T) {
	for name, tt := range map[string]struct {
		text string
		want []string
		port int
	}{
		"kubeadm":       {kubeadm, []string{"cluster.local"}, 53},
		"of the keys":   {"k8s.test:1053 10.0.0.0/8 {\n kubernetes\n}\n", []string{"k8s.test"}, 1053},
		"two":           {".:53 {\n kubernetes a.test B.Test. in-addr.arpa\n}\n", []string{"a.test", "b.test"}, 53},
		"after another": {"hc.test:5353 {\n whoami\n}\n.:53 {\n kubernetes a.test\n}\n", []string{"a.test"}, 53},
	} {
		f, err := Parse(tt.text)
		if err != nil {
			t.Fatal(err)
		}
		got, port, err := f.Cluster()
		if err != nil || !slices.Equal(got, tt.want) || port != tt.port {
			t.Errorf("%s: %v %d %v", name, got, port, err)
		}
	}
	f, err := Parse(section)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := f.Cluster(); err == nil {
		t.Error("a cluster without kubernetes")
	}
	if f, err = Parse(".:53 {\n kubernetes a.test\n bind 10.96.0.10\n}\n"); err != nil {
		t.Fatal(err)
	}
	if domains, _, err := f.Cluster(); !errors.Is(err, ErrBind) || len(domains) != 1 {
		t.Errorf("listens on one address: %v %v", domains, err)
	}
}

func TestDomains(t *testing.T) {
	for _, name := range []string{"hc.internal", "tail1234.ts.net", "ts"} {
		if err := CheckDomain(name); err != nil {
			t.Error(err)
		}
	}
	for _, name := range []string{"", ".", "a..b", "-a.test", "a_b.test", "A.test", "a.test.", "a b", "x{", "10.in-addr.arpa", "arpa",
		strings.Repeat("a", 64) + ".test", strings.Repeat("abcdefg.", 32) + "test"} {
		if CheckDomain(name) == nil {
			t.Errorf("%q is a domain", name)
		}
	}
	clusters := []string{"cluster.local"}
	for _, name := range []string{"cluster.local", "local", "x.cluster.local"} {
		if Apart(name, clusters) == nil {
			t.Errorf("%s is apart", name)
		}
	}
	for _, name := range []string{"hc.internal", "mycluster.local", "x.local"} {
		if err := Apart(name, clusters); err != nil {
			t.Error(err)
		}
	}
}

// FuzzSet: whatever the Corefile, no byte outside of the section changes, it can be taken out again, and CoreDNS' own parser sees what
// it saw before, and our zone.
func FuzzSet(f *testing.F) {
	for _, text := range []string{
		kubeadm, kubeadm + section, section + kubeadm, "", "\ufeff" + kubeadm, "a {\n \"x\n", "a, b\n{\n}\n", "import x\n", "(s) {\n a\n}\nb {\n import s\n}",
		strings.ReplaceAll(kubeadm, "\n", "\r\n"), "a {\n b {\n c\n } d {\n }\n}", "a\n", "{", "\"", "# BEGIN headcni\n", "a {\n b \\\" \"\\\"\n }\"\n}", "a { b\n c }\n",
	} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		rest, err := Outside(text)
		if err != nil {
			return
		}
		got, err := Set(text, tailnet, 53)
		if err != nil {
			return
		}
		if back, err := Outside(got); err != nil || back != rest {
			t.Fatalf("%v: %q became %q", err, rest, back)
		}
		at := strings.Index(got, "hc.internal:53 {\n    errors\n")
		if at < 0 || !strings.Contains(got, end) {
			t.Fatalf("no section in %q", got)
		}
		if off, err := Set(got, nil, 0); err != nil || off != rest {
			t.Fatalf("taken out: %v: %q became %q", err, rest, off)
		}
		if strings.Contains(text, "import") || strings.Contains(text, "{$") || strings.Contains(text, "{%") {
			return // CoreDNS' parser reads files and the environment
		}
		before, err := caddyfile.Parse("Corefile", strings.NewReader(rest), nil)
		if err != nil {
			return // which it refuses for more than we look at
		}
		after, err := caddyfile.Parse("Corefile", strings.NewReader(got), nil)
		if err != nil {
			t.Fatalf("CoreDNS no longer reads it: %v\n%s", err, got)
		}
		keys := func(blocks []caddyfile.ServerBlock) (out []string) {
			for _, b := range blocks {
				out = append(out, strings.Join(b.Keys, " "))
			}
			return out
		}
		var others []string
		ours := 0
		for _, k := range keys(after) {
			if k == "hc.internal:53" {
				ours++
			} else {
				others = append(others, k)
			}
		}
		if ours != 1 || !slices.Equal(others, keys(before)) {
			t.Fatalf("server blocks were %q, are %q", keys(before), keys(after))
		}
	})
}
