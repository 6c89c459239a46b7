package nft

import (
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"sigs.k8s.io/knftables"

	"github.com/headcni/headcni/internal/golden"
	"github.com/headcni/headcni/pkg/config"
)

// variants are the configurations whose rules differ in kind.
func variants() map[string]Config {
	with := func(change func(*Config)) Config { c := typical(); change(&c); return c }
	return map[string]Config{
		"typical":  typical(),
		"preserve": with(func(c *Config) { c.TailnetEgress = config.EgressPreserve }),
		"deny":     with(func(c *Config) { c.TailnetEgress = config.EgressDeny }),
		"subnets": with(func(c *Config) {
			c.TailnetEgress = config.EgressDeny
			c.Subnets = Subnets{Known: prefixes("192.168.50.0/24", "10.128.0.0/9", "fd00:50::/64"), Beside: prefixes("10.130.0.0/16"),
				Named: prefixes("192.168.50.0/24", "192.168.50.128/25", "fd00:50::/64"), Exit: true}
		}),
		"subnets-open": with(func(c *Config) {
			c.Subnets = Subnets{Open: true, Known: prefixes("192.168.50.0/24", "fd00:50::/64"), Named: prefixes("192.168.50.0/24")}
		}),
		"ports": with(func(c *Config) {
			c.Ports = []Port{
				{Protocol: "tcp", Number: 8080, To: netip.MustParseAddrPort("10.244.1.10:80"), Link: "hca"},
				{Protocol: "udp", Number: 53, At: netip.MustParseAddr("192.0.2.11"), To: netip.MustParseAddrPort("10.244.1.10:5353"), Link: "hca"},
				{Protocol: "tcp", Number: 8080, To: netip.MustParseAddrPort("[fd00:244:1::10]:80"), Link: "hca"},
			}
		}),
		"lan-allow":     with(func(c *Config) { c.LANIngress = true; c.Sites = prefixes("192.168.5.0/24") }),
		"serves":        with(func(c *Config) { c.Served = prefixes("10.96.0.0/12", "fd00:96::7/128") }),
		"clamp":         with(func(c *Config) { c.PathMTU = 1232 }),
		"no-masquerade": with(func(c *Config) { c.Masquerade = false; c.HostMode = false }),
		"no-tun":        with(func(c *Config) { c.TunName = ""; c.NodeAddr4, c.NodeAddr6 = netip.Addr{}, netip.Addr{} }),
		"empty":         {},
	}
}

// transaction renders a configuration as the nft commands that make it.
func transaction(cfg Config) string {
	f := knftables.NewFake("", "")
	tx := f.NewTransaction()
	for _, t := range rulesetOf(cfg) {
		t.fill(tx, nil)
	}
	return tx.String()
}

func TestTransactionGolden(t *testing.T) {
	for name, cfg := range variants() {
		golden.Check(t, "testdata/"+name+".nft", transaction(cfg))
	}
}

// The rules use no word that kernel 4.19 or nft 1.0.1 would not understand. Each word has the kernel version that
// brought its expression.
func TestRulesStayWithinKernel419(t *testing.T) {
	known := map[string]string{
		"iifname": "3.13 meta", "oifname": "3.13 meta", "ip": "3.13 payload", "ip6": "3.13 payload", "saddr": "3.13",
		"daddr": "3.13", "icmp": "3.13", "icmpv6": "3.13", "type": "3.13", "code": "3.13",
		"destination-unreachable": "3.13", "net-unreachable": "3.13", "echo-request": "3.13", "echo-reply": "3.13", "no-route": "3.13", "nd-router-advert": "3.13",
		"nd-redirect": "3.13", "nd-neighbor-solicit": "3.13", "mld2-listener-report": "3.13 (nft 0.9)",
		"meta": "3.13", "mark": "3.13", "set": "3.14 meta set", "drop": "3.13", "accept": "3.13", "return": "3.13",
		"masquerade": "3.18 nft_masq", "fully-random": "3.18", "snat": "3.13 nft_nat", "to": "3.13",
		"fib": "4.10 nft_fib", "oif": "4.10 fib", "missing": "4.10 fib", "local": "4.10 fib",
		"update": "4.1 nft_dynset", "{": "4.1", "}": "4.1", "timeout": "4.1", "5s": "4.1", "60s": "4.1", "limit": "3.13", "rate": "3.13", "over": "4.3",
		"64/second": "3.13", "burst": "4.3", "128": "4.3", "2000/second": "3.13", "4000": "4.3", "packets": "4.3", "state": "3.13 ct", "established,related": "3.13",
		"counter": "3.13", "name": "4.10 nft_objref", "status": "3.13 ct", "dnat": "3.13", "reply": "3.13", "proto-dst": "3.13 ct", "8080": "3.13", "80": "3.13", "5353": "3.13", "iif": "3.13 meta, 4.10 fib",
		"l4proto": "3.14 meta", "reject": "3.14 nft_reject", "with": "3.14", "reset": "3.14", "admin-prohibited": "3.14", "invalid": "3.13 ct", "related": "3.13 ct",
		"established": "3.13 ct", "socket": "4.18 nft_socket", "transparent": "4.18 nft_socket", "0": "3.13",
		"ct": "3.13 (ct original ip daddr: 4.17)", "direction": "3.13 ct", "original": "3.13 ct",
		"tcp": "3.13", "udp": "3.13", "dport": "3.13", "53": "3.13", "flags": "3.13", "(syn": "3.13", "rst)": "3.13", "syn": "3.13", "option": "4.11 exthdr", "maxseg": "4.11 exthdr",
		"size": "4.14 exthdr set", "rt": "4.14 nft_rt", "new": "3.13", "jump": "3.13", "goto": "3.13", "ipv6-icmp": "3.13", "mtu": "4.14 nft_rt", "1192": "3.13", "1172": "3.13",
		".": "4.1 concatenation", "==": "3.13", "!=": "3.13", "<": "3.13", "&": "3.13 bitwise", "|": "3.13 bitwise",
	}
	value := regexp.MustCompile(`^(@(cluster|keepsrc|own|shared|services|served|sites|links|asked|askers|curious|subnets|beside|members|sources|abroad|to_[0-9a-f._]+/[0-9]+)|@th,\d+,\d+|0x[0-9a-f]+|"[^"]+"|[[]?[0-9a-f.:]*[:.][0-9a-f.:]*\]?(:\d+|/\d+)?)$`)
	// Sets: 3.13; intervals: 3.13. Hooks of a table of one family: nat since 3.13, as inet only since 5.2.
	for name, cfg := range variants() {
		for _, table := range rulesetOf(cfg) {
			if table.family != knftables.IPv4Family && table.family != knftables.IPv6Family {
				t.Errorf("%s: family %s", name, table.family)
			}
			for _, c := range table.chains {
				for _, r := range c.rules {
					_, to, _ := strings.Cut(strings.Replace(r, "goto", "jump", 1), "jump ")
					for _, word := range strings.Fields(r) {
						if _, ok := known[word]; !ok && word != to && !value.MatchString(word) {
							t.Errorf("%s: %q in %q: is it in kernel 4.19?", name, word, r)
						}
					}
					// Taken by nft, and never matched before kernel 5.7.
					if c.hook == knftables.PostroutingHook && strings.Contains(r, "iifname") {
						t.Errorf("%s: input interface in postrouting: %q", name, r)
					}
				}
			}
		}
	}
}

// The guard must close the node whatever else is configured.
func TestEveryConfigurationGuards(t *testing.T) {
	for name, cfg := range variants() {
		for _, table := range rulesetOf(cfg) {
			i := slices.IndexFunc(table.chains, func(c chain) bool { return c.name == chainGuard })
			rules := table.chains[i].rules
			if last, want := rules[len(rules)-1], string(table.family)+" daddr @cluster "+drop(DropClusterClear); last != want {
				t.Errorf("%s: the guard ends with %q", name, last)
			}
			let := []string{`oifname "hc*" goto guard_pod`, `oifname "lo" accept`}
			if cfg.TunName != "" {
				let = append(let, `oifname "`+cfg.TunName+`" goto guard_tunnel`)
			}
			for i, r := range rules {
				if i < len(let) && r == let[i] {
					continue
				}
				if strings.Contains(r, "oifname") || !strings.HasSuffix(r, " drop") {
					t.Errorf("%s: the guard lets something by, or does not look at it: %q", name, r)
				}
			}
			if cfg.TunName == "" && strings.Contains(fmt.Sprint(table), `""`) {
				t.Errorf("%s: a rule with an empty name", name)
			}
		}
	}
}

// Every drop counts by a reason of ours, and nothing else does, so that what passes pays nothing.
func TestEveryDropCounts(t *testing.T) {
	seen := map[string]bool{}
	for name, cfg := range variants() {
		for _, table := range rulesetOf(cfg) {
			for _, c := range table.chains {
				for _, r := range c.rules {
					_, reason, counts := strings.Cut(r, `counter name "`)
					reason, end, ok := strings.Cut(reason, `" `)
					ends := end == "drop" || strings.HasPrefix(end, "reject with ")
					if counts != (strings.HasSuffix(r, "drop") || strings.Contains(r, "reject")) || counts && !ends || counts && (!ok || !slices.Contains(reasons, reason)) {
						t.Errorf("%s, chain %s: %q", name, c.name, r)
					}
					seen[reason] = true
				}
			}
		}
	}
	for _, r := range reasons {
		if !seen[r] {
			t.Errorf("no rule drops by %s", r)
		}
	}
}

func TestValidate(t *testing.T) {
	if err := typical().Validate(); err != nil {
		t.Errorf("typical: %v", err)
	}
	for want, change := range map[string]func(*Config){
		`"a\" drop; accept"`:  func(c *Config) { c.TunName = `a" drop; accept` },
		`"headcni*"`:          func(c *Config) { c.TunName = "headcni*" },
		`begin with "hc"`:     func(c *Config) { c.TunName = "hc01" },
		"up to 15":            func(c *Config) { c.TunName = "a234567890123456" },
		`tailnet egress "no"`: func(c *Config) { c.TailnetEgress = "no" },
		`"0.0.0.0/0"`:         func(c *Config) { c.Cluster = prefixes("0.0.0.0/0") },
		"invalid Prefix":      func(c *Config) { c.Own = []netip.Prefix{{}} },
		"want an IPv4":        func(c *Config) { c.NodeAddr4 = c.NodeAddr6 },
		"without zone":        func(c *Config) { c.NodeAddr6 = netip.MustParseAddr("fe80::1%eth0") },
	} {
		c := typical()
		change(&c)
		if err := c.Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want %q", err, want)
		}
	}
	both := typical()
	both.TunName, both.TailnetEgress = "hc1", "never"
	if err := both.Validate(); !strings.Contains(fmt.Sprint(err), "hc1") || !strings.Contains(fmt.Sprint(err), "never") {
		t.Errorf("not all faults: %v", err)
	}
	if _, err := New().Sync(t.Context(), both); err == nil {
		t.Error("sync takes a wrong configuration")
	}
}

func TestPayload(t *testing.T) {
	for in, want := range map[string]string{
		"10.244.0.0/16":   "@th,192,16 == 0x0af4",
		"10.60.0.0/14":    "@th,192,16 & 0xfffc == 0x0a3c",
		"10.244.8.0/22":   "@th,192,24 & 0xfffffc == 0x0af408",
		"172.16.0.0/12":   "@th,192,16 & 0xfff0 == 0xac10",
		"10.0.0.1/32":     "@th,192,32 == 0x0a000001",
		"128.0.0.0/1":     "@th,192,8 & 0x80 == 0x80",
		"fd00:244::/32":   "@th,192,32 == 0xfd000244",
		"fd00:240::/29":   "@th,192,32 & 0xfffffff8 == 0xfd000240",
		"fd00:244:1::/56": "@th,192,56 == 0xfd000244000100",
	} {
		if got := payload(192, netip.MustParsePrefix(in)); got != want {
			t.Errorf("%s: %s, want %s", in, got, want)
		}
	}
}

func TestRelevant(t *testing.T) {
	for table, want := range map[string]bool{"headcni": true, "headcni2": false, "filter": false, "": false} {
		attrs := map[int][]byte{unix.NFTA_TABLE_NAME: append([]byte(table), 0)}
		if got := relevant(unix.NFT_MSG_NEWTABLE, attrs); got != want {
			t.Errorf("%q: %v", table, got)
		}
	}
	if relevant(unix.NFT_MSG_NEWGEN, map[int][]byte{unix.NFTA_GEN_ID: {0, 0, 0, 7}}) || relevant(unix.NFT_MSG_NEWTABLE, nil) {
		t.Error("woken by a generation, or by nothing")
	}
}
