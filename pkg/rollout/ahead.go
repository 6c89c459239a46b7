package rollout

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/secret"
	"github.com/headcni/headcni/pkg/doctor"
	"github.com/headcni/headcni/pkg/doctor/preflight"
	"github.com/headcni/headcni/pkg/findings"
	"github.com/headcni/headcni/pkg/headscale"
	"github.com/headcni/headcni/pkg/kube"
)

// clusterRole is the chart's, by which a cluster says who installed it: there is one HeadCNI in a cluster.
const clusterRole = "/apis/rbac.authorization.k8s.io/v1/clusterroles/headcni"

// ask is Cluster.Timeout for everything that is asked ahead.
func (r *run) ask(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, r.Cluster.Timeout)
}

// checkCluster asks whether it answers, and whether what is to be done may be done.
func (r *run) checkCluster(ctx context.Context) error {
	ctx, cancel := r.ask(ctx)
	defer cancel()
	var version struct {
		GitVersion string `json:"gitVersion"`
	}
	if err := r.Raw.Get(ctx, "/version", &version); err != nil {
		return fmt.Errorf("the cluster%s does not answer: %w\ncheck --kubeconfig, --context or KUBECONFIG; on K3s: export KUBECONFIG=/etc/rancher/k3s/k3s.yaml", r.contextText(), err)
	}
	r.ok("the cluster%s answers: Kubernetes %s", r.contextText(), version.GitVersion)
	for _, right := range []kube.Right{
		{Verb: "create", Resource: "daemonsets", Group: "apps", Namespace: r.Namespace}, {Verb: "create", Resource: "secrets", Namespace: r.Namespace},
		{Verb: "create", Resource: "pods/exec", Namespace: r.Namespace},
		{Verb: "create", Resource: "clusterrolebindings", Group: "rbac.authorization.k8s.io"},
		{Verb: "escalate", Resource: "clusterroles", Group: "rbac.authorization.k8s.io"}, {Verb: "list", Resource: "nodes"},
	} {
		may, err := r.Raw.May(ctx, right)
		if err != nil {
			return err
		}
		if !may {
			r.fault("you may not "+right.String(), "use a kubeconfig with the rights of cluster-admin")
		}
	}
	if err := r.findRelease(ctx); err != nil {
		return err
	}
	_, err := r.Cluster.Client.Namespaces().Get(ctx, r.Namespace, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		r.newNamespace = true
		r.ok("the namespace %s will be made", r.Namespace)
	} else if err != nil {
		return err
	}
	return r.checkSecret(ctx)
}

func (r *run) contextText() string {
	if r.Context == "" {
		return ""
	}
	return " of context " + r.Context
}

// findRelease sets what Helm calls the release, if there is one.
func (r *run) findRelease(ctx context.Context) error {
	var role metav1.PartialObjectMetadata
	err := r.Raw.Get(ctx, clusterRole, &role)
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look for a HeadCNI that is there: %w", err)
	}
	name, namespace := role.Annotations["meta.helm.sh/release-name"], role.Annotations["meta.helm.sh/release-namespace"]
	switch {
	case name == "":
		return nil // not by Helm, which says so itself
	case namespace == r.Namespace:
		r.release, r.there = name, true
	default:
		r.fault(fmt.Sprintf("HeadCNI is in this cluster already: helm status %s -n %s", name, namespace),
			fmt.Sprintf("upgrade it: -n %s; or take it off first: headcnictl uninstall --yes -n %[1]s", namespace))
	}
	return nil
}

func (r *run) checkSecret(ctx context.Context) error {
	if !r.Key.Empty() || r.foreignSecret() {
		return nil
	}
	s, err := r.Cluster.Client.Secrets(r.Namespace).Get(ctx, kube.AuthSecret, metav1.GetOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return err
	}
	if err == nil {
		r.held = secret.New(strings.TrimSpace(string(s.Data[kube.AuthSecretKey])))
	}
	if r.held.Empty() && !r.Upgrade {
		r.fault("no key was given, and the cluster has none", "give one: --key-file - (standard input; deploy-with-helm.sh: -k -), or HEADSCALE_API_KEY_FILE")
	}
	return nil
}

// readConfig has Helm render the chart and reads the daemon's configuration out of that, so that values that the chart does not take are found
// before anything is changed.
func (r *run) readConfig(ctx context.Context) error {
	out, err := r.helm.run(ctx, slices.Concat([]string{"template", r.release, r.chart, "--show-only", "templates/config.yaml"}, r.values())...)
	if err != nil {
		return fmt.Errorf("the chart does not take these values: %w", err)
	}
	var object corev1.ConfigMap
	if err := yaml.Unmarshal(out, &object); err != nil {
		return fmt.Errorf("read what helm template printed: %w", err)
	}
	file := filepath.Join(r.dir, "daemon.yaml")
	if err := os.WriteFile(file, []byte(object.Data["daemon.yaml"]), 0o600); err != nil {
		return err
	}
	if r.config, err = config.Load(file, false, nil, nil); err != nil {
		return fmt.Errorf("the chart's values: %w", err)
	}
	r.config.Headscale.APIKeyFile, r.config.Headscale.AuthKeyFile = "", "" // in the containers
	r.config.Headscale.CAFile = ""
	if ca := object.Data["ca.crt"]; ca != "" { // of --ca, or of values, which an upgrade keeps
		r.config.Headscale.CAFile = filepath.Join(r.dir, "ca.crt")
		return os.WriteFile(r.config.Headscale.CAFile, []byte(ca), 0o600)
	}
	return nil
}

// checkNodes looks for other pod networks, for Nodes without pod CIDRs, and for ranges that are taken.
func (r *run) checkNodes(ctx context.Context) error {
	ctx, cancel := r.ask(ctx)
	defer cancel()
	list, err := r.Cluster.Client.Nodes().List(ctx, metav1.ListOptions{LabelSelector: corev1.LabelOSStable + "=linux"})
	if err != nil {
		return fmt.Errorf("list the Nodes: %w", err)
	}
	if len(list.Items) == 0 {
		return errors.New("the cluster has no Linux nodes\nlet one join")
	}
	r.ok("%d %s", len(list.Items), doctor.Plural(len(list.Items), "node"))
	var none, others []string
	for _, n := range list.Items {
		cidrs, err := kube.PodCIDRs(&n)
		if err != nil {
			r.fault(err.Error(), "see kube-controller-manager's --cluster-cidr")
		}
		if len(cidrs) == 0 {
			none = append(none, n.Name)
		}
		r.ranges = append(r.ranges, cidrs...)
		if n.Annotations["flannel.alpha.coreos.com/backend-type"] != "" {
			others = append(others, "flannel on "+n.Name)
		}
		if n.Labels["microk8s.io/cluster"] == "true" && !r.gives("binDir", "confDir") && !r.Upgrade { // which keeps them
			// Its snap has folders of its own, and a pod cannot find that out.
			r.more = []string{"--set", "config.cni.binDir=/var/snap/microk8s/current/opt/cni/bin", "--set", "config.cni.confDir=/var/snap/microk8s/current/args/cni-network"}
		}
	}
	sets, err := r.Cluster.Client.DaemonSets("").List(ctx, metav1.ListOptions{})
	if err != nil {
		return fmt.Errorf("list the DaemonSets: %w", err)
	}
	for _, s := range sets.Items {
		if podNetwork(s.Name) {
			others = append(others, s.Namespace+"/"+s.Name)
		}
	}
	if others != nil && !r.config.CNI.Exclusive {
		r.warn("another pod network is here: "+strings.Join(others, ", "), "take it off first, or have the nodes prefer ours: --set config.cni.exclusive=true")
	}
	if none != nil && len(r.config.Network.ClusterCIDRs) == 0 {
		r.warn("without pod CIDRs: "+strings.Join(none, ", "),
			"start kube-controller-manager with --allocate-node-cidrs and --cluster-cidr, or give the pool: --set 'config.network.clusterCIDRs={10.244.0.0/16}'")
	}
	r.nodeCIDRs = r.ranges
	if pool := kube.KubeadmPods(ctx, r.Cluster.Client); pool != nil {
		r.ranges = pool
	} else if pool := r.config.Network.ClusterCIDRs.Prefixes(); len(pool) > 0 {
		r.ranges = pool
	}
	r.checkAddresses(list.Items)
	return nil
}

// checkAddresses compares the Nodes' own addresses with what is to be pods, and with what is the tailnet's.
func (r *run) checkAddresses(nodes []corev1.Node) {
	pods := netset.Union(slices.Concat(r.ranges, r.nodeCIDRs))
	for _, n := range nodes {
		for _, a := range n.Status.Addresses {
			addr, err := netip.ParseAddr(a.Address)
			if err != nil || a.Type != corev1.NodeInternalIP {
				continue
			}
			for _, p := range pods {
				if p.Contains(addr) {
					r.found(doctor.Found(findings.RangeOverlapsHost, n.Name, "", fmt.Sprintf("Node %s is at %s, inside the pods' %s", n.Name, addr, p)))
				}
			}
		}
	}
	for _, p := range pods {
		if p.Overlaps(netset.TailnetIPv4) {
			r.found(doctor.Found(findings.RangeOverlapsHost, "cluster", "", fmt.Sprintf("the pods' %s is inside the tailnet's %s", p, netset.TailnetIPv4)))
		}
	}
}

// podNetwork knows others' DaemonSets by their names.
func podNetwork(name string) bool {
	return strings.Contains(name, "flannel") || slices.Contains([]string{
		"calico-node", "canal", "rke2-canal", "cilium", "weave-net", "kindnet", "antrea-agent", "kube-router", "aws-node", "azure-cns", "ovnkube-node", "kube-ovn-cni", "netd",
	}, name)
}

// checkHeadscale asks Headscale what a node would: is it there, does it take the key, does its policy know the pods?
func (r *run) checkHeadscale(ctx context.Context) {
	key := r.Key
	if key.Empty() {
		key = r.held
	}
	kind, known := headscale.KindByPrefix(key)
	switch {
	case known:
		r.kind = kind
	case strings.Contains(key.Reveal(), "."): // before 0.28 API keys had a dot, and pre-auth keys none
		r.kind = headscale.KindAPI
	case !key.Empty():
		r.kind = headscale.KindPreAuth
	}
	if r.SkipHeadscale {
		return
	}
	c := r.config
	c.Network.ClusterCIDRs = nil
	for _, p := range r.ranges {
		c.Network.ClusterCIDRs = append(c.Network.ClusterCIDRs, p.String())
	}
	check := preflight.Control(ctx, c, func(name string) string {
		if name == keyVariables[0] {
			return key.Reveal()
		}
		return ""
	})
	if check.OK != "" {
		r.ok("%s", check.OK)
	}
	for _, f := range check.Found {
		r.found(f)
	}
}
