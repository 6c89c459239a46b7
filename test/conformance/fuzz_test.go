package conformance

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/pkg/config/netconf"
)

// seeds are configurations with every key in them.
func (n *node) seeds() []string {
	n.t.Helper()
	return []string{
		n.conf(""),
		n.conf(`{"magic_dns":{"enable":true,"base_domain":"x.example","nameservers":["192.0.2.1"],"search_domains":["a"]},
			"dns":{"nameservers":["192.0.2.2"],"domain":"d","search":["s"],"options":["o"]},"pod_cidr":"10.244.0.0/16","service_cidr":"10.96.0.0/16",
			"enable_ipv6":true,"enable_network_policy":true,"auth_key":"x","headscale_url":"https://x","tailscale_socket":"/x","ipMasq":false,
			"runtimeConfig":{"ips":["10.244.1.9"],"mac":"02:00:00:00:00:09","dns":{"servers":["192.0.2.3"]},"ipRanges":[[{"subnet":"10.244.1.0/25"}]]},
			"args":{"cni":{"ips":["10.244.1.8"]}},"capabilities":{"mac":true},"log_level":"info"}`),
		n.conf(`{"gate":{"podCIDRs":["10.244.1.0/24","fd00:244:1::/64"]},"cni.dev/valid-attachments":[{"containerID":"c9","ifname":"eth0"}]}`),
		n.conf(fmt.Sprintf(`{"ipam":{"type":"headcni-ipam","dataDir":%q,"subnet":"10.244.1.0/24","rangeStart":"10.244.1.5","rangeEnd":"10.244.1.9",
			"gateway":"10.244.1.1","strategy":"random","exclude":["10.244.1.6"],"routes":[{"dst":"0.0.0.0/0","gw":"10.244.1.1","mtu":1300,"table":7}]}}`, n.dataDir)),
		n.conf(`{"prevResult":{"cniVersion":"1.1.0","interfaces":[{"name":"hc1","mac":"02:00:00:00:00:01"},{"name":"eth0","sandbox":"/x","mtu":1400}],
			"ips":[{"address":"10.244.1.2/32","interface":1,"gateway":"169.254.1.1"}],"routes":[{"dst":"0.0.0.0/0","gw":"169.254.1.1"}],"dns":{}}}`),
	}
}

// values are put where others stood.
var values = []string{
	`null`, `true`, `0`, `-1`, `1e999`, `9223372036854775808`, `1.5`, `""`, `"x"`, `"10.244.1.0/33"`, `"::/0"`, `"0.0.0.0/0"`, `"fe80::1%eth0"`, `"/"`, `"../../x"`,
	`"\u0000"`, `"\ud800"`, `"\u2028"`, "\"\xff\xfe\"", `[]`, `{}`, `[null]`, `[[]]`, `[[null]]`, `[{}]`, `{"":""}`, `{"a":{"a":{"a":[]}}}`, `"%s%n%d"`, `"$(id)"`,
}

// mutate changes one thing in a JSON text, now and then so that it is none any more.
func mutate(r *rand.Rand, conf string) string {
	switch r.IntN(12) {
	case 0: // a byte
		b := []byte(conf)
		b[r.IntN(len(b))] = byte(r.Uint32())
		return string(b)
	case 1: // an end
		return conf[:r.IntN(len(conf))]
	case 2: // a piece twice
		i := r.IntN(len(conf))
		j := i + r.IntN(len(conf)-i)
		return conf[:j] + conf[i:]
	case 3: // a key twice
		return `{"ipam":` + values[r.IntN(len(values))] + "," + conf[1:]
	}
	var v any
	if json.Unmarshal([]byte(conf), &v) != nil {
		return conf
	}
	marks := []string{}
	v = replaceOne(r, v, &marks)
	b, err := json.Marshal(v)
	if err != nil {
		return conf
	}
	text := string(b)
	for _, m := range marks { // raw texts that Marshal would not write
		text = strings.Replace(text, `"`+m+`"`, values[r.IntN(len(values))], 1)
	}
	return text
}

// replaceOne walks down a random way and puts a mark in place of what it finds there, takes it out, or changes its key.
func replaceOne(r *rand.Rand, v any, marks *[]string) any {
	switch v := v.(type) {
	case map[string]any:
		keys := make([]string, 0, len(v))
		for k := range v {
			keys = append(keys, k)
		}
		slices.Sort(keys)
		if len(keys) > 0 && r.IntN(6) > 0 {
			k := keys[r.IntN(len(keys))]
			switch r.IntN(8) {
			case 0:
				delete(v, k)
			case 1:
				v[strings.ToUpper(k)] = v[k]
			default:
				v[k] = replaceOne(r, v[k], marks)
			}
			return v
		}
	case []any:
		if len(v) > 0 && r.IntN(4) > 0 {
			i := r.IntN(len(v))
			v[i] = replaceOne(r, v[i], marks)
			return v
		}
	}
	m := fmt.Sprintf("MARK%d", len(*marks))
	*marks = append(*marks, m)
	return m
}

// oddities are inputs that no mutation would come upon.
func (n *node) oddities() []string {
	deep := strings.Repeat(`{"a":`, 9000) + "1" + strings.Repeat("}", 9000)
	tooDeep := strings.Repeat("[", 100_000) + strings.Repeat("]", 100_000)
	return []string{
		"", " ", "\x00", "null", "[]", "7", `"x"`, "{", "}", "{}", "{}{}", n.conf("") + n.conf(""), n.conf("") + "junk", "\ufeff" + n.conf(""),
		n.with(n.conf(""), `{"args":`+deep+`}`), tooDeep, `{"args":` + tooDeep + "," + n.conf("")[1:],
		n.with(n.conf(""), `{"args":"`+strings.Repeat("x", 4<<20)+`"}`), strings.Repeat(" ", 4<<20) + n.conf(""),
		`{"cniVersion":"0.2.0",` + n.conf("")[1:], n.conf("")[:len(n.conf(""))-1] + `,"cniVersion":"0.3.1"}`, `{"name":"../x",` + n.conf("")[1:],
		strings.Replace(n.conf(""), `"net"`, "\"n\xffet\"", 1), n.conf(`{"prevResult":` + deep + `}`), n.conf(`{"dns":{"domain":"` + strings.Repeat("ä", 1<<20) + `"}}`),
		n.conf(`{"ipam":{"type":"headcni-ipam","dataDir":"/proc"}}`), n.conf(`{"ipam":{"type":"headcni-ipam","dataDir":"/dev/null"}}`),
		n.conf(`{"prevResult":{"cniVersion":"1.1.0","routes":[{"dst":"0.0.0.0/0","gw":"\u0000\u001b[2J\r"}]}}`), n.conf(`{"\u0000\u001b[2J":1}`),
		n.conf(`{"log_file":"/dev/full","log_level":"debug"}`), n.conf(`{"log_file":"/proc/self/mem"}`), n.conf(`{"daemon_socket":"/dev/null"}`),
	}
}

// TestAnyInput runs both programs on mutated and odd input and environments: no panic, no hang, an error of the right form, and
// nothing left behind where ADD fails, or after DEL.
func TestAnyInput(t *testing.T) {
	n, pod := newNode(t), nstest.New(t)
	// A path that a mutation has changed must not be made on the machine.
	n.confine = true
	var err error
	if n.dataDir, err = os.MkdirTemp("/run", "any-input"); err != nil {
		t.Fatal(err)
	}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	inputs := n.oddities()
	rounds := 400
	if testing.Short() {
		rounds = 100
	}
	for range rounds {
		conf := n.seeds()[r.IntN(len(n.seeds()))]
		for i := 0; i < 1+r.IntN(2) && conf != ""; i++ {
			conf = mutate(r, conf)
		}
		inputs = append(inputs, conf)
	}
	good := n.conf("")
	worked := 0
	for i, conf := range inputs {
		c := call{program: []string{"headcni", "headcni", "headcni-ipam"}[i%3], verb: "ADD", id: "c1", ifName: "eth0", netns: pod.Path, conf: conf}
		n.env = nil
		if r.IntN(3) == 0 {
			odd := []string{"", "a\xffb", strings.Repeat("x", 100_000), "../../x", "a;b=;=c;;IP=,", "IP=10.244.1.300;MAC=", "-", "%d", "\n", "net1", "all"}
			field := []*string{&c.id, &c.ifName, &c.netns, &c.args}[r.IntN(4)]
			*field = odd[r.IntN(len(odd))]
			n.env = []string{"HEADCNI_LOG_LEVEL=" + strings.ReplaceAll(odd[r.IntN(len(odd))], "\x00", "")}
		}
		out, f := n.run(c)
		if f == nil {
			worked++
		} else if len(n.links())+len(n.leases()) > 0 {
			t.Errorf("ADD failed (%v) and left %s, %v", f, n.links(), n.leases())
		}
		c.verb = []string{"CHECK", "GC", "STATUS", "VERSION", "FETCH"}[r.IntN(5)]
		if c.verb == "CHECK" && f == nil && json.Valid([]byte(conf)) && strings.HasPrefix(conf, "{") {
			c.conf = conf[:len(conf)-1] + `,"prevResult":` + mutate(r, out) + "}"
		}
		n.run(c) // n.run holds the form of the answer
		c.verb, c.conf = "DEL", conf
		n.run(c)
		n.env = nil
		n.must(call{program: "headcni", verb: "DEL", id: "c1", ifName: "eth0", conf: good})
		if ifName := c.ifName; ifName == "net1" || c.id != "c1" {
			n.must(call{program: "headcni", verb: "GC", conf: n.with(good, `{"cni.dev/valid-attachments":[]}`)})
		}
		if len(n.links())+len(n.leases()) > 0 {
			t.Fatalf("left by %.300q: %s, %v (seed %d)", conf, n.links(), n.leases(), seed)
		}
		if t.Failed() {
			t.Fatalf("with %.2000q (seed %d)", conf, seed)
		}
	}
	t.Logf("%d inputs, %d ADDs worked", len(inputs), worked)
	if worked == 0 || worked == len(inputs) {
		t.Errorf("the mutations are too wild or too tame: %d of %d ADDs worked", worked, len(inputs))
	}
}

// FuzzConfig looks for a configuration that makes the parser panic or an error that is not one line, or that names no key.
func FuzzConfig(f *testing.F) {
	n := &node{t: &testing.T{}, dataDir: "/x"}
	for _, s := range slices.Concat(n.seeds(), values) {
		f.Add([]byte(s), byte(0))
	}
	f.Fuzz(func(t *testing.T, conf []byte, rounds byte) {
		r := rand.New(rand.NewPCG(uint64(rounds), uint64(len(conf))))
		text := string(conf)
		for range rounds % 4 {
			if text != "" {
				text = mutate(r, text)
			}
		}
		c, err := netconf.Parse([]byte(text))
		if err == nil && (c.IPAM.Type == "" || c.MTU < 0 || c.HasValidAttachments && c.ValidAttachments == nil) {
			t.Errorf("%q passes as %+v", text, c)
		}
		if err != nil && !strings.HasPrefix(err.Error(), netconf.ErrInvalid.Error()+": ") {
			t.Errorf("%q: %v", text, err)
		}
	})
}
