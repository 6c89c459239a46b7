package conformance

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/headcni/headcni/internal/nstest"
)

// onNode runs plugins for libcni, which plays the runtime (invoke.Exec). What it runs is noted and held like a bare call.
type onNode struct {
	version.PluginDecoder
	n *node
}

func (o *onNode) ExecPlugin(ctx context.Context, path string, stdin []byte, environ []string) ([]byte, error) {
	c := call{program: filepath.Base(path), conf: string(stdin)}
	var env []string
	for _, kv := range environ {
		if strings.HasPrefix(kv, "CNI_") { // the test's own variables are not the runtime's
			env = append(env, kv)
		}
		if name, ok := strings.CutPrefix(kv, "CNI_COMMAND="); ok {
			c.verb = name
		}
	}
	c.out, c.stderr, c.exit = o.n.exec(ctx, path, bytes.NewReader(stdin), env)
	o.n.mu.Lock()
	o.n.calls = append(o.n.calls, c)
	o.n.mu.Unlock()
	if c.exit == 0 {
		return []byte(c.out), nil
	}
	var reason types.Error
	if err := json.Unmarshal([]byte(c.out), &reason); err != nil || reason.Msg == "" {
		return nil, fmt.Errorf("%s %s: exit code %d: %q, %q", c.program, c.verb, c.exit, c.out, c.stderr)
	}
	return nil, &reason
}

func (o *onNode) FindInPath(plugin string, dirs []string) (string, error) {
	for _, dir := range dirs {
		if path := filepath.Join(dir, plugin); exists(path) {
			return path, nil
		}
	}
	return "", fmt.Errorf("no plugin %s in %s", plugin, dirs)
}

func (n *node) cni() *libcni.CNIConfig {
	return libcni.NewCNIConfigWithCacheDir(n.path, n.cache, &onNode{n: n})
}

// list is a network configuration of several plugins; keys are set beside them.
func (n *node) list(keys string, plugins ...string) *libcni.NetworkConfigList {
	n.t.Helper()
	conf := n.with(fmt.Sprintf(`{"cniVersion":"1.1.0","name":"net","plugins":[%s]}`, strings.Join(plugins, ",")), keys)
	l, err := libcni.NetworkConfFromBytes([]byte(conf))
	if err != nil {
		n.t.Fatalf("%s: %v", conf, err)
	}
	return l
}

// headcni is a plugin object of a list.
func (n *node) headcni(keys string) string {
	n.t.Helper()
	return n.with(fmt.Sprintf(`{"type":"headcni","mtu":1400,"ipam":%s}`, n.dual()), keys)
}

// rt is what kubelet's runtimes give for a pod.
func rt(id string, pod *nstest.NS, capabilities map[string]any) *libcni.RuntimeConf {
	return &libcni.RuntimeConf{
		ContainerID: id, NetNS: pod.Path, IfName: "eth0", CapabilityArgs: capabilities,
		Args: [][2]string{{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", "ns"}, {"K8S_POD_NAME", "pod-" + id}, {"K8S_POD_INFRA_CONTAINER_ID", id}},
	}
}

func (n *node) add(l *libcni.NetworkConfigList, r *libcni.RuntimeConf) result {
	n.t.Helper()
	res, err := n.cni().AddNetworkList(n.t.Context(), l, r)
	if err != nil {
		n.t.Fatalf("ADD %s: %v", r.ContainerID, err)
	}
	var b bytes.Buffer
	if err := res.PrintTo(&b); err != nil {
		n.t.Fatal(err)
	}
	return parse(n.t, b.String())
}

// check and del also want both plugins of ours to print nothing.
func (n *node) check(l *libcni.NetworkConfigList, r *libcni.RuntimeConf) error {
	return n.cni().CheckNetworkList(n.t.Context(), l, r)
}

func (n *node) del(l *libcni.NetworkConfigList, r *libcni.RuntimeConf) {
	n.t.Helper()
	if err := n.cni().DelNetworkList(n.t.Context(), l, r); err != nil {
		n.t.Errorf("DEL %s: %v", r.ContainerID, err)
	}
}

// made are the calls of headcni that libcni has made since it was asked last.
func (n *node) made() (calls []call) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, c := range n.calls {
		if c.program == "headcni" {
			calls = append(calls, c)
		}
	}
	n.calls = nil
	return calls
}

// reference adds the CNI project's own plugins to CNI_PATH and wants those named.
func (n *node) reference(names ...string) {
	n.t.Helper()
	dirs := os.Getenv("HEADCNI_TOOLS")
	if dirs == "" {
		out, err := exec.Command("../../test/tools/ensure", "cni-plugins").Output()
		if err != nil {
			nstest.Skip(n.t, fmt.Sprintf("no reference plugins: test/tools/ensure cni-plugins: %v", err))
		}
		dirs = strings.TrimSpace(string(out))
	}
	n.path = append(n.path, filepath.SplitList(dirs)...)
	for _, name := range names {
		if _, err := (&onNode{}).FindInPath(name, n.path); err != nil {
			nstest.Skip(n.t, err.Error())
		}
	}
}

// needs skips where a program of the system is missing.
func needs(t *testing.T, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			nstest.Skip(t, err.Error())
		}
	}
}
