package conformance

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"

	"github.com/headcni/headcni/internal/nstest"
)

// TestGC: what is not valid goes, whether the runtime still knows of it or not. All else stays.
func TestGC(t *testing.T) {
	n := newNode(t)
	l := n.list("", n.headcni(""))
	pods := map[string]*nstest.NS{}
	for _, id := range []string{"c1", "c2", "c3"} {
		pods[id] = nstest.New(t)
		n.add(l, rt(id, pods[id], nil))
	}
	n.host.Run(t, "ip", "link", "add", "hc0123456789", "type", "veth", "peer", "name", "other") // of nobody
	other := n.list(`{"name":"other"}`, n.headcni(""))
	n.add(other, rt("c4", nstest.New(t), nil))
	valid := func(ids ...string) *libcni.GCArgs {
		a := &libcni.GCArgs{ValidAttachments: []types.GCAttachment{}}
		for _, id := range ids {
			a.ValidAttachments = append(a.ValidAttachments, types.GCAttachment{ContainerID: id, IfName: "eth0"})
		}
		return a
	}
	disabled := n.list(`{"disableGC":true}`, n.headcni(""))
	if err := n.cni().GCNetworkList(t.Context(), disabled, valid()); err != nil || len(n.leases()) != 3 {
		t.Errorf("disableGC: %v, %d leases", err, len(n.leases()))
	}
	if err := n.cni().GCNetworkList(t.Context(), l, valid("c1", "c3")); err != nil { // libcni sends DEL for c2 first
		t.Error(err)
	}
	n.wantOwners("c1", "c3")
	remove(t, n.cache) // a runtime that has forgotten: GC has to do it
	n.made()
	if err := n.cni().GCNetworkList(t.Context(), l, valid("c1")); err != nil {
		t.Error(err)
	}
	if calls := n.made(); len(calls) != 1 || calls[0].verb != "GC" || calls[0].out != "" {
		t.Errorf("calls: %+v", calls)
	}
	n.wantOwners("c1")
	if links := n.links(); len(links) != 3 { // c1's, nobody's, the other network's
		t.Errorf("links: %s", links)
	}
	out := n.must(attach("ADD", "c5", pods["c2"], n.conf("")))
	n.must(attach("CHECK", "c5", pods["c2"], n.previous(n.conf(""), out)))
	if err := n.cni().GCNetworkList(t.Context(), l, valid()); err != nil {
		t.Error(err)
	}
	n.wantOwners()
	n.host.Run(t, "ip", "link", "show", "dev", "hc0123456789")
}

func (n *node) wantOwners(ids ...string) {
	n.t.Helper()
	var have []string
	for _, l := range n.leases() {
		have = append(have, l.ContainerID)
	}
	slices.Sort(have)
	if !slices.Equal(have, ids) {
		n.t.Errorf("leases of %s, want %s", have, ids)
	}
}

// TestGCGoesOn: an IPAM plugin that fails does not keep the links, and its error is told.
func TestGCGoesOn(t *testing.T) {
	n, pod := newNode(t), nstest.New(t)
	n.script("sick", `[ $CNI_COMMAND = ADD ] && { echo '{"ips":[{"address":"10.9.0.5/24"}]}'; exit; }; echo '{"code":123,"msg":"sick"}'; exit 1`)
	conf := n.conf(`{"ipam":{"type":"sick"},"cni.dev/valid-attachments":[]}`)
	n.must(attach("ADD", "c1", pod, conf))
	n.fails(attach("GC", "", nil, conf), 123, "sick")
	if l := n.links(); len(l) > 0 {
		t.Errorf("links left: %s", l)
	}
	n.fails(attach("GC", "", nil, n.conf("")), 7, "cni.dev/valid-attachments")
}

// script puts an IPAM plugin into CNI_PATH that notes what it was given.
func (n *node) script(name, body string) (dir string) {
	n.t.Helper()
	dir = n.t.TempDir()
	text := "#!/bin/sh\nd=$(dirname $0)\nenv >$d/env.$CNI_COMMAND\ncat >$d/stdin.$CNI_COMMAND\n" + body + "\n"
	if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755); err != nil {
		n.t.Fatal(err)
	}
	n.path = append(n.path, dir)
	return dir
}

// TestDelegation: the IPAM plugin gets every command with the same environment and configuration; its standard error and
// its errors come through.
func TestDelegation(t *testing.T) {
	n, pod := newNode(t), nstest.New(t)
	n.env = []string{"FOREIGN=kept", "TRACEPARENT=00-1"}
	dir := n.script("my-ipam", `echo "words of my-ipam" >&2
		[ -e $d/sick ] && { echo '{"code":50,"msg":"sick"}'; exit 1; }
		[ $CNI_COMMAND = ADD ] && echo '{"ips":[{"address":"10.9.0.5/24"}]}'; true`)
	conf := n.conf(`{"ipam":{"type":"my-ipam","of":{"its":"own"}},"cni.dev/valid-attachments":[{"containerID":"c1","ifname":"eth0"}],
		"runtimeConfig":{"x":1},"args":{"y":2}}`)
	out := ""
	for _, verb := range []string{"ADD", "CHECK", "STATUS", "GC", "DEL"} {
		c := attach(verb, "c1", pod, conf)
		c.args = "IgnoreUnknown=1;A=B"
		if verb == "CHECK" {
			c.conf = n.previous(conf, out)
		}
		c = n.start(t.Context(), c)
		if answer, f := c.answer(t); f != nil || c.stderr != "words of my-ipam\n" {
			t.Errorf("%s: %v, standard error %q", verb, f, c.stderr)
		} else if verb == "ADD" {
			out = answer
		}
		if stdin, err := os.ReadFile(filepath.Join(dir, "stdin."+verb)); err != nil || string(stdin) != c.conf {
			t.Errorf("%s: it got %s, %v", verb, stdin, err)
		}
		env, err := os.ReadFile(filepath.Join(dir, "env."+verb))
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range append(c.environ(n.path), n.env...) {
			if !slices.Contains(strings.Split(string(env), "\n"), want) {
				t.Errorf("%s: no %s in its environment:\n%s", verb, want, env)
			}
		}
		if err := os.WriteFile(filepath.Join(dir, "sick"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if verb != "ADD" { // which would fail for the interface
			n.fails(c, map[string]uint{"CHECK": 50, "STATUS": 50, "GC": 50, "DEL": 50}[verb], "sick")
		}
		remove(t, filepath.Join(dir, "sick"))
	}
	n.empty()
}

// TestStatus: through libcni, for each kind of IPAM; a full pool is no fault of the node (docs/adr/0011-full-pool.md).
func TestStatus(t *testing.T) {
	n, pod := newNode(t), nstest.New(t)
	status := func(l *libcni.NetworkConfigList, code uint) {
		t.Helper()
		err := n.cni().GetStatusNetworkList(t.Context(), l)
		var e *types.Error
		if code == 0 && err != nil || code != 0 && (!errors.As(err, &e) || e.Code != code) {
			t.Errorf("%s: got %v, want code %d", l.Bytes, err, code)
		}
	}
	status(n.list("", n.headcni("")), 0)
	n.script("sick", `echo '{"code":50,"msg":"sick"}'; exit 1`)
	sick := n.headcni(`{"ipam":{"type":"sick"}}`)
	status(n.list("", sick), 50)
	status(n.list(`{"cniVersion":"1.0.0"}`, sick), 0) // which has no STATUS
	status(n.list("", n.headcni(`{"ipam":{"type":"nowhere"}}`)), 50)
	status(n.list("", n.headcni(`{"gate":{"podCIDRs":["10.244.1.0/24","fd00:244:1::/64"]}}`)), 50)
	small := n.list("", n.headcni(`{"ipam":`+n.pool("10.244.1.0/30")+`}`))
	n.add(small, rt("c1", pod, nil))
	if _, err := n.cni().AddNetworkList(t.Context(), small, rt("c2", nstest.New(t), nil)); err == nil {
		t.Error("the pool is not full")
	}
	status(small, 0)
	n.del(small, rt("c1", pod, nil))
	// STATUS decides nothing: ADD and DEL come all the same.
	n.must(attach("ADD", "c3", pod, n.conf("")))
	n.must(attach("DEL", "c3", pod, n.conf("")))
	n.empty()
}

// TestVersionSelection: the runtime takes the highest version of a list that both know.
func TestVersionSelection(t *testing.T) {
	n, pod := newNode(t), nstest.New(t)
	for _, tt := range []struct{ keys, want string }{
		{`{"cniVersion":"0.4.0","cniVersions":["0.4.0","1.0.0","1.1.0"]}`, "1.1.0"},
		{`{"cniVersion":"0.3.1","cniVersions":["0.4.0"]}`, "0.4.0"},
		{`{"cniVersion":"1.0.0"}`, "1.0.0"},
		{`{"cniVersion":"0.3.0"}`, "0.3.0"},
	} {
		l := n.list(tt.keys, n.headcni(`{"capabilities":{"mac":true,"ips":true,"dns":false}}`))
		caps, err := n.cni().ValidateNetworkList(t.Context(), l)
		slices.Sort(caps)
		if err != nil || !slices.Equal(caps, []string{"ips", "mac"}) {
			t.Errorf("capabilities %v, %v", caps, err)
		}
		if got := n.add(l, rt("c1", pod, nil)); got.CNIVersion != tt.want {
			t.Errorf("%s: result of %s, want %s", tt.keys, got.CNIVersion, tt.want)
		}
		n.del(l, rt("c1", pod, nil))
	}
	for _, version := range []string{"0.2.0", "0.1.0", "2.0.0"} {
		l := n.list(`{"cniVersion":"`+version+`"}`, n.headcni(""))
		if _, err := n.cni().ValidateNetworkList(t.Context(), l); err == nil {
			t.Errorf("version %s passes", version)
		}
	}
	info, err := n.cni().GetVersionInfo(t.Context(), "headcni")
	if err != nil || !slices.Equal(info.SupportedVersions(), versions) {
		t.Errorf("got %v, %v", info, err)
	}
	n.empty()
}

// TestShippedConflist: the file as it is installed, by libcni.
func TestShippedConflist(t *testing.T) {
	n, pod := newNode(t), nstest.New(t)
	l, err := libcni.NetworkConfFromFile("../../10-headcni.conflist")
	if err != nil || l.CNIVersion != "1.1.0" {
		t.Fatalf("got %+v, %v", l, err)
	}
	if err := n.cni().GetStatusNetworkList(t.Context(), l); err != nil {
		t.Error(err)
	}
	got := n.add(l, rt("c1", pod, nil))
	if err := n.check(l, rt("c1", pod, nil)); err != nil {
		t.Error(err)
	}
	ping(t, n.host, got.addrs()...)
	n.del(l, rt("c1", pod, nil))
	if err := n.cni().GCNetworkList(t.Context(), l, &libcni.GCArgs{ValidAttachments: []types.GCAttachment{}}); err != nil {
		t.Error(err)
	}
	n.empty()
}

// TestErrorResults: each well-known code in its place, in the form of section 5 and the version that was asked in.
func TestErrorResults(t *testing.T) {
	n, pod := newNode(t), nstest.New(t)
	with := func(c call, change func(*call)) call { change(&c); return c }
	good := attach("ADD", "c1", pod, n.conf(`{"cniVersion":"1.0.0"}`))
	for _, tt := range []struct {
		name  string
		c     call
		code  uint
		words []string // in the message itself
	}{
		{"incompatible version", with(good, func(c *call) { c.conf = n.conf(`{"cniVersion":"0.2.0"}`) }), 1, []string{"incompatible"}},
		{"unsupported field", with(good, func(c *call) { c.conf = n.with(c.conf, `{"mut":1280}`) }), 2, []string{"mut", "1280"}},
		{"environment", with(good, func(c *call) { c.id, c.netns = "", "" }), 4, []string{"CNI_CONTAINERID", "CNI_NETNS"}},
		{"no command", with(good, func(c *call) { c.verb = "" }), 4, []string{"CNI_COMMAND"}},
		{"command", with(good, func(c *call) { c.verb = "FETCH" }), 4, []string{"CNI_COMMAND"}},
		{"CNI_ARGS", with(good, func(c *call) { c.args = "IP=x" }), 4, []string{"CNI_ARGS"}},
		{"decoding", with(good, func(c *call) { c.conf = "{" }), 6, nil},
		{"configuration", with(good, func(c *call) { c.conf = n.with(c.conf, `{"mtu":1}`) }), 7, nil},
		{"namespace", with(good, func(c *call) { c.netns = "/run/netns/none" }), 8, nil},
		{"try again", with(good, func(c *call) { c.conf = n.with(c.conf, `{"gate":{"podCIDRs":["10.244.0.0/16","fd00:244::/32"]}}`) }), 11, nil},
		{"not available", with(good, func(c *call) {
			c.verb, c.conf = "STATUS", n.with(c.conf, `{"cniVersion":"1.1.0","gate":{"podCIDRs":["10.244.0.0/16","fd00:244::/32"]}}`)
		}), 50, nil},
		{"our own", with(good, func(c *call) { c.conf = n.with(c.conf, `{"ipam":{"type":"nowhere"}}`) }), 100, nil},
	} {
		_, f := n.run(tt.c)
		if f == nil || f.Code != tt.code {
			t.Errorf("%s: got %v, want code %d", tt.name, f, tt.code)
			continue
		}
		want := "1.0.0"
		switch tt.code {
		case 1:
			want = "0.2.0"
		case 6, 50:
			want = "1.1.0"
		}
		if f.CNIVersion != want {
			t.Errorf("%s: the error is of version %q, want %q", tt.name, f.CNIVersion, want)
		}
		for _, w := range tt.words {
			if !strings.Contains(f.Msg, w) {
				t.Errorf("%s: no %q in the message %q", tt.name, w, f.Msg)
			}
		}
	}
	n.empty()
}

// TestNothingLeaksOut: neither the configuration nor a secret in it comes out, however wrong it is.
func TestNothingLeaksOut(t *testing.T) {
	n, pod := newNode(t), nstest.New(t)
	const s = "s3cr3t-v4lue"
	for _, program := range []string{"headcni", "headcni-ipam"} {
		for _, verb := range []string{"ADD", "CHECK", "DEL", "GC", "STATUS", "VERSION", "FETCH"} {
			for _, conf := range []string{
				s, `{"` + s, `["` + s + `"]`, `"` + s + `"`, `{"cniVersion":"1.1.0","name":"net","auth_key":"` + s + `",}`,
				n.conf(`{"auth_key":"` + s + `"}`), n.conf(`{"auth_key":["` + s + `"]}`), n.conf(`{"authkey":"` + s + `"}`),
				n.conf(`{"auth_key":"` + s + `","mtu":1}`), n.conf(`{"name":{"auth_key":"` + s + `"}}`), n.conf(`{"magic_dns":{"auth_key":"` + s + `"}}`),
				n.conf(`{"mtu":{"password":"` + s + `"}}`), n.conf(`{"auth_key":"` + s + `","log_level":"debug","unknown":1}`),
				n.conf(`{"auth_key":"` + s + `","log_level":"debug","prevResult":{"cniVersion":"1.1.0","x":"` + s + `"}}`),
			} {
				c := attach(verb, "c1", pod, conf)
				c.program = program
				c = n.start(t.Context(), c)
				c.answer(t)
				if strings.Contains(c.out+c.stderr, s) {
					t.Errorf("%s %s of %s: %q, %q", program, verb, conf, c.out, c.stderr)
				}
				if verb == "ADD" {
					c.verb, c.conf = "DEL", n.conf("")
					n.must(c)
				}
			}
		}
	}
	n.empty()
}

// TestLogs: standard output is the result's alone, whatever is logged where.
func TestLogs(t *testing.T) {
	n, pod := newNode(t), nstest.New(t)
	file := filepath.Join(t.TempDir(), "headcni.log")
	run := func(verb, keys string, env ...string) call {
		t.Helper()
		n.env = env
		c := n.start(t.Context(), attach(verb, "c1", pod, n.conf(keys)))
		if _, f := c.answer(t); f != nil {
			t.Errorf("%s %s: %v", verb, keys, f)
		}
		return c
	}
	for _, tt := range []struct {
		keys, env string
		stderr    bool
		file      bool
	}{
		{}, {keys: `{"log_level":"debug"}`, stderr: true}, {env: "HEADCNI_LOG_LEVEL=debug", stderr: true},
		{keys: `{"log_level":"debug"}`, env: "HEADCNI_LOG_LEVEL=error"}, // the environment goes first
		{keys: fmt.Sprintf(`{"log_level":"debug","log_file":%q}`, file), file: true},
		{keys: fmt.Sprintf(`{"log_file":%q}`, file)},
		{keys: `{"log_file":"/nonexistent/x.log"}`, stderr: true}, // said, and no reason to fail a pod
	} {
		for _, verb := range []string{"ADD", "DEL"} {
			c := run(verb, tt.keys, tt.env)
			text, err := os.ReadFile(file)
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				t.Fatal(err)
			}
			_ = os.Remove(file) // there may be none
			if (c.stderr != "") != tt.stderr || (len(text) > 0) != tt.file {
				t.Errorf("%s %s %s: standard error %q, file %q", verb, tt.keys, tt.env, c.stderr, text)
			}
			if tt.file && !bytes.Contains(text, []byte("container=c1")) {
				t.Errorf("no container in %s", text)
			}
		}
	}
	// Rotation: a file that is full becomes FILE.1, over the one before it.
	for range 2 {
		if err := os.WriteFile(file, bytes.Repeat([]byte("x"), 8<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		run("DEL", fmt.Sprintf(`{"log_level":"debug","log_file":%q}`, file))
		list, err := filepath.Glob(file + "*")
		if err != nil || len(list) != 2 {
			t.Errorf("files %s, %v", list, err)
		}
		if info, err := os.Stat(file); err != nil || info.Size() > 4096 || info.Mode().Perm() != 0o600 {
			t.Errorf("after rotation: %v, %v", info, err)
		}
	}
	n.empty()
}

// TestOutputIsJSON reads what ADD prints as strictly as can be: known keys only, no key twice.
func TestOutputIsJSON(t *testing.T) {
	n, pod := newNode(t), nstest.New(t)
	conf := n.conf(`{"dns":{"nameservers":["192.0.2.53"],"domain":"\u003cü\"\\>.example"}}`)
	out := n.must(attach("ADD", "c1", pod, conf))
	d := json.NewDecoder(strings.NewReader(out))
	d.DisallowUnknownFields()
	var r result
	if err := d.Decode(&r); err != nil || r.DNS.Domain != `<ü"\>.example` || !strings.HasSuffix(out, "\n") {
		t.Errorf("%v: %s", err, out)
	}
	n.must(attach("DEL", "c1", pod, conf))
}
