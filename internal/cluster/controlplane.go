package cluster

import (
	"context"
	_ "embed" // manifests.yaml
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
)

const (
	kubernetesDir = "/etc/kubernetes"
	apiPort       = 6443
)

//go:embed manifests.yaml
var manifests string

// apiURL is the API server's by one of its addresses.
func apiURL(a netip.Addr) string { return "https://" + netip.AddrPortFrom(a, apiPort).String() }

// ServicePrefixes are ServiceCIDRs.
func ServicePrefixes() []netip.Prefix { return prefixes(ServiceCIDRs) }

// PodPrefixes are PodCIDRs.
func PodPrefixes() []netip.Prefix { return prefixes(PodCIDRs) }

func prefixes(list string) []netip.Prefix {
	var out []netip.Prefix
	for s := range strings.SplitSeq(list, ",") {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

// makeClients makes the administrator's kubeconfig and a client, which connects from the control host.
func (c *Cluster) makeClients() error {
	// The control host is on the underlay only.
	admin, err := c.pki.kubeconfigFor(apiURL(c.Nodes[0].Underlay[0]), "admin", "system:masters")
	if err != nil {
		return err
	}
	if err := os.WriteFile(c.Kubeconfig(), admin, 0o600); err != nil {
		return err
	}
	if c.Config, err = clientcmd.RESTConfigFromKubeConfig(admin); err != nil {
		return err
	}
	c.Config.Dial = c.Control.Dial
	c.Config.QPS, c.Config.Burst = 200, 400
	c.Client, err = kubernetes.NewForConfig(c.Config)
	return err
}

// startControlPlane starts etcd and Kubernetes' own programs, and has what every cluster holds applied.
func (c *Cluster) startControlPlane(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, 2*time.Minute, errors.New("the control plane was not ready within 2 minutes"))
	defer cancel()
	cp := c.Nodes[0]
	files, err := c.pki.files()
	if err != nil {
		return err
	}
	for _, name := range []string{"kube-controller-manager", "kube-scheduler"} {
		if files[name+".kubeconfig"], err = c.pki.kubeconfig("system:"+name, ""); err != nil {
			return err
		}
	}
	if err := writeFiles(cp.Path(kubernetesDir), files); err != nil {
		return err
	}
	if err := c.run("etcd", "--data-dir=/var/lib/etcd", "--unsafe-no-fsync", "--log-level=warn",
		"--listen-client-urls=http://127.0.0.1:2379", "--advertise-client-urls=http://127.0.0.1:2379", "--listen-peer-urls=http://127.0.0.1:2380"); err != nil {
		return err
	}
	if err := c.StartAPIServer(ctx); err != nil {
		return err
	}
	if err := c.run("kube-controller-manager", c.controllerManagerFlags()...); err != nil {
		return err
	}
	if err := c.run("kube-scheduler", "--kubeconfig="+kubernetesDir+"/kube-scheduler.kubeconfig", "--leader-elect=false", "--bind-address=127.0.0.1"); err != nil {
		return err
	}
	if c.applied {
		return nil // etcd has it, with what the controller made of it
	}
	path := filepath.Join(c.Dir, "manifests.yaml")
	if err := os.WriteFile(path, []byte(strings.ReplaceAll(manifests, "DNS_ADDRESS", c.opt.Ranges.DNS)), 0o600); err != nil {
		return err
	}
	_, err = c.Kubectl(ctx, "apply", "--server-side", "-f", path)
	c.applied = err == nil
	return err
}

// StartAPIServer starts the API server and waits until it is ready.
func (c *Cluster) StartAPIServer(ctx context.Context) (err error) {
	if c.APIServer, err = c.Nodes[0].Start("kube-apiserver", nil, c.apiServerFlags()...); err != nil {
		return err
	}
	err = poll(ctx, 50*time.Millisecond, func() error {
		if !c.APIServer.Alive() {
			return fmt.Errorf("kube-apiserver ended: see %s", c.APIServer.Log)
		}
		_, err := c.Client.Discovery().RESTClient().Get().AbsPath("/readyz").Timeout(time.Second).DoRaw(ctx)
		return err
	})
	if err != nil {
		return fmt.Errorf("wait for the API server: %w", err)
	}
	return nil
}

// run starts a program of the control plane, which ends with its node.
func (c *Cluster) run(name string, args ...string) error {
	_, err := c.Nodes[0].Start(name, nil, args...)
	return err
}

func (c *Cluster) apiServerFlags() []string {
	in := func(name string) string { return filepath.Join(kubernetesDir, name) }
	return []string{
		"--etcd-servers=http://127.0.0.1:2379",
		"--advertise-address=" + c.Nodes[0].Addrs()[0].String(), fmt.Sprintf("--secure-port=%d", apiPort),
		"--service-cluster-ip-range=" + c.opt.Ranges.Services,
		"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged",
		"--client-ca-file=" + in("ca.crt"), "--tls-cert-file=" + in("server.crt"), "--tls-private-key-file=" + in("server.key"),
		"--kubelet-client-certificate=" + in("kubelet-client.crt"), "--kubelet-client-key=" + in("kubelet-client.key"),
		"--kubelet-preferred-address-types=InternalIP",
		"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
		"--service-account-key-file=" + in("sa.crt"), "--service-account-signing-key-file=" + in("sa.key"),
		// Aggregated API servers, which some of upstream's tests bring.
		"--requestheader-client-ca-file=" + in("ca.crt"), "--requestheader-allowed-names=front-proxy",
		"--requestheader-username-headers=X-Remote-User", "--requestheader-group-headers=X-Remote-Group",
		"--requestheader-extra-headers-prefix=X-Remote-Extra-",
	}
}

func (c *Cluster) controllerManagerFlags() []string {
	in := func(name string) string { return filepath.Join(kubernetesDir, name) }
	flags := []string{
		"--kubeconfig=" + in("kube-controller-manager.kubeconfig"), "--leader-elect=false", "--bind-address=127.0.0.1",
		"--use-service-account-credentials", "--root-ca-file=" + in("ca.crt"), "--service-account-private-key-file=" + in("sa.key"),
		"--cluster-signing-cert-file=" + in("ca.crt"), "--cluster-signing-key-file=" + in("ca.key"),
		"--service-cluster-ip-range=" + c.opt.Ranges.Services,
	}
	if !c.opt.NoPodCIDRs {
		flags = append(flags, "--allocate-node-cidrs", "--cluster-cidr="+c.opt.Ranges.Pods, "--node-cidr-mask-size-ipv4=24", "--node-cidr-mask-size-ipv6=64")
	}
	return flags
}
