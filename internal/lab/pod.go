package lab

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/networking/hostport"
)

// ifName is the pod's interface, as every runtime names it.
const ifName = "eth0"

// Pod is a network namespace on a node, attached through libcni as a container runtime would, with a process inside.
type Pod struct {
	Name string
	Node *Node
	// Addrs are the pod's own, in the order of the result.
	Addrs []netip.Addr
	// Result is what the plugins answered.
	Result *current.Result
	// Setup is how long ADD took.
	Setup time.Duration
	// Server answers in the pod; nil where PodOptions.Idle was set.
	Server *Process
	// ID is the container ID that the plugins know the pod by.
	ID string

	ns  namespaces
	opt PodOptions
}

// PodOptions are for pods that are not as usual.
type PodOptions struct {
	// Idle leaves the pod without a process.
	Idle bool
	// Config is the CNI configuration; nil means the one the daemon has put on the node.
	Config *libcni.NetworkConfigList
	// Ports are those of the node that lead to the pod (capability portMappings).
	Ports []hostport.Mapping
	// Namespace is the Pod's; "" means lab.
	Namespace string
}

// pluginExec runs plugins on a node for libcni.
type pluginExec struct {
	version.PluginDecoder
	node *Node
}

// ExecPlugin implements invoke.Exec.
func (e *pluginExec) ExecPlugin(ctx context.Context, path string, stdin []byte, environ []string) ([]byte, error) {
	// Without the caller's own variables: a runtime's environment on the node is not the lab's.
	env := e.node.env[:len(e.node.env):len(e.node.env)]
	for _, v := range environ {
		if strings.HasPrefix(v, "CNI_") {
			env = append(env, v)
		}
	}
	out, err := run(ctx, e.node.ns, env, stdin, path)
	if err == nil {
		return out, nil
	}
	// CNI spec 1.1.0, section 5: a plugin that fails says why on standard output.
	var reason types.Error
	if json.Unmarshal(out, &reason) == nil && reason.Msg != "" {
		return nil, &reason
	}
	return nil, fmt.Errorf("on %s: %w; it printed %q", e.node.Name, err, out)
}

// FindInPath implements invoke.Exec: the folders are the node's.
func (e *pluginExec) FindInPath(plugin string, dirs []string) (string, error) {
	for _, dir := range dirs {
		path := filepath.Join(dir, plugin)
		if _, err := os.Lstat(e.node.Path(path)); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("no plugin %s in %s on %s", plugin, strings.Join(dirs, ":"), e.node.Name)
}

// CNI is a runtime's view of the node.
func (n *Node) CNI() *libcni.CNIConfig {
	return libcni.NewCNIConfigWithCacheDir([]string{paths.CNIBinDir}, filepath.Join(n.Dir, "cni-cache"), &pluginExec{node: n})
}

// Conflist is the CNI configuration that the daemon has written.
func (n *Node) Conflist() (*libcni.NetworkConfigList, error) {
	return libcni.NetworkConfFromFile(n.Path(filepath.Join(paths.CNIConfDir, paths.ConflistName)))
}

func (p *Pod) runtimeConf() *libcni.RuntimeConf {
	conf := &libcni.RuntimeConf{
		ContainerID: p.ID, NetNS: "/run/netns/" + p.Name, IfName: ifName,
		Args: [][2]string{{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", cmp.Or(p.opt.Namespace, "lab")}, {"K8S_POD_NAME", p.Name}},
	}
	if len(p.opt.Ports) > 0 {
		conf.CapabilityArgs = map[string]any{"portMappings": p.opt.Ports}
	}
	return conf
}

// AddPod makes a pod and waits until its process answers. A pod whose ADD fails leaves nothing in the lab; what it
// leaves on the node is the plugin's affair.
func (n *Node) AddPod(ctx context.Context, name string, opt PodOptions) (_ *Pod, err error) {
	p, err := n.Sandbox(ctx, name, opt)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.removeSandbox(context.WithoutCancel(ctx)))
		}
	}()
	return p, p.Attach(ctx)
}

// Sandbox makes a pod that has no network yet. Attach it, or Remove it.
func (n *Node) Sandbox(ctx context.Context, name string, opt PodOptions) (_ *Pod, err error) {
	p := &Pod{Name: name, Node: n, ID: fmt.Sprintf("%s-%s-%d", n.Name, name, time.Now().UnixNano()), opt: opt}
	if p.opt.Config == nil {
		if p.opt.Config, err = n.Conflist(); err != nil {
			return nil, fmt.Errorf("read the conflist of %s: %w", n.Name, err)
		}
	}
	if _, err := n.Run(ctx, "ip", "netns", "add", name); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.removeSandbox(context.WithoutCancel(ctx)))
		}
	}()
	if p.ns.net, err = os.Open(n.Path("/run/netns/" + name)); err != nil {
		return nil, err
	}
	// lo is the runtime's to set up: containerd and CRI-O do it themselves.
	_, err = n.Run(ctx, "ip", "-n", name, "link", "set", "lo", "up")
	return p, err
}

// Attach calls ADD, and waits until the pod's process answers. A plugin that runs when ctx ends is killed.
func (p *Pod) Attach(ctx context.Context) error {
	began := time.Now()
	result, err := p.Node.CNI().AddNetworkList(ctx, p.opt.Config, p.runtimeConf())
	p.Setup = time.Since(began)
	if err != nil {
		return fmt.Errorf("add %s on %s: %w", p.Name, p.Node.Name, err)
	}
	if err := p.take(result); err != nil || p.opt.Idle {
		return err
	}
	return p.serve(ctx)
}

// take reads the addresses out of a result of any version.
func (p *Pod) take(r types.Result) (err error) {
	if p.Result, err = current.NewResultFromResult(r); err != nil {
		return err
	}
	p.Addrs = nil
	for _, ip := range p.Result.IPs {
		a, ok := netip.AddrFromSlice(ip.Address.IP)
		if !ok {
			return fmt.Errorf("%s got the address %q", p.Name, ip.Address.IP)
		}
		p.Addrs = append(p.Addrs, a.Unmap())
	}
	return nil
}

// serve starts the pod's process in mount and UTS namespaces of its own, as a container has them.
func (p *Pod) serve(ctx context.Context) (err error) {
	ns := p.Node.ns
	ns.net = p.ns.net
	attr := &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWUTS}
	log := filepath.Join(p.Node.Dir, "pod-"+p.Name+".log")
	p.Server, err = start(ns, log, p.Node.env, attr, p.Node.lab.ours("headcnictl"), "probe", "serve", "--name", p.Name, "--node", p.Node.Name)
	if err != nil {
		return err
	}
	return until(ctx, 2*time.Millisecond, p.Server, func() error {
		c, err := p.Dial(ctx, "tcp", fmt.Sprintf("127.0.0.1:%d", EchoPort))
		if err != nil {
			return err
		}
		return c.Close()
	})
}

// Check asks the plugins whether the pod is as they made it.
func (p *Pod) Check(ctx context.Context) error {
	return p.Node.CNI().CheckNetworkList(ctx, p.opt.Config, p.runtimeConf())
}

// GC has the plugins remove what belongs to no pod of the node but these.
func (n *Node) GC(ctx context.Context, keep []*Pod) error {
	list, err := n.Conflist()
	if err != nil {
		return fmt.Errorf("read the conflist of %s: %w", n.Name, err)
	}
	args := &libcni.GCArgs{ValidAttachments: []types.GCAttachment{}}
	for _, p := range keep {
		args.ValidAttachments = append(args.ValidAttachments, types.GCAttachment{ContainerID: p.ID, IfName: ifName})
	}
	if err := n.CNI().GCNetworkList(ctx, list, args); err != nil {
		return fmt.Errorf("collect garbage on %s: %w", n.Name, err)
	}
	return nil
}

// Link is the host's end of the pod's link.
func (p *Pod) Link() string {
	for _, i := range p.Result.Interfaces {
		if i.Sandbox == "" {
			return i.Name
		}
	}
	return ""
}

// Remove ends the pod: its process, then DEL, then its namespace.
func (p *Pod) Remove(ctx context.Context) error {
	return errors.Join(p.end(), p.Detach(ctx), p.removeSandbox(ctx))
}

// Vanish ends the pod without DEL, which may still come: by Detach.
func (p *Pod) Vanish(ctx context.Context) error {
	return errors.Join(p.end(), p.removeSandbox(ctx))
}

// end ends the pod's process.
func (p *Pod) end() error {
	if p.Server == nil {
		return nil
	}
	return p.Server.Kill()
}

// Detach calls DEL and leaves the namespace.
func (p *Pod) Detach(ctx context.Context) error {
	if err := p.Node.CNI().DelNetworkList(ctx, p.opt.Config, p.runtimeConf()); err != nil {
		return fmt.Errorf("delete %s on %s: %w", p.Name, p.Node.Name, err)
	}
	return nil
}

func (p *Pod) removeSandbox(ctx context.Context) error {
	p.ns.close()
	_, err := p.Node.Run(ctx, "ip", "netns", "delete", p.Name)
	return err
}

// Addr is the pod's first address of a family.
func (p *Pod) Addr(v6 bool) netip.Addr {
	for _, a := range p.Addrs {
		if a.Is6() == v6 {
			return a
		}
	}
	return netip.Addr{}
}

// Do runs fn on a thread in the pod's network namespace; sockets that it opens stay there.
func (p *Pod) Do(fn func() error) error { return p.ns.do(fn) }

// Dial connects from the pod. addr is an IP address and port.
func (p *Pod) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	return dial(ctx, p.ns, network, addr)
}

// Run runs a program in the pod's network, on the node's file system.
func (p *Pod) Run(ctx context.Context, name string, args ...string) (string, error) {
	ns := p.Node.ns
	ns.net = p.ns.net
	out, err := run(ctx, ns, p.Node.env, nil, p.Node.find(name), args...)
	if err != nil {
		return string(out), fmt.Errorf("in %s: %w", p.Name, err)
	}
	return string(out), nil
}
