package cluster

import (
	"context"
	_ "embed" // node.sh
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/headcni/headcni/internal/lab"
)

//go:embed node.sh
var nodeScript string

const (
	containerdConfig = "/etc/kubernetes/containerd.toml"
	containerdSocket = "/run/containerd/containerd.sock"
	baseSpec         = "/etc/kubernetes/base-spec.json"
	controlPlaneRole = "node-role.kubernetes.io/control-plane"
	// ManifestsDir is where kubelet finds static pods.
	ManifestsDir = kubernetesDir + "/manifests"
)

// Node is a machine with containerd, kubelet and kube-proxy. Of what it inherits from a node of the lab, Run, Start, Do,
// Dial, Path and the like are of use; the lab itself starts nothing on it but the host's tailscaled.
type Node struct {
	*lab.Node
	// Containerd, Kubelet and Proxy are the node's programs; see the Start methods.
	Containerd, Kubelet, Proxy *lab.Process

	cluster  *Cluster
	loggedIn bool         // the host's tailscaled: it stays so over a reboot
	tailnet  []netip.Addr // what the other nodes know it by; nil: its underlay addresses
}

type object = map[string]any

// Addrs are those that Kubernetes knows the node by, IPv4 first.
func (n *Node) Addrs() []netip.Addr {
	if n.tailnet != nil {
		return n.tailnet
	}
	return n.Underlay
}

// disk is what the node keeps over a reboot.
func (n *Node) disk() string { return filepath.Join(n.Dir, "disk") }

// join makes the machine a host for containers. Where nodes stand at sites it has the host's tailscaled join too, as a unit that
// kubelet's waits for.
func (n *Node) join(ctx context.Context) error {
	if _, err := n.Run(ctx, "bash", "-c", nodeScript, "node", n.disk(), n.Cgroup()); err != nil {
		return fmt.Errorf("prepare mounts and cgroups: %w", err)
	}
	if n.cluster.opt.Sites == nil {
		return nil
	}
	if err := n.startHostTailscaled(ctx); err != nil {
		return err
	}
	return poll(ctx, 50*time.Millisecond, func() (err error) {
		n.tailnet, err = n.TailnetAddrs()
		if err == nil && len(n.tailnet) != 2 {
			err = fmt.Errorf("tailscaled has the addresses %v", n.tailnet)
		}
		return err
	})
}

// configure writes the machine's configuration, once.
func (n *Node) configure(ctx context.Context) error {
	if _, err := os.Stat(n.Path(kubernetesDir + "/kubelet.json")); err == nil {
		return nil // not the first boot
	}
	kubelet, err := json.Marshal(n.kubeletConfig())
	if err != nil {
		return err
	}
	files := map[string][]byte{"ca.crt": n.cluster.pki.caPEM, "kubelet.json": kubelet, "containerd.toml": []byte(containerdTOML(n.cluster.pause))}
	if files["kubelet.kubeconfig"], err = n.cluster.pki.kubeconfig("system:node:"+n.Name, "system:nodes"); err != nil {
		return err
	}
	if files["kube-proxy.kubeconfig"], err = n.cluster.pki.kubeconfig("system:kube-proxy", ""); err != nil {
		return err
	}
	if err := errors.Join(writeFiles(n.Path(kubernetesDir), files), writeFiles(n.Path(ManifestsDir), nil)); err != nil {
		return err
	}
	return n.writeBaseSpec(ctx)
}

// writeBaseSpec writes what every container begins with: containerd's default, and a hook that shows it the machine's
// boot ID. Containers mount /proc anew and would see the caller's.
func (n *Node) writeBaseSpec(ctx context.Context) error {
	out, err := n.Run(ctx, "ctr", "oci", "spec")
	if err != nil {
		return err
	}
	var spec object
	if err := json.Unmarshal([]byte(out), &spec); err != nil {
		return fmt.Errorf("read containerd's default specification: %w", err)
	}
	// The hook runs in the container's mount namespace while the root is still the host's.
	const bind = `cd "$(sed -n 's/.*"bundle": *"\([^"]*\)".*/\1/p')" && mount --bind /run/boot_id rootfs/proc/sys/kernel/random/boot_id`
	spec["hooks"] = object{"createContainer": []object{{"path": "/bin/bash", "args": []string{"bash", "-c", bind}, "env": []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}}}}
	b, err := json.Marshal(spec)
	if err != nil {
		return err
	}
	return os.WriteFile(n.Path(baseSpec), b, 0o600)
}

// containerdTOML is containerd's configuration, in the version that all releases from 1.3 on read.
func containerdTOML(pause string) string {
	return `version = 2
root = "/var/lib/containerd"
state = "/run/containerd"

[grpc]
address = "` + containerdSocket + `"

[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "` + pause + `"
disable_apparmor = true
# We may not raise priorities here.
restrict_oom_score_adj = true

[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/opt/cni/bin"
conf_dir = "/etc/cni/net.d"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
base_runtime_spec = "` + baseSpec + `"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
SystemdCgroup = false
`
}

func (n *Node) kubeletConfig() object {
	c := object{
		"apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
		"authentication": object{"anonymous": object{"enabled": false}, "webhook": object{"enabled": true},
			"x509": object{"clientCAFile": kubernetesDir + "/ca.crt"}},
		"authorization":            object{"mode": "Webhook"},
		"containerRuntimeEndpoint": "unix://" + containerdSocket,
		"clusterDNS":               []string{n.cluster.opt.Ranges.DNS}, "clusterDomain": "cluster.local",
		"cgroupDriver": "cgroupfs", "cgroupRoot": "/" + n.Cgroup(), "failCgroupV1": false,
		"oomScoreAdj": 0, "failSwapOn": false,
		"staticPodPath":       ManifestsDir,
		"serializeImagePulls": false,
		// The disk is the caller's, and however full it is, images stay.
		"evictionHard":                object{"memory.available": "1Mi", "nodefs.available": "0%", "nodefs.inodesFree": "0%", "imagefs.available": "0%", "imagefs.inodesFree": "0%"},
		"imageGCHighThresholdPercent": 100,
		// Pods start at once instead of five seconds after their node became ready.
		"nodeStatusUpdateFrequency": "2s",
	}
	if n.Name == ControlPlane {
		c["registerWithTaints"] = []object{{"key": controlPlaneRole, "effect": "NoSchedule"}}
	}
	return c
}

// startRuntime starts containerd, and the host's tailscaled where the node has one.
func (n *Node) startRuntime(ctx context.Context) error {
	if err := n.StartContainerd(ctx); err != nil {
		return err
	}
	if slices.Contains(n.cluster.opt.HostTailscaled, n.Name) {
		return n.startHostTailscaled(ctx)
	}
	return nil
}

// importImages gives containerd the test images.
func (n *Node) importImages(ctx context.Context) error {
	tars, err := filepath.Glob(filepath.Join(n.cluster.opt.Images, "*.tar"))
	if err != nil {
		return err
	}
	for _, tar := range tars {
		if err := n.ImportImage(ctx, tar); err != nil {
			return err
		}
	}
	return nil
}

// StartContainerd starts containerd and waits until it answers.
func (n *Node) StartContainerd(ctx context.Context) (err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, time.Minute, errors.New("containerd did not answer within a minute"))
	defer cancel()
	if n.Containerd, err = n.Start("containerd", nil, "--config", containerdConfig); err != nil {
		return err
	}
	return poll(ctx, 50*time.Millisecond, func() error {
		if !n.Containerd.Alive() {
			return fmt.Errorf("containerd ended: see %s", n.Containerd.Log)
		}
		_, err := n.Run(ctx, "ctr", "--connect-timeout=1s", "version")
		return err
	})
}

// ImportImage gives containerd an image from a tar file.
func (n *Node) ImportImage(ctx context.Context, tar string) error {
	_, err := n.Run(ctx, "ctr", "--namespace=k8s.io", "images", "import", tar)
	return err
}

// StartKubelet starts kubelet. It does not wait.
func (n *Node) StartKubelet() (err error) {
	var ips []string
	for _, a := range n.Addrs() {
		ips = append(ips, a.String())
	}
	n.Kubelet, err = n.Start("kubelet", nil, "--config="+kubernetesDir+"/kubelet.json", "--kubeconfig="+kubernetesDir+"/kubelet.kubeconfig",
		"--hostname-override="+n.Name, "--node-ip="+strings.Join(ips, ","), "--v=2")
	return err
}

// StartProxy starts kube-proxy. It does not wait.
func (n *Node) StartProxy() (err error) {
	flags := []string{"--kubeconfig=" + kubernetesDir + "/kube-proxy.kubeconfig", "--hostname-override=" + n.Name,
		"--proxy-mode=" + n.cluster.opt.ProxyMode, "--conntrack-max-per-core=0", "--conntrack-min=0", "--v=2"}
	if !n.cluster.opt.NoClusterCIDR {
		flags = append(flags, "--cluster-cidr="+n.cluster.opt.Ranges.Pods)
	}
	n.Proxy, err = n.Start("kube-proxy", nil, flags...)
	return err
}

// startKubelet starts kubelet and, once it has registered the node, kube-proxy, which wants to know its node's addresses.
func (n *Node) startKubelet(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, time.Minute, errors.New("kubelet did not register the node within a minute"))
	defer cancel()
	if err := n.StartKubelet(); err != nil {
		return err
	}
	err := poll(ctx, 200*time.Millisecond, func() error {
		if !n.Kubelet.Alive() {
			// containerd answers before it has seen to the pods of the last boot, which kubelet does not wait for. Its unit starts it again.
			return errors.Join(fmt.Errorf("kubelet ended: see %s", n.Kubelet.Log), n.StartKubelet())
		}
		if _, err := n.Run(ctx, "curl", "-fsS", "-m1", "http://127.0.0.1:10248/healthz"); err != nil {
			return err
		}
		_, err := n.Object(ctx)
		return err
	})
	if err != nil {
		return err
	}
	if n.Name == ControlPlane { // kubelets may not give themselves roles
		patch := fmt.Sprintf(`{"metadata":{"labels":{%q:""}}}`, controlPlaneRole)
		if _, err := n.cluster.Client.CoreV1().Nodes().Patch(ctx, n.Name, types.MergePatchType, []byte(patch), metav1.PatchOptions{}); err != nil {
			return err
		}
	}
	return n.StartProxy()
}

// Object is the node's Node object.
func (n *Node) Object(ctx context.Context) (*corev1.Node, error) {
	return n.cluster.Client.CoreV1().Nodes().Get(ctx, n.Name, metav1.GetOptions{})
}

// Ready says whether the node is, or why not.
func (n *Node) Ready(ctx context.Context) error {
	o, err := n.Object(ctx)
	if err != nil {
		return err
	}
	message := "kubelet has not said yet"
	for _, c := range o.Status.Conditions {
		if c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue {
			return nil
		}
		if c.Type == corev1.NodeReady {
			message = c.Message
		}
	}
	return fmt.Errorf("%s is not ready: %s", n.Name, message)
}

// WaitReady waits until every node is ready.
func (c *Cluster) WaitReady(ctx context.Context) error {
	return each(c.Nodes, func(n *Node) error {
		return poll(ctx, 200*time.Millisecond, func() error { return n.Ready(ctx) })
	})
}

// startHostTailscaled starts a tailscaled of the host's own, as its package does, and logs in, as its administrator does.
func (n *Node) startHostTailscaled(ctx context.Context) error {
	if err := n.StartTailscaled(); err != nil {
		return err
	}
	if err := n.WaitSocket(ctx); err != nil {
		return err
	}
	if n.loggedIn {
		return nil
	}
	key, err := n.cluster.AuthKey(ctx)
	if err != nil {
		return err
	}
	file := n.Path("/run/auth-key")
	if err := os.WriteFile(file, []byte(key), 0o600); err != nil {
		return err
	}
	_, err = n.Run(ctx, "tailscale", "up", "--login-server="+n.cluster.Control.URL, "--auth-key=file:/run/auth-key", "--timeout=30s", "--hostname="+n.Name)
	n.loggedIn = err == nil
	return errors.Join(err, os.Remove(file))
}

// AuthKey makes a pre-auth key with HeadCNI's tag, with Headscale's own client.
func (c *Cluster) AuthKey(ctx context.Context) (string, error) {
	out, err := c.Control.Run(ctx, "headscale", "preauthkeys", "create", "--expiration", "24h", "--reusable", "--tags", lab.Tag)
	if err != nil {
		return "", err
	}
	fields := strings.Fields(out)
	if len(fields) == 0 {
		return "", errors.New("headscale preauthkeys create printed no key")
	}
	return fields[len(fields)-1], nil
}

// Kill ends everything on the node at once, as a power cut does. Its disk stays, for Boot.
func (n *Node) Kill() error {
	if err := n.Crash(); err != nil {
		return err
	}
	return n.RemoveCgroup()
}

// Boot starts a node that was killed: containerd with the images that it had, kubelet, kube-proxy, its own tailscaled where
// it has one, and the control plane on its node. It does not wait until the node is ready.
func (n *Node) Boot(ctx context.Context) error {
	if err := n.Node.Boot(ctx); err != nil {
		return err
	}
	if err := n.join(ctx); err != nil {
		return err
	}
	if n.Name == ControlPlane {
		if err := n.cluster.startControlPlane(ctx); err != nil {
			return err
		}
	}
	if err := n.startRuntime(ctx); err != nil {
		return err
	}
	return n.startKubelet(ctx)
}

// Reboot ends everything on the node and boots it again.
func (n *Node) Reboot(ctx context.Context) error {
	return errors.Join(n.Kill(), n.Boot(ctx))
}

// RestartContainerd restarts containerd; pods go on.
func (n *Node) RestartContainerd(ctx context.Context) error {
	if err := n.Containerd.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	return n.StartContainerd(ctx)
}

// RestartKubelet restarts kubelet; pods go on.
func (n *Node) RestartKubelet() error {
	if err := n.Kubelet.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	return n.StartKubelet()
}
