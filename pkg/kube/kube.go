// Package kube holds what the node daemon, the controller and the chart must agree on in Kubernetes: names, the
// annotations on Node objects, and how to reach the API server.
package kube

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// Names of objects in our own namespace. The chart uses the same ones whatever the release is called: two HeadCNIs in
// one cluster would fight over its nodes.
const (
	// Daemon is the DaemonSet of the node daemon.
	Daemon = "headcni"
	// DaemonAccount is the service account of the node daemon; the admission policy holds it to its own Node.
	DaemonAccount = "headcni"
	// AuthSecret is the user's: the API key or pre-auth key for Headscale.
	AuthSecret    = "headcni-auth"
	AuthSecretKey = "api-key"
	// JoinSecret is the controller's: a short-lived key with which nodes join.
	JoinSecret    = "headcni-join"
	JoinSecretKey = "auth-key"
	// Lease is what the controllers' leader holds.
	Lease = "headcni-controller"
	// Memory is the ConfigMap in which the controller records which node of the tailnet belongs to which Node.
	Memory = "headcni-controller"
	// Records is the ConfigMap with the names of Services, for a Headscale that reads it as dns.extra_records_path.
	Records    = "headcni-dns-records"
	RecordsKey = "extra-records.json"
	// Controller is the controllers' Deployment.
	Controller = "headcni-controller"
)

// Annotations on Node objects.
const (
	prefix = "headcni.io/"

	// These are written by the node's own daemon. NodeKey is tailscaled's public key, nodekey:<hex>: it says which node of the
	// tailnet this Node is. Mode is "host" or "daemon", TailnetIPs are addresses separated by commas.
	NodeKey    = prefix + "node-key"
	Mode       = prefix + "mode"
	TailnetIPs = prefix + "tailnet-ips"
	// TailnetDomain is the domain of the tailnet's names, as its tailscaled knows it.
	TailnetDomain = prefix + "tailnet-domain"
	// Headscale is written by the controller: the node as Headscale sees it, a View as JSON.
	Headscale = prefix + "headscale"
	// Allocated is "true" where the controller gave the Node its pod CIDRs.
	Allocated = prefix + "allocated"
	// Uninstall asks the node's daemon to remove everything of ours from its node. The daemon then sets Uninstalled and does
	// nothing more.
	Uninstall   = prefix + "uninstall"
	Uninstalled = prefix + "uninstalled"
)

// Annotations of the Secret JoinSecret: when its key ends, and Headscale's number of it.
const (
	JoinExpires = prefix + "expires"
	JoinID      = prefix + "key-id"
)

// TailnetName, on a Service, is the name that it wants in the tailnet, without the tailnet's domain.
const TailnetName = prefix + "tailnet-name"

// TailnetSubnets, on a Namespace, are the networks behind devices of the tailnet that its pods may use: prefixes separated by commas.
const TailnetSubnets = prefix + "tailnet-subnets"

// States of a View.
const (
	// StateRouted: the routes in View.Routes lead to the node.
	StateRouted = "routed"
	// StatePending: approved, or about to be; Message says what is missing.
	StatePending = "pending"
	// StateRefused: the controller does not approve the node's CIDRs; Message says why.
	StateRefused = "refused"
	// StateUnknown: Headscale has no node with this key: it was deleted there, or belongs to another server.
	StateUnknown = "unknown"
	// StateUnseen: the controller has a pre-auth key only and can see nothing.
	StateUnseen = "unseen"
)

// View is a node as Headscale sees it. It is valid for NodeKey only.
type View struct {
	NodeKey string         `json:"nodeKey"`
	State   string         `json:"state"`
	Routes  []netip.Prefix `json:"routes,omitempty"`
	// Services are the ranges of services, or addresses of some, that the node is to lead the tailnet to. Those are no part of the State.
	Services []netip.Prefix `json:"services,omitempty"`
	// Expiry of the node key; nil where it does not expire.
	Expiry  *time.Time `json:"expiry,omitempty"`
	Message string     `json:"message,omitempty"`
}

// ViewOf reads the controller's view from a Node; ok is false where there is none.
func ViewOf(n *corev1.Node) (v View, ok bool, err error) {
	text, ok := n.Annotations[Headscale]
	if !ok {
		return View{}, false, nil
	}
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		return View{}, false, fmt.Errorf("annotation %s of Node %s: %w", Headscale, n.Name, err)
	}
	return v, true, nil
}

// String is the annotation's value.
func (v View) String() string {
	b, err := json.Marshal(v)
	if err != nil {
		return "" // no field of a View can fail
	}
	return string(b)
}

// PodCIDRs returns the pod CIDRs of a Node, in its order. A malformed one is an error.
func PodCIDRs(n *corev1.Node) ([]netip.Prefix, error) {
	texts := n.Spec.PodCIDRs
	if len(texts) == 0 && n.Spec.PodCIDR != "" {
		texts = []string{n.Spec.PodCIDR}
	}
	var out []netip.Prefix
	for _, s := range texts {
		p, err := netip.ParsePrefix(s)
		if err != nil || p != p.Masked() {
			return nil, fmt.Errorf("pod CIDR %q of Node %s is not a network prefix", s, n.Name)
		}
		out = append(out, p)
	}
	return out, nil
}

// ClusterIPs are a Service's own addresses; a headless one has none.
func ClusterIPs(s *corev1.Service) (out []netip.Addr) {
	for _, text := range s.Spec.ClusterIPs {
		if ip, err := netip.ParseAddr(text); err == nil { // "None" is none
			out = append(out, ip)
		}
	}
	return out
}

// ErrNotInCluster means that the address of the API server is not known.
var ErrNotInCluster = errors.New("no Kubernetes API server: neither in a pod (KUBERNETES_SERVICE_HOST) nor given a kubeconfig")

// Config says how to reach the API server: by kubeconfig where it is given, else as a pod.
func Config(kubeconfig, userAgent string) (*rest.Config, error) {
	var c *rest.Config
	var err error
	if kubeconfig != "" {
		c, err = clientcmd.BuildConfigFromFlags("", kubeconfig)
	} else {
		c, err = rest.InClusterConfig()
	}
	if errors.Is(err, rest.ErrNotInCluster) {
		return nil, ErrNotInCluster
	}
	if err != nil {
		return nil, fmt.Errorf("find the Kubernetes API server: %w", err)
	}
	c.UserAgent = userAgent
	// Protobuf takes a fraction of JSON's memory and time for the built-in types.
	c.ContentType = "application/vnd.kubernetes.protobuf"
	c.AcceptContentTypes = c.ContentType + ",application/json"
	return c, nil
}

// DefaultNamespace is the one our own objects are in where nothing says otherwise.
const DefaultNamespace = "kube-system"

// Namespace is the one our own objects are in: POD_NAMESPACE, the pod's own, else the default.
func Namespace(getenv func(string) string) string {
	if ns := getenv("POD_NAMESPACE"); ns != "" {
		return ns
	}
	if b, err := os.ReadFile("/var/run/secrets/kubernetes.io/serviceaccount/namespace"); err == nil {
		if ns := strings.TrimSpace(string(b)); ns != "" {
			return ns
		}
	}
	return DefaultNamespace
}
