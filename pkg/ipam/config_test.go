package ipam

import (
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

var cmpNet = cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})

func pfx(text string) netip.Prefix { return netip.MustParsePrefix(text) }
func adr(text string) netip.Addr   { return netip.MustParseAddr(text) }

func TestParseConfig(t *testing.T) {
	table := 100
	for name, c := range map[string]struct {
		json string
		want Config
	}{
		"the specification's example": {
			`{"type": "host-local", "subnet": "10.244.0.0/24", "rangeStart": "10.244.0.10", "rangeEnd": "10.244.0.254", "gateway": "10.244.0.1"}`,
			Config{Sets: [][]Range{{{pfx("10.244.0.0/24"), adr("10.244.0.10"), adr("10.244.0.254"), adr("10.244.0.1"), nil}}}},
		},
		"the daemon's": {
			`{"type": "headcni-ipam", "ranges": [[{"subnet": "10.244.1.0/24"}], [{"subnet": "fd00:244:1::/64"}]], "strategy": "dense-pack"}`,
			Config{Strategy: DensePack, Sets: [][]Range{
				{{pfx("10.244.1.0/24"), adr("10.244.1.1"), adr("10.244.1.254"), adr("10.244.1.1"), nil}},
				{{pfx("fd00:244:1::/64"), adr("fd00:244:1::1"), adr("fd00:244:1::ffff:ffff:ffff:ffff"), adr("fd00:244:1::1"), nil}},
			}},
		},
		"all of host-local's": {
			`{"type": "host-local", "name": "x", "subnet": "10.1.0.0/24", "ranges": [[{"subnet": "10.2.0.0/24", "gateway": "10.2.0.254"}, {"subnet": "10.3.0.0/24"}]],
			"routes": [{"dst": "0.0.0.0/0"}, {"dst": "10.9.0.0/16", "gw": "10.1.0.7", "mtu": 1400, "advmss": 1360, "priority": 5, "table": 100}],
			"dataDir": "/run/x", "resolvConf": "/etc/resolv.conf"}`,
			Config{DataDir: "/run/x", ResolvConf: "/etc/resolv.conf",
				Routes: []Route{{Dst: pfx("0.0.0.0/0")}, {Dst: pfx("10.9.0.0/16"), GW: adr("10.1.0.7"), MTU: 1400, AdvMSS: 1360, Priority: 5, Table: &table}},
				Sets: [][]Range{
					{{pfx("10.1.0.0/24"), adr("10.1.0.1"), adr("10.1.0.254"), adr("10.1.0.1"), nil}},
					{{pfx("10.2.0.0/24"), adr("10.2.0.1"), adr("10.2.0.254"), adr("10.2.0.254"), nil},
						{pfx("10.3.0.0/24"), adr("10.3.0.1"), adr("10.3.0.254"), adr("10.3.0.1"), nil}},
				}},
		},
		"exclusions": {
			`{"exclude": ["10.0.0.9", "10.0.0.32/28"], "ranges": [[{"subnet": "10.0.0.0/24", "exclude": ["10.0.0.64/26"]}], [{"subnet": "fd00::/64"}]]}`,
			Config{Sets: [][]Range{
				{{pfx("10.0.0.0/24"), adr("10.0.0.1"), adr("10.0.0.254"), adr("10.0.0.1"), []netip.Prefix{pfx("10.0.0.64/26"), pfx("10.0.0.9/32"), pfx("10.0.0.32/28")}}},
				{{pfx("fd00::/64"), adr("fd00::1"), adr("fd00::ffff:ffff:ffff:ffff"), adr("fd00::1"), nil}},
			}},
		},
		"null, which is not given": {
			`{"type": null, "name": null, "strategy": null, "dataDir": null, "resolvConf": null, "routes": null, "gateway": null, "exclude": null, "strateg": null,
			"subnet": null, "rangeStart": null, "ranges": [[{"subnet": "10.0.0.0/24", "rangeStart": null, "rangeEnd": null, "gateway": null, "exclude": null, "x": null}]]}`,
			Config{Sets: [][]Range{{{pfx("10.0.0.0/24"), adr("10.0.0.1"), adr("10.0.0.254"), adr("10.0.0.1"), nil}}}},
		},
		"ranges null": {
			`{"subnet": "10.0.0.0/24", "ranges": null, "routes": [{"dst": "0.0.0.0/0", "gw": null, "mtu": null, "advmss": null, "priority": null, "table": null, "scope": null}]}`,
			Config{Sets: [][]Range{{{pfx("10.0.0.0/24"), adr("10.0.0.1"), adr("10.0.0.254"), adr("10.0.0.1"), nil}}}, Routes: []Route{{Dst: pfx("0.0.0.0/0")}}},
		},
		"gateway on link": {
			`{"subnet": "10.0.0.0/24", "gateway": "169.254.1.1"}`,
			Config{Sets: [][]Range{{{pfx("10.0.0.0/24"), adr("10.0.0.1"), adr("10.0.0.254"), adr("169.254.1.1"), nil}}}},
		},
	} {
		got, err := ParseConfig("net", []byte(c.json))
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		c.want.Network, c.want.Writer = "net", Standalone
		if c.want.Strategy == "" {
			c.want.Strategy = Sequential
		}
		if c.want.DataDir == "" {
			c.want.DataDir = "/var/lib/headcni/ipam"
		}
		if diff := cmp.Diff(c.want, got, cmpNet); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
}

func TestParseConfigFaults(t *testing.T) {
	for json, want := range map[string][]string{
		`{`:                               {"known keys are"},
		`{} {}`:                           {"want an object"},
		`[]`:                              {"want an object"},
		`{"strateg": "random"}`:           {`ipam.strateg: unknown key (value "random"), did you mean strategy?`},
		`{"addresses": []}`:               {`ipam.addresses: unknown key (value []), known keys are dataDir, exclude, gateway`},
		`{"ranges": [[{"subnte": "x"}]]}`: {`ipam.ranges[0][0].subnte: unknown key (value "x"), did you mean subnet?`},
		`{"subnet": "10.0.0.0/24", "strategy": "best"}`:                               {`ipam.strategy: "best"`, "dense-pack"},
		`{"subnet": "10.0.0.0/24", "dataDir": "x"}`:                                   {`ipam.dataDir: "x"`},
		`{"rangeStart": "10.0.0.1"}`:                                                  {"ipam.subnet: is missing"},
		`{"subnet": "10.0.0.5/24"}`:                                                   {"host bits", "10.0.0.0/24"},
		`{"subnet": "10.0.0.0/31"}`:                                                   {"too small", "/30"},
		`{"subnet": "fd00::/127"}`:                                                    {"too small", "/126"},
		`{"subnet": "10.0.0.0/24", "rangeStart": "10.0.1.1"}`:                         {"rangeStart 10.0.1.1 lies outside"},
		`{"subnet": "10.0.0.0/24", "rangeStart": "10.0.0.9", "rangeEnd": "10.0.0.8"}`: {"before rangeStart"},
		`{"subnet": "10.0.0.0/24", "gateway": "fd00::1"}`:                             {"another family"},
		`{"subnet": "10.0.0.0/24", "exclude": ["10.1.0.0/24"]}`:                       {"ipam.exclude[0]", "none of the subnets"},
		`{"ranges": [[{"subnet": "10.0.0.0/24", "exclude": ["10.1.0.0/24"]}]]}`:       {"exclude 10.1.0.0/24 lies outside"},
		`{"subnet": "10.0.0.0/24", "exclude": ["10.0.0.0/24"]}`:                       {"every address is reserved"},
		`{"subnet": "10.0.0.0/24", "rangeStart": "10.0.0.1", "rangeEnd": "10.0.0.1"}`: {"every address is reserved"},
		`{"ranges": [[]]}`: {"ranges[0]: is empty"},
		`{"ranges": [[{"subnet": "10.0.0.0/24"}, {"subnet": "fd00::/64"}]]}`:                     {"another family", "a set of its own"},
		`{"ranges": [[{"subnet": "10.0.0.0/24"}], [{"subnet": "10.0.0.0/16"}]]}`:                 {"overlap"},
		`{"subnet": "10.0.0.0/24", "routes": [{"dst": "x"}, {"dst": "::/0", "gw": "10.0.0.1"}]}`: {"routes[0].dst", "routes[1].gw"},
		`{"subnet": "10.0.0.0/24", "routes": [{"dst": "0.0.0.0/0", "mtu": -1, "advmss": 65536, "priority": 4294967296, "table": 0, "scope": 256}]}`: {
			"routes[0].mtu: -1: want 0 to 65535", "routes[0].advmss: 65536", "routes[0].priority: 4294967296", "routes[0].table: 0", "routes[0].scope: 256"},
		`{"subnet": "x", "rangeStart": "y", "gateway": "fe80::1%eth0"}`: {"ipam.subnet", "ipam.rangeStart", "ipam.gateway"},
	} {
		_, err := ParseConfig("net", []byte(json))
		if !errors.Is(err, ErrConfig) || errors.Is(err, ErrNoRanges) {
			t.Errorf("%s: %v, want only ErrConfig", json, err)
			continue
		}
		for _, w := range want {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%s: %v\nlacks %q", json, err, w)
			}
		}
		if only := strings.Contains(err.Error(), "unknown key"); only != errors.Is(err, ErrUnsupported) {
			t.Errorf("%s: unknown keys only: %v, but: %v", json, only, err)
		}
	}
	c, err := ParseConfig("net", []byte(`{"strategy": "random"}`))
	if !errors.Is(err, ErrNoRanges) || c.Strategy != Random {
		t.Errorf("without ranges: %+v, %v", c, err)
	}
	c.Sets = [][]Range{{{Subnet: pfx("10.0.0.0/24")}}}
	if err := c.Validate(); err != nil {
		t.Errorf("ranges added by hand: %v", err)
	}
	for _, name := range []string{"", "..", "a/b", "-x", strings.Repeat("x", 256)} {
		if _, err := ParseConfig(name, []byte(`{"subnet": "10.0.0.0/24"}`)); !errors.Is(err, ErrConfig) {
			t.Errorf("network name %q: %v", name, err)
		}
	}
}

func FuzzParseConfig(f *testing.F) {
	for _, shape := range shapes {
		f.Add([]byte(`{"ranges": [` + shape + `]}`))
	}
	f.Fuzz(func(t *testing.T, json []byte) {
		_, _ = WithRanges(json, json)
		c, err := ParseConfig("net", json)
		if err != nil {
			return
		}
		for _, set := range c.Sets {
			got, err := pick(DensePack, newSpace(set), netip.Addr{}, newMemory(), nil)
			if err != nil || got.rng == nil || !got.rng.Subnet.Contains(got.addr) {
				t.Fatalf("a valid configuration gives %v, %v: %s", got, err, json)
			}
		}
	})
}

// The ranges that the runtime asks for come first; what is not a list of sets is a fault, and never a panic.
func TestWithRanges(t *testing.T) {
	for _, c := range []struct{ object, asked, want string }{
		{`{"subnet":"10.0.0.0/24"}`, ``, `{"subnet":"10.0.0.0/24"}`},
		{`{"strategy":"random"}`, `[[{"subnet":"10.7.0.0/24"}]]`, `{"ranges":[[{"subnet":"10.7.0.0/24"}]],"strategy":"random"}`},
		{`{"ranges":[[{"subnet":"10.0.0.0/24"}]]}`, `[[{"subnet":"10.7.0.0/24"}]]`, `{"ranges":[[{"subnet":"10.7.0.0/24"}],[{"subnet":"10.0.0.0/24"}]]}`},
		{``, `[[{"subnet":"10.7.0.0/24"}]]`, `{"ranges":[[{"subnet":"10.7.0.0/24"}]]}`},
		{`{"ranges":null}`, `[]`, `{"ranges":[]}`},
		{`null`, `[]`, ``}, {`[]`, `[]`, ``}, {`{}`, `{}`, ``}, {`{"ranges":{}}`, `[]`, ``}, {`{}`, `"x"`, ``},
	} {
		got, err := WithRanges([]byte(c.object), []byte(c.asked))
		if string(got) != c.want || c.want == "" && !errors.Is(err, ErrConfig) {
			t.Errorf("%s with %s: %s, %v; want %s", c.object, c.asked, got, err, c.want)
		}
	}
}

func TestRequestedIPs(t *testing.T) {
	for _, c := range []struct {
		args, json string
		want       []netip.Addr
		is         error
	}{
		{"", `{}`, nil, nil},
		{"K8S_POD_NAME=x;IP=10.0.0.5;IgnoreUnknown=1", `{}`, []netip.Addr{adr("10.0.0.5")}, nil},
		{"IP=10.0.0.5/24,fd00::5", `{"args": {"cni": {"ips": ["10.0.0.5", "10.0.0.6/24"]}}, "runtimeConfig": {"ips": ["fd00::7/64"]}}`,
			[]netip.Addr{adr("10.0.0.5"), adr("10.0.0.6"), adr("fd00::7")}, nil},
		{"IP=10.0.0.5,fd00::5", `{"args": {"cni": {}}, "runtimeConfig": {"ips": []}}`, []netip.Addr{adr("10.0.0.5"), adr("fd00::5")}, nil},
		{"IP=::ffff:10.0.0.5", `{}`, []netip.Addr{adr("10.0.0.5")}, nil},
		{"IP=nonsense", `{}`, nil, ErrArgs},
		{"", `{"runtimeConfig": {"ips": ["10.0.0"]}}`, nil, ErrConfig},
		{"", `{"args": {"cni": {"ips": "10.0.0.1"}}}`, nil, ErrConfig},
	} {
		var conf map[string]json.RawMessage
		if err := json.Unmarshal([]byte(c.json), &conf); err != nil {
			t.Fatal(err)
		}
		got, err := RequestedIPs(c.args, conf)
		if !errors.Is(err, c.is) || c.is == nil && err != nil {
			t.Errorf("%q %s: %v, want %v", c.args, c.json, err, c.is)
		}
		if diff := cmp.Diff(c.want, got, cmpNet); diff != "" {
			t.Errorf("%q %s: %s", c.args, c.json, diff)
		}
	}
}

func TestOwnerOf(t *testing.T) {
	got := OwnerOf("c", "eth0", "IgnoreUnknown=1;K8S_POD_NAMESPACE=default; K8S_POD_NAME=web-0;K8S_POD_UID=4")
	want := Owner{ContainerID: "c", IfName: "eth0", PodNamespace: "default", PodName: "web-0"}
	if got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
}

func TestResult(t *testing.T) {
	file := filepath.Join(t.TempDir(), "resolv.conf")
	text := "# comment\nnameserver 10.0.0.10\nnameserver fd00::a\n;x y\ndomain old.example\nsearch a.example\nsearch b.example c.example\noptions ndots:5 edns0\nbroken\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	scope := 253
	c := Config{ResolvConf: file, Routes: []Route{{Dst: pfx("0.0.0.0/0")}, {Dst: pfx("fd01::/64"), GW: adr("fd00::9"), MTU: 1280, Scope: &scope}}}
	r, err := c.Result(Lease{Addrs: []LeasedAddr{{Addr: pfx("10.0.0.2/24"), Gateway: adr("10.0.0.1")}, {Addr: pfx("fd00::2/64")}}})
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	if err := r.PrintTo(&b); err != nil {
		t.Fatal(err)
	}
	want := `{
    "cniVersion": "1.1.0",
    "dns": {
        "domain": "old.example",
        "nameservers": [
            "10.0.0.10",
            "fd00::a"
        ],
        "options": [
            "ndots:5",
            "edns0"
        ],
        "search": [
            "b.example",
            "c.example"
        ]
    },
    "ips": [
        {
            "address": "10.0.0.2/24",
            "gateway": "10.0.0.1"
        },
        {
            "address": "fd00::2/64"
        }
    ],
    "routes": [
        {
            "dst": "0.0.0.0/0"
        },
        {
            "dst": "fd01::/64",
            "gw": "fd00::9",
            "mtu": 1280,
            "scope": 253
        }
    ]
}`
	if diff := cmp.Diff(want, b.String()); diff != "" {
		t.Error(diff)
	}
	for _, version := range []string{"0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		if _, err := r.GetAsVersion(version); err != nil {
			t.Errorf("as %s: %v", version, err)
		}
	}
	c.ResolvConf += ".missing"
	if _, err := c.Result(Lease{}); !errors.Is(err, ErrConfig) || !strings.Contains(err.Error(), c.ResolvConf) {
		t.Errorf("missing resolv.conf: %v", err)
	}
}
