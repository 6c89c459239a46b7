package conformance

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nstest"
)

// hostState is what a plugin could change on a node, besides files, line by line.
func (n *node) hostState() []string {
	n.t.Helper()
	return strings.Split(n.host.Run(n.t, "sh", "-c", `ip -d link; ip addr; for f in -4 -6; do ip $f rule; ip $f route show table all; ip $f neigh; done
		grep -rs . /proc/sys/net/ipv4 /proc/sys/net/ipv6 | sort`), "\n")
}

// hostile is a call that no runtime should make.
type hostile struct {
	name   string
	change func(*call)
	code   uint     // of ADD; 0: it works
	words  []string // of ADD's error
}

// spoilt lists hostile calls for an attachment of pod.
func (n *node) spoilt(pod *nstest.NS) []hostile {
	n.t.Helper()
	dir := n.t.TempDir()
	file, fifo, link, socket := filepath.Join(dir, "file"), filepath.Join(dir, "fifo"), filepath.Join(dir, "link"), filepath.Join(dir, "socket")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		n.t.Cleanup(func() { unix.Close(fd) })
		err = unix.Bind(fd, &unix.SockaddrUnix{Name: socket})
	}
	for _, err := range []error{os.WriteFile(file, nil, 0o600), unix.Mkfifo(fifo, 0o600), os.Symlink(pod.Path, link), err} {
		if err != nil {
			n.t.Fatal(err)
		}
	}
	var list []hostile
	add := func(field string, code uint, word string, values ...string) {
		for _, v := range values {
			list = append(list, hostile{fmt.Sprintf("%s=%.40q", field, v), func(c *call) {
				*map[string]*string{"netns": &c.netns, "ifName": &c.ifName, "id": &c.id, "args": &c.args}[field] = v
			}, code, []string{word}})
		}
	}
	add("netns", 8, "node's own", n.host.Path, "/proc/self/ns/net", "/proc/thread-self/ns/net", filepath.Dir(n.host.Path)+"/../netns/"+n.host.Name)
	add("netns", 8, "absolute path", strings.TrimPrefix(pod.Path, "/"), "../../../.."+pod.Path, "./x", "x")
	add("netns", 8, "not a namespace", file, fifo, socket, dir, "/", "/dev/null", "/dev/zero")
	add("netns", 8, "namespace", "/proc/self/ns/mnt", "/proc/self/ns/user", "/proc/self/ns/pid")
	add("netns", 8, "no such file", "/run/netns/none", "/run/netns/"+strings.Repeat("../netns/", 200)+"none")
	add("netns", 4, "CNI_NETNS", "")
	add("netns", 0, "", "/run/netns/../netns/"+pod.Name, link)
	add("ifName", 104, "exists", "lo")
	add("ifName", 4, "CNI_IFNAME", "", ".", "..", "a/b", "../x", "a b", "a\tb", "a\nb", "eth0:1", "%d", "all", "default", "a\xff", "a\x01", strings.Repeat("x", 16),
		strings.Repeat("x", 100_000))
	add("id", 4, "CNI_CONTAINERID", "", "..", "../x", "a/b", "a\nb", "a b", "-", ".", "a\xff", "%s")
	add("id", 4, "shorter container ID", strings.Repeat("x", 5000), strings.Repeat("x", 100_000))
	add("args", 4, "CNI_ARGS", "x", "IP=x", "IP=10.244.1.300", "MAC=zz", "IP=,", strings.Repeat("x", 100_000))
	add("args", 0, "", ";;;", "=;K8S_POD_NAME=a b/../\n\x01;K8S_POD_NAMESPACE=\xff", "K8S_POD_NAME="+strings.Repeat("x", 100_000), "../../x=/etc/passwd")
	return list
}

// TestHostileEnvironment: what a runtime, or who poses as one, puts into the environment is refused with a reason or does what it says,
// and nothing of the node is touched, whichever namespace it names; nor is another pod.
func TestHostileEnvironment(t *testing.T) {
	n, pod, other := newNode(t), nstest.New(t), nstest.New(t)
	conf := n.conf(`{"cni.dev/valid-attachments":[{"containerID":"other","ifname":"eth0"},{"containerID":"c1","ifname":"eth0"}]}`)
	n.host.Run(t, "ip", "link", "add", "eth0", "type", "veth", "peer", "name", "uplink") // it has the name of pods' own
	for _, line := range []string{"link set eth0 up addrgenmode none", "link set uplink up addrgenmode none", "addr add 198.51.100.2/24 dev eth0", "route add default via 198.51.100.1"} {
		n.host.Run(t, "ip", strings.Fields(line)...)
	}
	result := n.must(attach("ADD", "other", other, conf))
	n.must(attach("DEL", "c1", pod, conf))
	before := n.hostState()
	for _, h := range n.spoilt(pod) {
		t.Run(h.name, func(t *testing.T) {
			c := attach("ADD", "c1", pod, conf)
			h.change(&c)
			out, f := n.run(c)
			switch {
			case h.code == 0 && f != nil:
				t.Fatalf("ADD: %v", f)
			case h.code != 0 && f == nil:
				t.Fatalf("ADD works: %s", out)
			case f != nil && (f.Code != h.code || !strings.Contains(f.Error(), h.words[0])):
				t.Errorf("ADD: %v, want code %d and %q", f, h.code, h.words)
			case f != nil && len(f.Error()) > 20_000:
				t.Errorf("ADD: an error of %d bytes", len(f.Error()))
			}
			c.verb = "CHECK"
			if c.conf = n.previous(conf, result); out != "" {
				c.conf = n.previous(conf, out)
			}
			if _, f := n.run(c); (f == nil) != (h.code == 0) {
				t.Errorf("CHECK: %v", f)
			}
			c.conf = conf
			for _, verb := range []string{"GC", "STATUS"} {
				c.verb = verb
				if _, f := n.run(c); f != nil && f.Code != 4 {
					t.Errorf("%s: %v", verb, f)
				}
			}
			c.verb = "DEL"
			if _, f := n.run(c); f != nil && f.Code != 4 {
				t.Errorf("DEL: %v", f)
			}
			if diff := cmp.Diff(before, n.hostState()); diff != "" {
				t.Errorf("the node has changed: %s", diff)
			}
		})
	}
	n.must(attach("CHECK", "other", other, n.previous(conf, result)))
	n.must(attach("DEL", "other", other, conf))
	n.empty()
}

// TestFirstProcess: a plugin that runs in a namespace inside the machine's, as on a node of kind, puts nothing into the machine's.
func TestFirstProcess(t *testing.T) {
	n, inner := newNode(t), nstest.New(t)
	n.wrap = []string{"unshare", "--pid", "--fork", "--mount-proc", "sh", "-c", `nsenter --net=` + inner.Path + ` "$0"; exit $?`}
	before := n.hostState()
	c := attach("ADD", "c1", nil, n.conf(""))
	c.netns = "/proc/1/ns/net"
	n.fails(c, 8, "first process")
	c.verb = "DEL"
	n.must(c)
	if diff := cmp.Diff(before, n.hostState()); diff != "" {
		t.Errorf("the machine has changed: %s", diff)
	}
}

// TestHostilePath: a plugin that we run as root is one that only root could have put there.
func TestHostilePath(t *testing.T) {
	n, pod := newNode(t), nstest.New(t)
	conf := n.conf(`{"ipam":{"type":"my-ipam"}}`)
	dir := n.script("my-ipam", `touch $d/ran; [ $CNI_COMMAND = ADD ] && echo '{"ips":[{"address":"10.9.0.5/24"}]}'; true`)
	ran := func() bool { defer os.Remove(filepath.Join(dir, "ran")); return exists(filepath.Join(dir, "ran")) }
	own := n.path[0]
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	relative, err := filepath.Rel(here, dir)
	if err != nil {
		t.Fatal(err)
	}
	c := attach("ADD", "c1", pod, conf)
	n.path = []string{own, dir}
	chmod := func(path string, mode os.FileMode) {
		t.Helper()
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	program := filepath.Join(dir, "my-ipam")
	for name, modes := range map[string][2]os.FileMode{
		"folder": {0o777, 0o755}, "sticky folder": {0o777 | os.ModeSticky, 0o755}, "program": {0o755, 0o757},
	} {
		chmod(dir, modes[0])
		chmod(program, modes[1])
		n.fails(c, 100, "anybody may write", "chmod o-w")
		if ran() {
			t.Errorf("%s that anybody may write: it was run", name)
		}
	}
	chmod(dir, 0o755)
	chmod(program, 0o755)
	for _, path := range [][]string{{own, relative}, {own, "."}, {own, "", ""}, {own, strings.Repeat("/x:", 30_000)}, {own, program}} {
		n.path = path
		n.fails(c, 100, "none of the folders of CNI_PATH")
		if ran() {
			t.Errorf("CNI_PATH %.100q: it was run", path)
		}
	}
	n.path = []string{own, "", relative, dir}
	n.must(c)
	if !ran() {
		t.Error("it was not run")
	}
	c.verb = "DEL"
	n.must(c)
	n.empty()
}
