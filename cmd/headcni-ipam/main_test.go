package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"github.com/headcni/headcni/internal/cnimain"
	"github.com/headcni/headcni/internal/nstest"
)

const asPlugin = "HEADCNI_IPAM_TEST_PLUGIN"

// TestMain lets this binary be the plugin: the tests run it as a runtime would.
func TestMain(m *testing.M) {
	if os.Getenv(asPlugin) != "" {
		main()
		os.Exit(0)
	}
	if path := os.Getenv(asHolder); path != "" {
		hold(path)
	}
	nstest.Main(m)
}

// call runs the plugin as a process. The error is what it printed.
type call struct {
	command, id, args string
	conf              string
}

func (c call) run(t testing.TB) (string, *types.Error) {
	t.Helper()
	return c.runBy(t)
}

// runBy has the plugin run by another program, which gets its path as last argument.
func (c call) runBy(t testing.TB, program ...string) (string, *types.Error) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	argv := append(program, self)
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), asPlugin + "=1", "CNI_COMMAND=" + c.command, "CNI_CONTAINERID=" + c.id, "CNI_NETNS=/var/run/netns/none", "CNI_IFNAME=eth0",
		"CNI_PATH=/opt/cni/bin", "CNI_ARGS=" + c.args,
		"GORACE=atexit_sleep_ms=0"} // or a process with the race detector sleeps for a second before it exits
	cmd.Stdin = strings.NewReader(c.conf)
	var out, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &stderr
	err = cmd.Run()
	if stderr.Len() > 0 {
		t.Errorf("%+v: on standard error: %s", c, stderr.String())
	}
	if err == nil {
		return out.String(), nil
	}
	var exit *exec.ExitError
	var e types.Error
	if !errors.As(err, &exit) || exit.ExitCode() != 1 {
		t.Fatalf("%+v: %v", c, err)
	}
	if err := json.Unmarshal(out.Bytes(), &e); err != nil || e.Msg == "" {
		t.Fatalf("%+v: %q is no error object: %v", c, out.String(), err)
	}
	return "", &e
}

func conf(version, dir, ipam, more string) string {
	return fmt.Sprintf(`{"cniVersion": %q, "name": "net", "type": "bridge", "ipam": {"type": "headcni-ipam", "dataDir": %q, %s}%s}`, version, dir, ipam, more)
}

const dual = `"ranges": [[{"subnet": "10.0.0.0/29"}], [{"subnet": "fd00::/64"}]], "routes": [{"dst": "0.0.0.0/0"}]`

func mustRun(t testing.TB, c call) string {
	t.Helper()
	out, err := c.run(t)
	if err != nil {
		t.Fatalf("%s %s: %v", c.command, c.id, err)
	}
	return out
}

func wantCode(t testing.TB, c call, code uint, text string) {
	t.Helper()
	out, err := c.run(t)
	if err == nil || err.Code != code || !strings.Contains(err.Error(), text) {
		t.Errorf("%s %s: %s%v, want code %d and %q", c.command, c.id, out, err, code, text)
	}
}

func TestVerbsInEveryVersion(t *testing.T) {
	for _, version := range cnimain.Versions() {
		dir := t.TempDir()
		c := conf(version, dir, dual, "")
		out := mustRun(t, call{"ADD", "a", "K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0", c})
		var result struct {
			CNIVersion string
			IPs        []struct{ Version, Address, Gateway string }
			Routes     []struct{ Dst string }
			Interfaces []any
		}
		if err := json.Unmarshal([]byte(out), &result); err != nil {
			t.Fatal(err)
		}
		if result.CNIVersion != version || len(result.IPs) != 2 || result.IPs[0].Address != "10.0.0.2/29" || result.IPs[0].Gateway != "10.0.0.1" ||
			result.IPs[1].Address != "fd00::2/64" || len(result.Routes) != 1 || result.Interfaces != nil {
			t.Errorf("%s: %s", version, out)
		}
		prev := conf(version, dir, dual, `, "prevResult": {"ips": [{"address": "10.0.0.2/32"}, {"address": "fd00::2/128"}]}`)
		wrong := conf(version, dir, dual, `, "prevResult": {"ips": [{"address": "10.0.0.3/29"}, {"address": "fd00::2/64"}]}`)
		if version < "0.4.0" {
			wantCode(t, call{"CHECK", "a", "", c}, types.ErrIncompatibleCNIVersion, "CHECK")
		} else {
			mustRun(t, call{"CHECK", "a", "", c})
			mustRun(t, call{"CHECK", "a", "", prev})
			wantCode(t, call{"CHECK", "a", "", wrong}, codeNoLease, "10.0.0.2 is leased")
			wantCode(t, call{"CHECK", "b", "", c}, codeNoLease, "no lease")
		}
		wantCode(t, call{"ADD", "a", "", c}, codeHasLease, "10.0.0.2")
		for range 2 {
			if out := mustRun(t, call{"DEL", "a", "", c}); out != "" {
				t.Errorf("%s: DEL printed %q", version, out)
			}
		}
		if version < "1.1.0" {
			wantCode(t, call{"STATUS", "", "", c}, types.ErrIncompatibleCNIVersion, "STATUS")
		} else {
			mustRun(t, call{"STATUS", "", "", c})
		}
	}
}

func TestVersion(t *testing.T) {
	var v struct {
		CNIVersion        string
		SupportedVersions []string
	}
	if err := json.Unmarshal([]byte(mustRun(t, call{command: "VERSION"})), &v); err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(v.SupportedVersions) != fmt.Sprint(cnimain.Versions()) {
		t.Errorf("%v", v)
	}
}

func TestGC(t *testing.T) {
	dir := t.TempDir()
	c := conf("1.1.0", dir, dual, "")
	for _, id := range []string{"a", "b", "c"} {
		mustRun(t, call{"ADD", id, "", c})
	}
	wantCode(t, call{"GC", "", "", c}, types.ErrInvalidNetworkConfig, "valid-attachments")
	wantCode(t, call{"GC", "", "", conf("1.1.0", dir, dual, `, "cni.dev/valid-attachments": "all"`)}, types.ErrInvalidNetworkConfig, "valid-attachments")
	for _, item := range []string{`null`, `{"containerID": "a"}`} {
		wantCode(t, call{"GC", "", "", conf("1.1.0", dir, dual, `, "cni.dev/valid-attachments": [`+item+`]`)}, types.ErrInvalidNetworkConfig, "ifname")
	}
	for _, id := range []string{"a", "b", "c"} {
		mustRun(t, call{"CHECK", id, "", c})
	}
	mustRun(t, call{"GC", "", "", conf("1.1.0", dir, dual, `, "cni.dev/valid-attachments": [{"containerID": "b", "ifname": "eth0"}, {"containerID": "c", "ifname": "eth1"}]`)})
	mustRun(t, call{"CHECK", "b", "", c})
	for _, id := range []string{"a", "c"} {
		wantCode(t, call{"CHECK", id, "", c}, codeNoLease, "no lease")
	}
	for _, none := range []string{"[]", "null"} { // null is a nil list of Go
		mustRun(t, call{"GC", "", "", conf("1.1.0", dir, dual, `, "cni.dev/valid-attachments": `+none)})
		wantCode(t, call{"CHECK", "b", "", c}, codeNoLease, "no lease")
		mustRun(t, call{"ADD", "b", "", c})
	}
}

func TestRequestedAddresses(t *testing.T) {
	dir := t.TempDir()
	for id, c := range map[string]struct{ args, more, want string }{
		"a": {"IP=10.0.0.5", "", "10.0.0.5/29"},
		"b": {"", `, "args": {"cni": {"ips": ["10.0.0.6/29", "fd00::77"]}}`, "fd00::77/64"},
		"c": {"IgnoreUnknown=1", `, "runtimeConfig": {"ips": ["10.0.0.4"]}`, "10.0.0.4/29"},
	} {
		if out := mustRun(t, call{"ADD", id, c.args, conf("1.0.0", dir, dual, c.more)}); !strings.Contains(out, c.want) {
			t.Errorf("%s: %s lacks %s", id, out, c.want)
		}
	}
	wantCode(t, call{"ADD", "d", "IP=10.0.0.5", conf("1.0.0", dir, dual, "")}, codeInUse, "container a")
	wantCode(t, call{"ADD", "d", "IP=10.9.0.5", conf("1.0.0", dir, dual, "")}, codeNotInRange, "10.9.0.5")
	wantCode(t, call{"ADD", "d", "IP=x", conf("1.0.0", dir, dual, "")}, types.ErrInvalidEnvironmentVariables, "CNI_ARGS")
	mustRun(t, call{"ADD", "e", "", conf("1.0.0", dir, dual, "")})
	mustRun(t, call{"ADD", "f", "", conf("1.0.0", dir, dual, "")})
	wantCode(t, call{"ADD", "g", "", conf("1.0.0", dir, dual, "")}, codeExhausted, "10.0.0.0/29")
}

func TestErrorsAndUndo(t *testing.T) {
	dir := t.TempDir()
	good := conf("1.1.0", dir, dual, "")
	wantCode(t, call{"ADD", "a", "", conf("1.1.0", dir, `"subnet": "10.0.0.5/24"`, "")}, types.ErrInvalidNetworkConfig, "host bits")
	wantCode(t, call{"STATUS", "", "", conf("1.1.0", dir, `"strategy": "x"`, "")}, types.ErrInvalidNetworkConfig, "strategy")
	wantCode(t, call{"ADD", "a", "", `{"cniVersion": "1.1.0", "name": "net", "type": "bridge"}`}, types.ErrInvalidNetworkConfig, "no ipam")
	wantCode(t, call{"ADD", "a", "", conf("1.1.0", dir, dual+`, "resolvConf": "/nonexistent/resolv.conf"`, "")}, types.ErrInvalidNetworkConfig, "ipam.resolvConf: open /nonexistent/resolv.conf")
	wantCode(t, call{"ADD", "a", "", conf("1.1.0", dir, dual+`, "resolvConf": "/proc"`, "")}, types.ErrIOFailure, "is a directory")
	wantCode(t, call{"ADD", "a", "", conf("1.1.0", dir, dual+`, "strategie": "x"`, "")}, types.ErrUnsupportedField, `ipam.strategie: unknown key (value "x")`)
	wantCode(t, call{"ADD", "a", "", conf("1.1.0", dir, `"subnet": "10.0.0.0/24", "routes": [{"dst": "0.0.0.0/0", "mtu": -5}]`, "")}, types.ErrInvalidNetworkConfig, "ipam.routes[0].mtu: -5")
	wantCode(t, call{"ADD", strings.Repeat("a", 5000), "", good}, types.ErrInvalidEnvironmentVariables, "shorter container ID")
	wantCode(t, call{"CHECK", "a", "", good}, codeNoLease, "no lease")           // what ADD gave was taken back
	for _, key := range []string{"K8S_POD_NAME", "K8S_POD_NAMESPACE", "OTHER"} { // no pod fails for what is written down for people only
		mustRun(t, call{"ADD", "a", key + "=" + strings.Repeat("a", 5000), good})
		mustRun(t, call{"CHECK", "a", "", good})
		mustRun(t, call{"DEL", "a", "", good})
	}
	long := strings.Repeat("a", 2000)
	mustRun(t, call{"ADD", long, "", good})
	mustRun(t, call{"CHECK", long, "", good})
	mustRun(t, call{"DEL", long, "", good})
	wantCode(t, call{"CHECK", long, "", good}, codeNoLease, "no lease")

	mustRun(t, call{"ADD", "a", "", good})
	mustRun(t, call{"DEL", "a", "", conf("1.1.0", dir, `"strategy": "no longer known"`, "")}) // DEL needs no ranges
	wantCode(t, call{"CHECK", "a", "", good}, codeNoLease, "no lease")

	mustRun(t, call{"ADD", "a", "", good})
	layouts, err := filepath.Glob(filepath.Join(dir, "net", "*", "layout"))
	if err != nil || len(layouts) != 1 {
		t.Fatal(layouts, err)
	}
	if err := os.Truncate(layouts[0], 0); err != nil {
		t.Fatal(err)
	}
	wantCode(t, call{"ADD", "b", "", good}, codeCorrupt, "remove the folder")
	wantCode(t, call{"STATUS", "", "", good}, types.ErrPluginNotAvailable, filepath.Dir(layouts[0]))
}

// TestAddsOfOneAtOnce: one gets the lease, the others fail and leave it alone.
func TestAddsOfOneAtOnce(t *testing.T) {
	dir := t.TempDir()
	c := conf("1.1.0", dir, dual, "")
	for range 5 {
		won := make(chan string, 4)
		var wg sync.WaitGroup
		for range cap(won) {
			wg.Go(func() {
				if out, err := (call{"ADD", "a", "", c}).run(t); err == nil {
					won <- out
				} else if err.Code != codeHasLease {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if len(won) != 1 {
			t.Fatalf("%d won", len(won))
		}
		mustRun(t, call{"CHECK", "a", "", conf("1.1.0", dir, dual, `, "prevResult": `+<-won)})
		mustRun(t, call{"DEL", "a", "", c})
	}
}

func TestAddsAtOnce(t *testing.T) {
	dir := t.TempDir()
	c := conf("1.1.0", dir, `"subnet": "10.0.0.0/24", "strategy": "random"`, "")
	var mu sync.Mutex
	var wg sync.WaitGroup
	got := map[string]int{}
	const n = 60
	for i := range n {
		wg.Go(func() {
			out, err := call{"ADD", fmt.Sprint("c", i), "", c}.run(t)
			if err != nil {
				t.Error(err)
				return
			}
			r, parseErr := types100.NewResult([]byte(out))
			if parseErr != nil {
				t.Error(parseErr)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			got[r.(*types100.Result).IPs[0].Address.String()]++
		})
	}
	wg.Wait()
	if len(got) != n {
		t.Errorf("%d processes got %d different addresses: %v", n, len(got), got)
	}
}
