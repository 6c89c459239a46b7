package conformance

import (
	"fmt"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"

	"github.com/headcni/headcni/internal/nstest"
)

// nulls are keys that a runtime or meta-plugin written in Go may leave nil, with what it writes for them.
var nulls = []string{
	`"type":null`, `"cniVersions":null`, `"disableCheck":null`, `"disableGC":null`, `"loadOnlyInlinedPlugins":null`, `"args":null`, `"args":{"cni":null}`,
	`"args":{"cni":{"ips":null,"mac":null}}`, `"capabilities":null`, `"runtimeConfig":null`,
	`"runtimeConfig":{"ips":null,"mac":null,"dns":null,"ipRanges":null,"portMappings":null,"bandwidth":null,"aliases":null}`, `"prevResult":null`, `"dns":null`,
	`"dns":{"nameservers":null,"domain":null,"search":null,"options":null}`, `"magic_dns":null`, `"magic_dns":{"nameservers":null,"search_domains":null}`,
	`"gate":null`, `"portmap":null`, `"log_level":null`, `"log_file":null`, `"daemon_socket":null`, `"pod_cidr":null`, `"service_cidr":null`, `"mtu":null`,
	`"enable_ipv6":null`, `"enable_network_policy":null`, `"ipMasq":null`, `"headscale_url":null`, `"tailscale_socket":null`, `"auth_key":null`,
	`"deviceID":null`, `"pciBusID":null`, `"cni.dev/attachments":null`, `"not.of.ours":null`,
}

// beside is a configuration with members that node.with would take for a wish to leave them out.
func beside(conf string, members ...string) string {
	return strings.TrimSuffix(conf, "}") + "," + strings.Join(members, ",") + "}"
}

// both programs, ADD to DEL.
func (n *node) attachAll(pod *nstest.NS, conf string) {
	n.t.Helper()
	for _, program := range []string{"headcni", "headcni-ipam"} {
		c := attach("ADD", "c1", pod, conf)
		c.program = program
		out := n.must(c)
		if program == "headcni" {
			ping(n.t, n.host, parse(n.t, out).addrs()...)
		}
		for _, verb := range []string{"CHECK", "STATUS", "GC", "DEL", "DEL"} {
			c.verb, c.conf = verb, conf
			switch verb {
			case "CHECK":
				c.conf = beside(conf, `"prevResult":`+out)
			case "GC":
				c.conf = beside(conf, `"cni.dev/valid-attachments":[{"containerID":"c1","ifname":"eth0"}]`)
			}
			n.must(c)
			if verb == "GC" {
				n.wantOwners("c1")
			}
		}
		n.empty()
	}
}

// TestNull: null is what a Go program writes for what it left nil. In every command it is as if the key was not there.
func TestNull(t *testing.T) {
	n, pod := newNode(t), nstest.New(t)
	for _, member := range nulls {
		n.attachAll(pod, beside(n.conf(""), member))
	}
	n.attachAll(pod, beside(n.conf(""), nulls...)) // the later of two wins: of those that stand twice both have been tried
	ipam := fmt.Sprintf(`"ipam":{"type":"headcni-ipam","dataDir":%q,"subnet":"10.244.1.0/24","rangeStart":null,"rangeEnd":null,"gateway":null,"ranges":null,
		"routes":null,"exclude":null,"strategy":null,"resolvConf":null,"name":null}`, n.dataDir)
	n.attachAll(pod, beside(n.conf(""), ipam))
	// Where the pool is pod_cidr, null ranges do not stand for a pool.
	c := attach("ADD", "c1", pod, beside(n.conf(""), `"pod_cidr":"10.244.1.0/24"`, `"runtimeConfig":{"ipRanges":null}`,
		fmt.Sprintf(`"ipam":{"type":null,"dataDir":%q,"ranges":null,"subnet":null}`, n.dataDir)))
	if got := parse(t, n.must(c)).addrs(); len(got) != 1 || !got[0].Is4() {
		t.Errorf("got %v", got)
	}
	c.verb = "DEL"
	n.must(c)
	n.empty()
}

// TestPrevResultWithNull: the lists and fields of a result may be null, too.
func TestPrevResultWithNull(t *testing.T) {
	n, pod := newNode(t), nstest.New(t)
	for _, previous := range []string{
		`{"cniVersion":"1.1.0","interfaces":null,"ips":null,"routes":null,"dns":null}`,
		`{"cniVersion":null,"interfaces":[{"name":"x","mac":null,"mtu":null,"sandbox":null,"socketPath":null,"pciID":null}],
			"ips":[{"address":"203.0.113.9/24","gateway":null,"interface":null}],
			"routes":[{"dst":"0.0.0.0/0","gw":null,"mtu":null,"advmss":null,"priority":null,"table":null,"scope":null}],
			"dns":{"nameservers":null,"domain":null,"search":null,"options":null}}`,
	} {
		conf := beside(n.conf(""), `"prevResult":`+previous)
		out := n.must(attach("ADD", "c1", pod, conf))
		n.must(attach("CHECK", "c1", pod, n.previous(n.conf(""), out)))
		n.must(attach("DEL", "c1", pod, conf))
		n.empty()
	}
	// What no result may lack is no null to be passed over, nor to be passed on.
	for _, previous := range []string{`{"ips":[{}]}`, `{"ips":[{"address":null}]}`, `{"ips":[null]}`, `{"routes":[{}]}`, `{"routes":[{"dst":null}]}`, `{"interfaces":[null]}`} {
		c := attach("ADD", "c1", pod, beside(n.conf(""), `"prevResult":`+previous))
		n.fails(c, 7, "prevResult")
		n.empty()
		c.verb = "DEL"
		n.must(c)
	}
}

// TestGCByItsFirstName: the specification as released with 1.1.0 says cni.dev/attachments, and later cni.dev/valid-attachments.
func TestGCByItsFirstName(t *testing.T) {
	for _, program := range []string{"headcni", "headcni-ipam"} {
		n := newNode(t)
		for _, id := range []string{"c1", "c2"} {
			n.must(attach("ADD", id, nstest.New(t), n.conf("")))
		}
		c := call{program: program, verb: "GC", conf: n.conf(`{"cni.dev/attachments":[{"containerID":"c1","ifname":"eth0"}]}`)}
		n.must(c)
		n.wantOwners("c1")
	}
}

// TestGCOfNothing: a runtime that knows of no attachment, as CRI-O at its start, may give a nil list.
func TestGCOfNothing(t *testing.T) {
	n, pod := newNode(t), nstest.New(t)
	l := n.list("", n.headcni(""))
	n.add(l, rt("c1", pod, nil))
	remove(t, n.cache) // or libcni itself would send DEL
	if err := n.cni().GCNetworkList(t.Context(), l, &libcni.GCArgs{}); err != nil {
		t.Fatal(err)
	}
	if calls := n.made(); !strings.Contains(calls[len(calls)-1].conf, `"cni.dev/valid-attachments":null`) {
		t.Errorf("libcni does not write null any more: %s", calls[len(calls)-1].conf)
	}
	n.empty()
	c := attach("ADD", "c1", pod, n.conf(""))
	c.program = "headcni-ipam"
	n.must(c)
	c.verb, c.conf = "GC", beside(n.conf(""), `"cni.dev/valid-attachments":null`)
	n.must(c)
	n.empty()
	for _, program := range []string{"headcni", "headcni-ipam"} { // without the key nothing is known to be stale
		c := attach("GC", "", nil, n.conf(""))
		c.program = program
		n.fails(c, 7, "cni.dev/valid-attachments")
	}
}

// TestInjected: what meta-plugins and runtimes put into the configuration is no reason to refuse a pod; what somebody has mistyped is.
func TestInjected(t *testing.T) {
	n, pod := newNode(t), nstest.New(t)
	for _, members := range []string{
		`"deviceID":"0000:03:00.0","pciBusID":"0000:03:00.0"`, // multus, where the pod has a device
		`"args":{"cni":{"labels":{"a":"b"}},"io.kubernetes.cri":{}}`,
		`"runtimeConfig":{"deviceID":"0000:03:00.0","CNIDeviceInfoFile":"/x","infinibandGUID":"c2:11:22:33:44:55:66:77","cgroupPath":"/x","aliases":{"net":["a"]}}`,
		`"capabilities":{"deviceID":true,"CNIDeviceInfoFile":true,"io.kubernetes.cri.pod-annotations":true}`,
		`"cniArgs":{"a":"b"},"ipamConfig":{"subnet":"10.1.0.0/16"}`, `"cni.dev/of-a-later-version":[1,2]`, `"k8s.v1.cni.cncf.io/networks":"[]"`,
		`"disableCheck":"false","disableGC":"false","loadOnlyInlinedPlugins":true,"cniVersions":["1.1.0"]`,
	} {
		n.attachAll(pod, beside(n.conf(""), members))
	}
	for member, like := range map[string]string{
		`"mut":1280`: "mtu", `"podCIDR":"10.244.1.0/24"`: "pod_cidr", `"magicDNS":{"enable":true}`: "magic_dns", `"enable_ip6":true`: "enable_ipv6",
		`"runtime_config":{}`: "runtimeConfig", `"log-level":"info"`: "log_level", `"headscale":"https://x"`: "headscale_url",
	} {
		n.fails(attach("ADD", "c1", pod, beside(n.conf(""), member)), 2, "unknown key", "did you mean "+like+"?")
	}
	n.fails(attach("ADD", "c1", pod, beside(n.conf(""), `"vlan":7`)), 2, "vlan: unknown key (value 7)")
	n.empty()
}
