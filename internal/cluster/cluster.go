// Package cluster runs a real Kubernetes on this machine: etcd, API server, controller manager and scheduler, several
// nodes with containerd, kubelet and kube-proxy, CoreDNS, and a real Headscale beside them. Each node is a machine of a
// lab (see internal/lab), so that everything ends with the process that started it, and leftovers of one that was killed
// are removed by the next.
//
// There is no pod network: nodes stay NotReady until somebody brings one. That is what the package is for.
package cluster

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/headcni/headcni/internal/lab"
)

const (
	// ImagesEnv holds the folder that test/tools/images prints.
	ImagesEnv = "HEADCNI_IMAGES"

	// ControlPlane is the name of the node that runs the control plane. Only it has the control-plane taint.
	ControlPlane = "control-plane"

	// ModeNFTables and ModeIPTables are kube-proxy's.
	ModeNFTables = "nftables"
	ModeIPTables = "iptables"
)

// The address ranges, IPv4 first. Pods' are a part of lab.ClusterCIDRs, which Headscale's policy lets through; the IPv6
// one is smaller because the controller manager hands out at most 16 bits.
const (
	PodCIDRs     = "10.244.0.0/16,fd00:244::/48"
	ServiceCIDRs = "10.96.0.0/16,fd00:96::/112"
	DNSAddress   = "10.96.0.10"
)

// Ranges are a cluster's address ranges, IPv4 first and separated by a comma, and the address of its DNS.
type Ranges struct{ Pods, Services, DNS string }

// hostPlugins are on every node before HeadCNI comes, as the package kubernetes-cni has it.
var hostPlugins = []string{"host-local", "portmap", "ptp", "bridge"}

// Options say what a cluster is to be. The zero value has two workers and kube-proxy in nftables mode.
type Options struct {
	// Workers is how many nodes there are beside the control plane's, 0 = 2. They are worker-1 and so on.
	Workers int
	// ProxyMode is ModeNFTables or ModeIPTables.
	ProxyMode string
	// NoClusterCIDR leaves kube-proxy without --cluster-cidr, as it is where nobody thought of it.
	NoClusterCIDR bool
	// HostTailscaled names the nodes that have a tailscaled of their own, logged in by their administrator.
	HostTailscaled []string
	// Sites are where the nodes stand, the control plane's first. The nodes then know each other by their tailnet addresses, all by a
	// tailscaled of the host's own that runs before kubelet: it is the only way from one site to another.
	Sites []lab.Site
	// Device adds a machine beside the nodes that has nothing but a tailscaled of its user's: Cluster.Device.
	Device bool
	// Other is the name of one more machine, for a second cluster.
	Other string
	// Beside is the cluster with Other, of which that machine is then the one node. Both are in one tailnet, and end with the first.
	Beside *Cluster
	// Ranges are by default PodCIDRs, ServiceCIDRs and DNSAddress.
	Ranges Ranges
	// NoPodCIDRs has the controller manager give nodes no pod CIDRs.
	NoPodCIDRs bool
	// Bin, Tools and Images are the folders of our programs, of the real parts (separated by colons; an older Kubernetes or
	// containerd goes before what else has programs of that name) and of the test images; empty means $HEADCNI_BIN,
	// $HEADCNI_TOOLS and $HEADCNI_IMAGES.
	Bin, Tools, Images string
	// Policy may change what is to be Headscale's policy.
	Policy func(p map[string]any)
	// Step, if set, is told when a step of the set-up is done and how long after the start.
	Step func(what string, at time.Duration)
}

func (o Options) withDefaults() Options {
	if o.Workers == 0 {
		o.Workers = 2
	}
	if o.ProxyMode == "" {
		o.ProxyMode = ModeNFTables
	}
	if o.Ranges == (Ranges{}) {
		o.Ranges = Ranges{PodCIDRs, ServiceCIDRs, DNSAddress}
	}
	if o.Bin == "" {
		o.Bin = os.Getenv(lab.BinEnv)
	}
	if o.Tools == "" {
		o.Tools = os.Getenv(lab.ToolsEnv)
	}
	if o.Images == "" {
		o.Images = os.Getenv(ImagesEnv)
	}
	if o.Step == nil {
		o.Step = func(string, time.Duration) {}
	}
	return o
}

// check says what is missing.
func (o Options) check() error {
	for _, name := range []string{"etcd", "kube-apiserver", "kubelet", "containerd", "containerd-shim-runc-v2", "ctr", "coredns", "helm"} {
		found := slices.ContainsFunc(filepath.SplitList(o.Tools), func(dir string) bool {
			_, err := os.Stat(filepath.Join(dir, name))
			return err == nil
		})
		if !found {
			return fmt.Errorf("no %s in %q: `make e2e` builds it; by hand, set %s to what `test/tools/ensure containerd coredns kubernetes helm headscale tailscale cni-plugins` prints", name, o.Tools, lab.ToolsEnv)
		}
	}
	if _, err := os.Stat(filepath.Join(o.Images, "agnhost.tar")); err != nil {
		return fmt.Errorf("no test images: %w: set %s to what test/tools/images prints", err, ImagesEnv)
	}
	if o.ProxyMode != ModeNFTables && o.ProxyMode != ModeIPTables {
		return fmt.Errorf("kube-proxy mode %q: want %s or %s", o.ProxyMode, ModeNFTables, ModeIPTables)
	}
	return nil
}

// Cluster is a running one. Its methods may be called from several goroutines unless said otherwise.
type Cluster struct {
	// Dir holds the logs, one folder a machine, the kubeconfig and the scripts `kubectl` and `helm`. It goes with Stop.
	Dir string
	// Control is the host of Headscale and of clients: no node, but on the same underlay.
	Control *lab.Control
	// Nodes are the control plane's and the workers, in this order.
	Nodes []*Node
	// Device is nil without Options.Device.
	Device *lab.Node
	// Client and Config are an administrator's.
	Client kubernetes.Interface
	Config *rest.Config
	// APIServer is to be killed and started by those who want to see the nodes without it.
	APIServer *lab.Process
	// Agnhost is the name of upstream's test image, which every node has.
	Agnhost string

	opt   Options
	lab   *lab.Lab
	pki   *pki
	pause string // the name of the image
	// applied: the API server has what every cluster holds.
	applied bool
	began   time.Time
}

// Start starts a cluster and returns when every node is registered and has the test images. The nodes are not ready, and
// CoreDNS waits, until there is a pod network.
func Start(ctx context.Context, opt Options) (_ *Cluster, err error) {
	c := &Cluster{opt: opt.withDefaults(), began: time.Now()}
	if err := c.opt.check(); err != nil {
		return nil, err
	}
	start := c.startLab
	if c.opt.Beside != nil {
		start = c.joinLab
	}
	if err := start(ctx); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.Stop())
		}
	}()
	if err := c.prepare(ctx); err != nil {
		return nil, err
	}
	c.step("machines, Headscale")
	errs := make(chan error, 1)
	go func() {
		errs <- each(c.Nodes, func(n *Node) error {
			if err := n.startRuntime(ctx); err != nil {
				return err
			}
			return n.importImages(ctx)
		})
	}()
	controlErr := c.startControlPlane(ctx)
	c.step("control plane")
	if err := errors.Join(controlErr, <-errs); err != nil {
		return nil, err
	}
	c.step("container runtimes, images")
	if err := each(c.Nodes, func(n *Node) error { return n.startKubelet(ctx) }); err != nil {
		return nil, err
	}
	c.step("kubelets")
	return c, nil
}

// startLab makes the machines: in terms of the lab, nodes that it leaves alone.
func (c *Cluster) startLab(ctx context.Context) (err error) {
	names := []string{ControlPlane}
	for i := range c.opt.Workers {
		names = append(names, fmt.Sprintf("worker-%d", i+1))
	}
	if c.opt.Device {
		names = append(names, "device")
	}
	if c.opt.Other != "" {
		names = append(names, c.opt.Other)
	}
	c.lab, err = lab.New(ctx, lab.Options{
		Nodes: len(names), Names: names, Spare: len(names), Modes: []string{"host"}, Plugins: hostPlugins,
		Bin: c.opt.Bin, Tools: c.opt.Tools, Relay: true, Policy: c.opt.Policy, Sites: c.opt.Sites,
	})
	if err != nil {
		return err
	}
	c.Dir, c.Control = c.lab.Dir, c.lab.Control
	nodes := c.lab.Nodes
	if c.opt.Other != "" {
		nodes = nodes[:len(nodes)-1]
	}
	if c.opt.Device {
		c.Device, nodes = nodes[len(nodes)-1], nodes[:len(nodes)-1]
	}
	for _, n := range nodes {
		c.Nodes = append(c.Nodes, &Node{Node: n, cluster: c})
	}
	return nil
}

// joinLab takes the machine that another cluster has for a second one.
func (c *Cluster) joinLab(context.Context) error {
	first := c.opt.Beside
	i := slices.IndexFunc(first.lab.Nodes, func(n *lab.Node) bool { return n.Name == first.opt.Other })
	if i < 0 {
		return errors.New("the first cluster has no machine for a second one: set Options.Other")
	}
	c.lab, c.Control, c.Dir = first.lab, first.Control, filepath.Join(first.Dir, "cluster-"+first.opt.Other)
	c.Nodes = []*Node{{Node: first.lab.Nodes[i], cluster: c}}
	return os.Mkdir(c.Dir, 0o700)
}

// prepare gives every machine the files that it needs before anything runs.
func (c *Cluster) prepare(ctx context.Context) (err error) {
	for file, name := range map[string]*string{"agnhost.name": &c.Agnhost, "pause.name": &c.pause} {
		b, err := os.ReadFile(filepath.Join(c.opt.Images, file))
		if err != nil {
			return err
		}
		*name = strings.TrimSpace(string(b))
	}
	if err := each(c.Nodes, func(n *Node) error { return n.join(ctx) }); err != nil {
		return err
	}
	cp := c.Nodes[0]
	if c.pki, err = newPKI(slices.Concat(cp.Underlay, cp.Addrs()), prefixes(c.opt.Ranges.Services), apiURL(cp.Addrs()[0])); err != nil {
		return err
	}
	if err := c.makeClients(); err != nil {
		return err
	}
	for _, name := range c.opt.HostTailscaled {
		if _, err := c.Node(name); err != nil {
			return err
		}
	}
	return each(c.Nodes, func(n *Node) error { return n.configure(ctx) })
}

func (c *Cluster) step(what string) { c.opt.Step(what, time.Since(c.began)) }

// Node finds a node by name.
func (c *Cluster) Node(name string) (*Node, error) {
	var names []string
	for _, n := range c.Nodes {
		if n.Name == name {
			return n, nil
		}
		names = append(names, n.Name)
	}
	return nil, fmt.Errorf("no node named %q: there are %s", name, strings.Join(names, ", "))
}

// Workers are the nodes without the control plane's.
func (c *Cluster) Workers() []*Node { return c.Nodes[1:] }

// Kubectl runs kubectl as an administrator, on the control host, and returns what it prints.
func (c *Cluster) Kubectl(ctx context.Context, args ...string) (string, error) {
	return c.Control.Run(ctx, "kubectl", append([]string{"--kubeconfig=" + c.Kubeconfig()}, args...)...)
}

// Helm runs helm as an administrator, on the control host, and returns what it prints.
func (c *Cluster) Helm(ctx context.Context, args ...string) (string, error) {
	return c.Control.Run(ctx, "helm", append([]string{"--kubeconfig=" + c.Kubeconfig()}, args...)...)
}

// Kubeconfig is the path of the administrator's kubeconfig. It works on the cluster's machines only.
func (c *Cluster) Kubeconfig() string { return filepath.Join(c.Dir, "admin.kubeconfig") }

// ImportImage gives an image, a tar file as `docker save` or `make image` writes it, to all nodes.
func (c *Cluster) ImportImage(ctx context.Context, tar string) error {
	return each(c.Nodes, func(n *Node) error { return n.ImportImage(ctx, tar) })
}

// CaptureUnderlay counts packets with addresses of pods, services or the tailnet that are in clear between the machines: with this cluster's, and
// with those that are the default. What Stop says of the total does not hold after a reboot.
func (c *Cluster) CaptureUnderlay() (*lab.Capture, error) {
	return c.lab.CaptureUnderlay(prefixes(c.opt.Ranges.Pods + "," + c.opt.Ranges.Services)...)
}

// SendClear puts such a packet on a node's wire: the proof that a capture sees one.
func (c *Cluster) SendClear(n *Node, src, dst netip.Addr) error {
	return c.lab.SendClear(n.Node, src, dst)
}

// Logs are the log files so far.
func (c *Cluster) Logs() []string { return c.lab.Logs() }

// Stop ends the cluster: every process of it, every namespace, its cgroups and its folder.
func (c *Cluster) Stop() error {
	if c.opt.Beside != nil {
		return nil
	}
	return c.lab.Close()
}

// each calls do for all nodes at once and joins the errors.
func each(nodes []*Node, do func(*Node) error) error {
	errs := make([]error, len(nodes))
	var wg sync.WaitGroup
	for i, n := range nodes {
		wg.Go(func() {
			if err := do(n); err != nil {
				errs[i] = fmt.Errorf("%s: %w", n.Name, err)
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// poll calls try until it succeeds; its last error is returned when ctx ends.
func poll(ctx context.Context, interval time.Duration, try func() error) error {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		err := try()
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", context.Cause(ctx), err)
		}
	}
}
