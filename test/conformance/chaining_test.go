package conformance

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nstest"
)

// serve answers on port 80 of the pod with a line.
func serve(t *testing.T, pod *nstest.NS) {
	t.Helper()
	var l net.Listener
	pod.Do(t, func() (err error) {
		l, err = net.Listen("tcp", ":80") // a socket stays where its thread was
		return err
	})
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(c, "hello\n") // the other end tells
			c.Close()
		}
	}()
}

func fetch(t *testing.T, from *nstest.NS, to string) (line string, err error) {
	t.Helper()
	from.Do(t, func() error {
		var c net.Conn
		if c, err = net.DialTimeout("tcp", to, 3*time.Second); err != nil {
			return nil
		}
		defer c.Close()
		if err = c.SetDeadline(time.Now().Add(3 * time.Second)); err != nil {
			return nil
		}
		var b []byte
		b, err = io.ReadAll(c)
		line = string(b)
		return nil
	})
	return line, err
}

// client is a machine beside the node.
func (n *node) client() *nstest.NS {
	n.t.Helper()
	c := nstest.New(n.t)
	n.host.Run(n.t, "ip", "link", "add", "up0", "type", "veth", "peer", "name", "eth0", "netns", c.Name)
	for _, side := range []struct {
		ns   *nstest.NS
		link string
		addr string
	}{{n.host, "up0", "198.51.100.1"}, {c, "eth0", "198.51.100.2"}} {
		side.ns.Run(n.t, "ip", "addr", "add", side.addr+"/24", "dev", side.link)
		side.ns.Run(n.t, "ip", "link", "set", side.link, "up")
	}
	c.Run(n.t, "ip", "route", "add", "default", "via", "198.51.100.1")
	return c
}

// chain runs a whole life in a conflist: ADD, CHECK, whatever use does, CHECK, DEL, DEL.
func (n *node) chain(l *libcni.NetworkConfigList, asked map[string]any, use func(pod *nstest.NS, got result)) {
	n.t.Helper()
	pod := nstest.New(n.t)
	r := rt("c1", pod, asked)
	got := n.add(l, r)
	if err := n.check(l, r); err != nil {
		n.t.Errorf("CHECK right after ADD: %v", err)
	}
	ping(n.t, n.host, got.addrs()...)
	if use != nil {
		use(pod, got)
	}
	n.del(l, r)
	n.del(l, r)
	n.empty()
}

// TestPortmap: run by headcni for the pods that ask for a port, and as first thing a runtime adds to any network.
func TestPortmap(t *testing.T) {
	needs(t, "iptables", "nft")
	const capable = `"capabilities":{"portMappings":true}`
	for _, backend := range []string{"iptables", "nftables"} {
		option := fmt.Sprintf(`"backend":%q`, backend)
		for name, plugins := range map[string]func(*node) []string{
			"run by headcni": func(n *node) []string { return []string{n.headcni(`{` + capable + `,"portmap":{` + option + `}}`)} },
			"behind headcni": func(n *node) []string {
				return []string{n.headcni(""), `{"type":"portmap",` + option + `,` + capable + `}`}
			},
		} {
			t.Run(backend+" "+name, func(t *testing.T) {
				n := newNode(t)
				n.reference("portmap")
				client := n.client()
				l := n.list("", plugins(n)...)
				asked := map[string]any{"portMappings": []map[string]any{{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}}}
				n.chain(l, asked, func(pod *nstest.NS, _ result) {
					serve(t, pod)
					if line, err := fetch(t, client, "198.51.100.1:8080"); err != nil || line != "hello\n" {
						t.Errorf("got %q, %v", line, err)
					}
				})
				if _, err := fetch(t, client, "198.51.100.1:8080"); err == nil {
					t.Error("the port is mapped after DEL")
				}
			})
		}
	}
}

// DEL takes the ports of the node back by what ADD was told: multus calls it with a configuration that has lost all but the keys that
// the CNI project's library knows (its issue 1449), and the node's may have changed since.
func TestPortsAreReturnedWhateverDELSays(t *testing.T) {
	needs(t, "iptables", "nft")
	for _, backend := range []string{"iptables", "nftables"} {
		t.Run(backend, func(t *testing.T) {
			n, pod := newNode(t), nstest.New(t)
			n.reference("portmap")
			n.client()
			run, err := os.MkdirTemp("/run", "daemon")
			if err != nil {
				t.Fatal(err)
			}
			socket := fmt.Sprintf(`"daemon_socket":%q`, run+"/daemon.sock")
			l := n.list("", n.headcni(fmt.Sprintf(`{"capabilities":{"portMappings":true},"portmap":{"backend":%q},%s}`, backend, socket)))
			asked := map[string]any{"portMappings": []map[string]any{{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}}}
			rules := func() string { return n.host.Run(t, "sh", "-c", "nft list ruleset 2>/dev/null | grep -c 8080 || :") }
			before := rules()
			n.add(l, rt("c1", pod, asked))
			if rules() == before {
				t.Error("ADD made no rule: this test cannot fail")
			}
			n.must(attach("DEL", "c1", pod, n.conf("{"+socket+"}")))
			if now := rules(); now != before {
				t.Errorf("rules for the port: %s, at the start %s", now, before)
			}
			if left, err := os.ReadDir(run + "/ports"); err != nil || len(left) > 0 {
				t.Errorf("records: %v, %v", left, err)
			}
			n.empty()
		})
	}
}

// TestPortsThatPortmapRefuses: a pod's author can write such a port, by an annotation of multus's. portmap refuses it at DEL as at ADD, so ADD must
// refuse it before an address is taken, and DEL, which may come for one that an older version has begun, must not wait for portmap's consent.
func TestPortsThatPortmapRefuses(t *testing.T) {
	needs(t, "iptables", "nft")
	n, pod := newNode(t), nstest.New(t)
	n.reference("portmap")
	run, err := os.MkdirTemp("/run", "daemon")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(run) })
	conf := func(options, ports string) string {
		return n.conf(fmt.Sprintf(`{"daemon_socket":%q,"portmap":%s,"runtimeConfig":{"portMappings":%s}}`, run+"/daemon.sock", options, ports))
	}
	const right = `{"hostPort":8080,"containerPort":80,"protocol":"tcp"}`
	for _, wrong := range []string{
		`{"containerPort":80}`, `{"hostPort":8080}`, `{"hostPort":0,"containerPort":80}`, `{"hostPort":8080,"containerPort":-1}`, `{"hostPort":70000,"containerPort":80}`,
		`{"hostPort":"8080","containerPort":80}`, `{"hostPort":8080.5,"containerPort":80}`, `{"hostPort":8080,"containerPort":80,"protocol":6}`, `null`, `[]`, `"8080:80"`,
	} {
		c := attach("ADD", "c1", pod, conf("{}", "["+right+","+wrong+"]"))
		n.fails(c, 7, "runtimeConfig.portMappings[1]")
		n.empty()
		// One that lives, and whose DEL says it.
		n.must(attach("ADD", "c1", pod, conf("{}", "["+right+"]")))
		c.verb = "DEL"
		n.must(c)
		n.empty()
		if rules := n.host.Run(t, "nft", "list", "ruleset"); strings.Contains(rules, "8080") {
			t.Errorf("%s: DEL leaves rules: %s", wrong, rules)
		}
	}
	for options, code := range map[string]uint{
		`{"backend":"ipchains"}`: 7, `{"backend":1}`: 7, // ours to see
		`{"snat":"yes"}`: 999, `{"markMasqBit":99}`: 999, `{"backend":"nftables","conditionsV4":["-d","192.0.2.0/24"]}`: 999, `{"conditionsV4":["-j","NOWHERE"]}`: 999,
	} {
		c := attach("ADD", "c1", pod, conf(options, "["+right+"]"))
		n.fails(c, code)
		n.empty()
		c.verb = "DEL"
		n.must(c)
		n.empty()
	}
	// A record of an older version.
	c := attach("ADD", "c1", pod, conf("{}", "["+right+"]"))
	n.must(c)
	records, err := os.ReadDir(run + "/ports")
	if err != nil || len(records) != 1 {
		t.Fatalf("records: %v, %v", records, err)
	}
	path := run + "/ports/" + records[0].Name()
	record, err := os.ReadFile(path)
	if err == nil {
		err = os.WriteFile(path, []byte(strings.Replace(string(record), `"hostPort":8080`, `"hostPort":0`, 1)), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	c.verb = "DEL"
	n.must(c)
	n.empty()
}

// A pod that is gone without DEL, as after a crash of the runtime, does not keep its port of the node from the next one: portmap's first
// rule for a port counts. GC takes it back too.
func TestPortOfTheDead(t *testing.T) {
	needs(t, "iptables", "nft")
	for _, backend := range []string{"iptables", "nftables"} {
		t.Run(backend, func(t *testing.T) {
			n := newNode(t)
			n.reference("portmap")
			client := n.client()
			run, err := os.MkdirTemp("/run", "daemon")
			if err != nil {
				t.Fatal(err)
			}
			l := n.list("", n.headcni(fmt.Sprintf(`{"capabilities":{"portMappings":true},"portmap":{"backend":%q},"daemon_socket":%q}`, backend, run+"/daemon.sock")))
			asked := map[string]any{"portMappings": []map[string]any{{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}}}
			die := func(id string) *libcni.RuntimeConf {
				path := "/run/netns/" + id
				if err := nstest.Create(path); err != nil {
					t.Fatal(err)
				}
				r := rt(id, &nstest.NS{Path: path}, asked)
				n.add(l, r)
				if err := errors.Join(unix.Unmount(path, unix.MNT_DETACH), os.Remove(path)); err != nil {
					t.Fatal(err)
				}
				for len(n.links()) > 0 {
					time.Sleep(time.Millisecond) // the kernel ends a namespace in a queue of its own
				}
				return r
			}
			rules := func() string { return n.host.Run(t, "sh", "-c", "nft list ruleset 2>/dev/null | grep -c 8080 || :") }
			before := rules()
			first := die("first")
			pod := nstest.New(t)
			second := rt("second", pod, asked)
			n.add(l, second)
			serve(t, pod)
			if line, err := fetch(t, client, "198.51.100.1:8080"); err != nil || line != "hello\n" {
				t.Errorf("got %q, %v", line, err)
			}
			n.del(l, first) // late, and no business of the second
			if line, err := fetch(t, client, "198.51.100.1:8080"); err != nil || line != "hello\n" {
				t.Errorf("after the first one's DEL: got %q, %v", line, err)
			}
			n.del(l, second)
			die("third")
			if err := n.cni().GCNetworkList(t.Context(), l, &libcni.GCArgs{}); err != nil {
				t.Error(err)
			}
			if now := rules(); now != before {
				t.Errorf("rules for the port: %s, at the start %s", now, before)
			}
			n.empty()
		})
	}
}

// A client that never stops sending by UDP reaches whoever has the node's port after its pod, though no daemon is there to see to it:
// conntrack would lead it to the pod's address for as long as it sends, whoever has that next.
func TestPortOfAPodThatWent(t *testing.T) {
	needs(t, "iptables", "nft")
	for _, backend := range []string{"iptables", "nftables"} {
		for how, end := range map[string]func(*testing.T, *node, *libcni.NetworkConfigList, *libcni.RuntimeConf){
			"DEL": func(_ *testing.T, n *node, l *libcni.NetworkConfigList, r *libcni.RuntimeConf) { n.del(l, r) },
			"GC": func(t *testing.T, n *node, l *libcni.NetworkConfigList, _ *libcni.RuntimeConf) {
				if err := n.cni().GCNetworkList(t.Context(), l, &libcni.GCArgs{}); err != nil {
					t.Error(err)
				}
			},
		} {
			t.Run(backend+" "+how, func(t *testing.T) {
				n := newNode(t)
				n.reference("portmap")
				from := n.client()
				run, err := os.MkdirTemp("/run", "daemon")
				if err != nil {
					t.Fatal(err)
				}
				l := n.list("", n.headcni(fmt.Sprintf(`{"capabilities":{"portMappings":true},"portmap":{"backend":%q},"daemon_socket":%q}`, backend, run+"/daemon.sock")))
				pod := nstest.New(t)
				r := rt("c1", pod, map[string]any{"portMappings": []map[string]any{{"hostPort": 8080, "containerPort": 80, "protocol": "udp"}}})
				n.add(l, r)
				say(t, pod, "0.0.0.0:80", "the pod")
				say(t, n.host, "198.51.100.1:8080", "the node")
				var client net.Conn
				from.Do(t, func() (err error) {
					client, err = net.Dial("udp", "198.51.100.1:8080")
					return err
				})
				t.Cleanup(func() { client.Close() })
				if got := ask(t, client); got != "the pod" {
					t.Errorf("before %s %q answers", how, got)
				}
				end(t, n, l, r)
				if got := ask(t, client); got != "the node" {
					t.Errorf("after %s %q answers", how, got)
				}
			})
		}
	}
}

// say answers each datagram with a word until the test ends.
func say(t *testing.T, at *nstest.NS, addr, word string) {
	t.Helper()
	var c net.PacketConn
	at.Do(t, func() (err error) {
		c, err = net.ListenPacket("udp4", addr)
		return err
	})
	t.Cleanup(func() { c.Close() })
	go func() {
		for b := make([]byte, 16); ; {
			_, from, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			_, _ = c.WriteTo([]byte(word), from) // the other end tells
		}
	}()
}

// ask sends until somebody answers, and says who; "nobody" where there is no answer to a second of questions.
func ask(t *testing.T, c net.Conn) string {
	t.Helper()
	b := make([]byte, 16)
	for range 20 {
		_, _ = c.Write([]byte("who?")) // refused, where the one before said that nobody is there
		if err := c.SetReadDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		if n, err := c.Read(b); err == nil {
			return string(b[:n])
		}
	}
	return "nobody"
}

func TestFirewall(t *testing.T) {
	needs(t, "iptables")
	n := newNode(t)
	n.reference("firewall")
	client := n.client()
	n.host.Run(t, "iptables", "-P", "FORWARD", "DROP")
	n.chain(n.list("", n.headcni(""), `{"type":"firewall","backend":"iptables"}`), nil, func(pod *nstest.NS, got result) {
		serve(t, pod)
		client.Run(t, "ip", "route", "replace", "default", "via", "198.51.100.1")
		pod.Run(t, "ping", "-n", "-c", "1", "-W", "2", "198.51.100.2") // the plugin lets the pod out, and answers in
		_ = got
	})
}

// TestTuning: what it changes legally is no deviation; a MAC that headcni is not told of is, and CHECK says what to do.
func TestTuning(t *testing.T) {
	n := newNode(t)
	n.reference("tuning")
	tuning := func(keys string) string {
		return n.with(fmt.Sprintf(`{"type":"tuning","dataDir":%q}`, t.TempDir()), keys)
	}
	const mac = "02:00:00:00:00:77"
	t.Run("sysctl and MTU", func(t *testing.T) {
		l := n.list("", n.headcni(""), tuning(`{"sysctl":{"net.ipv4.conf.IFNAME.arp_notify":"1"},"mtu":1300,"txQLen":500,"allmulti":true}`))
		n.chain(l, nil, func(pod *nstest.NS, got result) {
			if seen(t, pod, "eth0").Mtu != 1300 || got.Interfaces[1].Mtu != 1400 {
				t.Errorf("MTU %d, %d in the result: tuning reports what it does now", seen(t, pod, "eth0").Mtu, got.Interfaces[1].Mtu)
			}
		})
	})
	t.Run("capability mac", func(t *testing.T) {
		l := n.list("", n.headcni(`{"capabilities":{"mac":true}}`), tuning(""))
		n.chain(l, map[string]any{"mac": mac}, func(pod *nstest.NS, got result) {
			if seen(t, pod, "eth0").Mac != mac || got.Interfaces[1].Mac != mac {
				t.Errorf("got %+v", got)
			}
		})
	})
	// The kernel forgets all of a link's neighbours, permanent ones too, when its address is set, be it to what it was.
	for name, l := range map[string]*libcni.NetworkConfigList{
		"of tuning alone": n.list("", n.headcni(""), tuning(`{"capabilities":{"mac":true}}`)),
		"of both":         n.list("", n.headcni(`{"capabilities":{"mac":true}}`), tuning(`{"capabilities":{"mac":true}}`)),
	} {
		t.Run("capability mac "+name, func(t *testing.T) {
			r := rt("c1", nstest.New(t), map[string]any{"mac": mac})
			if got := n.add(l, r); got.Interfaces[1].Mac != mac {
				t.Errorf("got %+v", got)
			}
			err := n.check(l, r)
			for _, want := range []string{"pod neighbour 169.254.1.1 is missing", "pod neighbour fe80::1 is missing", "give the capability mac to headcni"} {
				if err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("CHECK: %v, want %q in it", err, want)
				}
			}
			n.del(l, r)
			n.empty()
		})
	}
}

// TestBandwidth: where the kernel lacks ifb or tbf, ADD fails in its words and leaves nothing.
func TestBandwidth(t *testing.T) {
	needs(t, "tc")
	n := newNode(t)
	n.reference("bandwidth")
	l := n.list("", n.headcni(""), `{"type":"bandwidth","capabilities":{"bandwidth":true}}`)
	asked := map[string]any{"bandwidth": map[string]any{
		"ingressRate": 8_000_000, "ingressBurst": 8_000_000, "egressRate": 8_000_000, "egressBurst": 8_000_000,
	}}
	if missing := n.lacksShaping(); missing != "" {
		t.Logf("the kernel: %s", missing)
		r := rt("c1", nstest.New(t), asked)
		if _, err := n.cni().AddNetworkList(t.Context(), l, r); err == nil {
			t.Error("ADD succeeds without the kernel's help")
		} else if n.made(); !strings.Contains(err.Error(), "qdisc") && !strings.Contains(err.Error(), "ifb") {
			t.Errorf("not the kernel's refusal: %v", err)
		}
		_ = n.cni().DelNetworkList(t.Context(), l, r) // bandwidth's DEL may want the qdisc that is not there
		n.must(attach("DEL", "c1", nil, n.conf("")))
		n.empty()
		return
	}
	n.chain(l, asked, func(pod *nstest.NS, got result) {
		if len(got.Interfaces) != 3 {
			t.Errorf("no ifb in %+v", got.Interfaces)
		}
		if qdisc := n.host.Run(t, "tc", "qdisc", "show", "dev", got.Interfaces[0].Name); !strings.Contains(qdisc, "tbf") {
			t.Errorf("qdisc: %s", qdisc)
		}
		serve(t, pod)
		if line, err := fetch(t, n.host, net.JoinHostPort(got.addrs()[0].String(), "80")); err != nil || line != "hello\n" {
			t.Errorf("got %q, %v", line, err)
		}
	})
}

// lacksShaping tells what of the plugin bandwidth's needs the kernel has not.
func (n *node) lacksShaping() string {
	n.t.Helper()
	_ = exec.Command("modprobe", "-q", "ifb", "numifbs=0").Run() // loaded by the kernel, it would leave the host two links
	ns := nstest.New(n.t)
	for _, args := range []string{"ip link add ifb0 type ifb", "tc qdisc add dev ifb0 root tbf rate 1mbit burst 32kbit latency 10ms"} {
		f := strings.Fields(args)
		if out, err := ns.Command(f[0], f[1:]...).CombinedOutput(); err != nil {
			return fmt.Sprintf("%s: %s", args, out)
		}
	}
	return ""
}

// TestWholeChain: everything at once, in every version, with the capabilities that CRI-O, containerd and podman give.
func TestWholeChain(t *testing.T) {
	needs(t, "iptables", "tc")
	for _, version := range versions[2:] { // before 0.4.0 there was no CHECK
		t.Run(version, func(t *testing.T) {
			n := newNode(t)
			n.reference("portmap", "tuning", "firewall", "bandwidth")
			client := n.client()
			plugins := []string{
				n.headcni(`{"capabilities":{"ips":true,"mac":true,"dns":true}}`),
				fmt.Sprintf(`{"type":"tuning","dataDir":%q,"sysctl":{"net.core.somaxconn":"500"}}`, t.TempDir()),
				`{"type":"firewall","backend":"iptables"}`, `{"type":"portmap","backend":"iptables","capabilities":{"portMappings":true},"snat":true}`,
			}
			if n.lacksShaping() == "" {
				plugins = append(plugins, `{"type":"bandwidth","capabilities":{"bandwidth":true}}`)
			}
			l := n.list(fmt.Sprintf(`{"cniVersion":%q}`, version), plugins...)
			asked := map[string]any{
				"ips": []string{"10.244.1.99", "fd00:244:1::99"}, "mac": "02:00:00:00:00:99",
				"dns":          map[string]any{"servers": []string{"192.0.2.53"}},
				"portMappings": []map[string]any{{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}},
				"bandwidth":    map[string]any{"ingressRate": 8_000_000, "ingressBurst": 8_000_000},
				"aliases":      map[string]any{"net": []string{"web"}}, // podman's, for no plugin here
			}
			n.chain(l, asked, func(pod *nstest.NS, got result) {
				if got.CNIVersion != version || got.addrs()[0] != netip.MustParseAddr("10.244.1.99") || seen(t, pod, "eth0").Mac != "02:00:00:00:00:99" {
					t.Errorf("got %+v", got)
				}
				serve(t, pod)
				if line, err := fetch(t, client, "198.51.100.1:8080"); err != nil || line != "hello\n" {
					t.Errorf("got %q, %v", line, err)
				}
			})
		})
	}
}
