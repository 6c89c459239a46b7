package sysdump

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/headcni/headcni/pkg/doctor"
	"github.com/headcni/headcni/pkg/kube"
	"github.com/headcni/headcni/pkg/kube/podexec"
)

// LogLines is how much of each log is gathered.
const LogLines = 10000

// Logs reads the end of a container's log.
type Logs func(ctx context.Context, pod podexec.Pod, lines int) ([]byte, error)

// Cluster gathers from the API server, and from all nodes at once.
func (a *Archive) Cluster(ctx context.Context, c doctor.Cluster, seen doctor.Seen, logs Logs) {
	a.hidePods(ctx, c)
	a.objects(ctx, c)
	type answer struct {
		folder string
		part   Part
		err    error
		logs   map[string][]byte
	}
	answers := make([]answer, len(seen.Nodes)+len(seen.Controllers))
	var wg sync.WaitGroup
	free := make(chan struct{}, 8)
	each := func(i int, folder string, do func(ctx context.Context, a *answer)) {
		answers[i].folder = folder
		wg.Go(func() {
			free <- struct{}{}
			defer func() { <-free }()
			ctx, cancel := context.WithTimeout(ctx, c.Timeout)
			defer cancel()
			do(ctx, &answers[i])
		})
	}
	get := func(ctx context.Context, an *answer, name string, pod podexec.Pod) {
		if pod.Name == "" {
			return
		}
		b, err := logs(ctx, pod, LogLines)
		if err != nil {
			an.err = errors.Join(an.err, fmt.Errorf("log of pod %s: %w", pod.Name, err))
			return
		}
		an.logs[name] = b
	}
	for i, n := range seen.Nodes {
		each(i, "nodes/"+n.Name, func(ctx context.Context, an *answer) {
			an.logs = map[string][]byte{}
			if n.Pod.Name == "" {
				an.err = n.Err
				return
			}
			get(ctx, an, "daemon.log", n.Pod)
			get(ctx, an, "tailscaled.log", n.Tailscaled)
			out, err := c.Exec(ctx, n.Pod, "headcnictl", "sysdump", "part")
			if err == nil {
				err = json.Unmarshal(out, &an.part)
			}
			if err != nil {
				an.err = errors.Join(an.err, fmt.Errorf("ask pod %s: %w", n.Pod.Name, err))
			}
		})
	}
	for i, p := range seen.Controllers {
		each(len(seen.Nodes)+i, "controller/"+p.Pod.Name, func(ctx context.Context, an *answer) {
			an.logs = map[string][]byte{}
			get(ctx, an, "controller.log", p.Pod)
		})
	}
	wg.Wait()
	for _, an := range answers {
		a.Hide(an.part.Names...) // before the first file: nodes speak of each other's pods
	}
	for _, an := range answers {
		a.AddPart(an.folder, an.part)
		for name, b := range an.logs {
			a.Add(an.folder+"/"+name, b)
		}
		if an.err != nil {
			a.Lacks(an.folder, an.err)
		}
	}
}

// hidePods learns the names of all pods where they are to be masked.
func (a *Archive) hidePods(ctx context.Context, c doctor.Cluster) {
	if a.masker.salt == nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, max(c.Timeout, 30*time.Second))
	defer cancel()
	pods, err := c.Client.Pods(metav1.NamespaceAll).List(ctx, metav1.ListOptions{})
	if err != nil {
		a.Lacks("the names of pods, so that those in logs and Events are not masked", err)
		return
	}
	for _, p := range pods.Items {
		if p.Labels["app.kubernetes.io/name"] != "headcni" {
			a.Hide(p.Name, p.Namespace)
		}
	}
}

// objects adds what the API server has, without what only fills lines. Secrets are not read.
func (a *Archive) objects(ctx context.Context, c doctor.Cluster) {
	ctx, cancel := context.WithTimeout(ctx, max(c.Timeout, 30*time.Second))
	defer cancel()
	add := func(name string, list runtime.Object, err error) {
		if err != nil {
			a.Lacks("cluster/"+name, err)
			return
		}
		b, err := asJSON(list, nil)
		if err != nil {
			a.Lacks("cluster/"+name, err)
			return
		}
		a.Add("cluster/"+name, b)
	}
	bare := func(o *metav1.ObjectMeta) {
		o.ManagedFields = nil
		delete(o.Annotations, corev1.LastAppliedConfigAnnotation)
	}
	nodes, err := c.Client.Nodes().List(ctx, metav1.ListOptions{})
	for i := range itemsOf(nodes, err) {
		n := &nodes.Items[i]
		bare(&n.ObjectMeta)
		n.Status.Images = nil
		if a.masker.salt != nil {
			a.Hide(n.Name)
			for _, addr := range n.Status.Addresses {
				a.Hide(addr.Address)
			}
		}
	}
	add("nodes.json", nodes, err)
	pods, err := c.Client.Pods(c.Namespace).List(ctx, metav1.ListOptions{LabelSelector: doctor.Labels})
	if err == nil {
		for i := range pods.Items {
			bare(&pods.Items[i].ObjectMeta)
		}
	}
	add("pods.json", pods, err)
	policies, err := c.Client.NetworkPolicies(metav1.NamespaceAll).List(ctx, metav1.ListOptions{})
	if err == nil {
		for i := range policies.Items {
			bare(&policies.Items[i].ObjectMeta)
			a.Hide(policies.Items[i].Name, policies.Items[i].Namespace)
		}
	}
	add("networkpolicies.json", policies, err)
	for _, ns := range []string{metav1.NamespaceDefault, c.Namespace} {
		events, err := c.Client.Events(ns).List(ctx, metav1.ListOptions{})
		if err == nil {
			for i := range events.Items {
				bare(&events.Items[i].ObjectMeta)
			}
		}
		add("events-"+ns+".json", events, err)
	}
	for _, name := range []string{"headcni-config", kube.Memory, "coredns"} {
		m, err := c.Client.ConfigMaps(c.Namespace).Get(ctx, name, metav1.GetOptions{})
		if err == nil {
			bare(&m.ObjectMeta)
		}
		add("configmap-"+name+".json", m, err)
	}
}

func itemsOf(nodes *corev1.NodeList, err error) []corev1.Node {
	if err != nil {
		return nil
	}
	return nodes.Items
}
