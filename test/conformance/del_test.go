package conformance

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nstest"
)

// TestDelIsLenient: whatever is missing or was changed since ADD, the attachment goes.
func TestDelIsLenient(t *testing.T) {
	for name, change := range map[string]func(n *node, pod *nstest.NS, c *call){
		"no netns":             func(_ *node, _ *nstest.NS, c *call) { c.netns = "" },
		"netns that never was": func(_ *node, _ *nstest.NS, c *call) { c.netns = "/run/netns/none" },
		"netns that is a file": func(_ *node, _ *nstest.NS, c *call) { c.netns = "/etc/hostname" },
		"netns of the node":    func(n *node, _ *nstest.NS, c *call) { c.netns = n.host.Path },
		"netns that has gone":  func(_ *node, pod *nstest.NS, _ *call) { end(t, pod) },
		"no prevResult":        func(n *node, _ *nstest.NS, c *call) { c.conf = n.with(c.conf, `{"prevResult":null}`) },
		"empty prevResult":     func(n *node, _ *nstest.NS, c *call) { c.conf = n.previous(c.conf, `{}`) },
		"prevResult is junk":   func(n *node, _ *nstest.NS, c *call) { c.conf = n.previous(c.conf, `["junk"]`) },
		"prevResult of another": func(n *node, _ *nstest.NS, c *call) {
			c.conf = n.previous(c.conf, `{"cniVersion":"9.9.9","ips":[{"address":"x"}]}`)
		},
		"unknown key":             func(n *node, _ *nstest.NS, c *call) { c.conf = n.with(c.conf, `{"no_longer":1}`) },
		"other ranges":            func(n *node, _ *nstest.NS, c *call) { c.conf = n.with(c.conf, `{"ipam":`+n.pool("10.9.0.0/24")+`}`) },
		"ranges that are wrong":   func(n *node, _ *nstest.NS, c *call) { c.conf = n.with(c.conf, `{"ipam":`+n.pool("x")+`}`) },
		"junk in CNI_ARGS":        func(_ *node, _ *nstest.NS, c *call) { c.args = "IP;MAC=junk" },
		"no CNI_PATH":             func(n *node, _ *nstest.NS, c *call) { c.args = "" },
		"junk as log level":       func(n *node, _ *nstest.NS, _ *call) { n.env = append(n.env, "HEADCNI_LOG_LEVEL=loud") },
		"log file in no folder":   func(n *node, _ *nstest.NS, c *call) { c.conf = n.with(c.conf, `{"log_file":"/nonexistent/x.log"}`) },
		"link removed by hand":    func(n *node, _ *nstest.NS, _ *call) { n.host.Run(t, "ip", "link", "del", n.links()[0]) },
		"interface moved by hand": func(n *node, pod *nstest.NS, _ *call) { pod.Run(t, "ip", "link", "set", "eth0", "name", "eth7") },
		"an address of its own":   func(n *node, pod *nstest.NS, _ *call) { pod.Run(t, "ip", "addr", "add", "10.9.9.9/24", "dev", "eth0") },
		"store removed by hand":   func(n *node, _ *nstest.NS, _ *call) { remove(t, filepath.Join(n.dataDir, "net")) },
		"an older cniVersion":     func(n *node, _ *nstest.NS, c *call) { c.conf = n.with(c.conf, `{"cniVersion":"0.3.1"}`) },
		"after a reboot": func(n *node, pod *nstest.NS, _ *call) {
			n.host.Run(t, "ip", "link", "del", n.links()[0]) // first: the kernel removes it soon after its pod's end
			end(t, pod)
			remove(t, n.dataDir)
		},
	} {
		t.Run(name, func(t *testing.T) {
			n, pod := newNode(t), nstest.New(t)
			conf := n.conf("")
			out := n.must(attach("ADD", "c1", pod, conf))
			c := attach("DEL", "c1", pod, n.previous(conf, out))
			change(n, pod, &c)
			n.must(c)
			n.empty()
			n.must(c) // any number of times
			n.empty()
		})
	}
}

// TestDelOfNothing: what was never added can be deleted, and leaves no trace.
func TestDelOfNothing(t *testing.T) {
	n, pod := newNode(t), nstest.New(t)
	for _, program := range []string{"headcni", "headcni-ipam"} {
		c := attach("DEL", "never", pod, n.conf(""))
		c.program = program
		n.must(c)
		c.netns = ""
		n.must(c)
	}
	n.empty()
	if list, err := os.ReadDir(n.dataDir); err != nil || len(list) > 0 {
		t.Errorf("DEL has made %v, %v", list, err)
	}
}

// TestFailedAddIsDeleted: a runtime sends DEL after an ADD that failed.
func TestFailedAddIsDeleted(t *testing.T) {
	n, pod := newNode(t), nstest.New(t)
	for i, keys := range []string{`{"unknown":1}`, `{"mtu":1}`, `{"ipam":{"type":"nowhere"}}`, fmt.Sprintf(`{"ipam":%s}`, n.pool("10.244.1.0/32"))} {
		id := fmt.Sprintf("c%d", i)
		if _, f := n.run(attach("ADD", id, pod, n.conf(keys))); f == nil {
			t.Errorf("%s: ADD succeeds", keys)
		}
		n.empty()
		if i != 2 { // an IPAM plugin that is not there cannot release
			n.must(attach("DEL", id, pod, n.conf(keys)))
		}
	}
}

func end(t testing.TB, pod *nstest.NS) {
	t.Helper()
	pod.Handle.Close() // it keeps the namespace alive
	if err := unix.Unmount(pod.Path, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	remove(t, pod.Path)
}

func remove(t testing.TB, path string) {
	t.Helper()
	if err := os.RemoveAll(path); err != nil {
		t.Fatal(err)
	}
}
