package rollout

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/headcni/headcni/internal/version"
	"github.com/headcni/headcni/pkg/doctor"
	"github.com/headcni/headcni/pkg/kube"
	"github.com/headcni/headcni/pkg/kube/podexec"
	"github.com/headcni/headcni/pkg/reconcile"
)

const (
	// interval is how often a cluster is looked at.
	interval = 2 * time.Second
	// imagePatience is how long pods may lack their image: another pod of theirs may just have been deleted.
	imagePatience = 10 * time.Second
	testPod       = "headcni-test"
)

// look is one look at a cluster: what is missing, in a few words, and the report.
type look struct {
	missing []string
	report  doctor.Report
	seen    doctor.Seen
}

// wait looks until every node is right, as `headcnictl status` has it, with what was rolled out, and Ready.
func (r *run) wait(ctx context.Context, until time.Time) error {
	before := ""
	var imageless time.Time
	for {
		l := r.look(ctx)
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case len(l.missing) == 0:
			r.ok("%d of %[1]d %s right, and Ready", len(l.seen.Nodes), doctor.Plural(len(l.seen.Nodes), "node"))
			return nil
		}
		text := strings.Join(l.missing, "; ")
		if pods, err := r.imageless(ctx); err != nil || len(pods) == 0 {
			imageless = time.Time{}
		} else if imageless.IsZero() {
			imageless = time.Now()
		} else if time.Since(imageless) >= imagePatience { // waiting longer does not help
			r.fault("nodes cannot get the image: "+strings.Join(pods, ", "), "see below")
			r.noImage = true
			return r.giveUp()
		}
		if !time.Now().Before(until) {
			r.say("FAIL  %s\n", text)
			r.tell(ctx, l)
			return r.giveUp()
		}
		if text != before {
			r.say("wait  %s", text)
			before = text
		}
		reconcile.Sleep(ctx, min(interval, max(time.Until(until), 0)))
	}
}

// look asks everything.
func (r *run) look(ctx context.Context) (l look) {
	asked, cancel := r.ask(ctx)
	rolling, wanted, err := r.rolling(asked)
	cancel()
	if err != nil {
		l.missing = append(l.missing, "the API server: "+err.Error())
		return l
	}
	l.missing = rolling
	if l.seen, err = r.Cluster.Look(ctx); err != nil {
		l.missing = append(l.missing, err.Error())
		return l
	}
	if l.report = doctor.NewReport(version.Version, l.seen, false); !l.report.OK {
		l.missing = append(l.missing, l.report.Summary())
	}
	for _, n := range l.seen.Nodes {
		if !n.Away.IsZero() {
			l.missing = append(l.missing, "node "+n.Name+" is not Ready")
		}
	}
	if len(l.seen.Nodes) < wanted { // those that an uninstall has left are not looked at
		l.missing = append(l.missing, fmt.Sprintf("%d of %d nodes have an annotation %s", wanted-len(l.seen.Nodes), wanted, kube.Uninstalled))
	}
	return l
}

// rolling says which of our programs are not yet those of the newest revision. tailscaled's are replaced when their node's administrator says so.
// wanted is how many nodes are to have a daemon.
func (r *run) rolling(ctx context.Context) (out []string, wanted int, err error) {
	say := func(kind, name string, ready, want int32) {
		out = append(out, fmt.Sprintf("%s %s: %d of %d new and ready", kind, name, ready, want))
	}
	set, err := r.Cluster.Client.DaemonSets(r.Namespace).Get(ctx, kube.Daemon, metav1.GetOptions{})
	if err != nil {
		return nil, 0, err
	}
	wanted = int(set.Status.DesiredNumberScheduled)
	if s := set.Status; s.ObservedGeneration < set.Generation || s.DesiredNumberScheduled == 0 || min(s.UpdatedNumberScheduled, s.NumberReady) < s.DesiredNumberScheduled {
		say("DaemonSet", set.Name, min(s.UpdatedNumberScheduled, s.NumberReady), s.DesiredNumberScheduled)
	}
	dep, err := r.Cluster.Client.Deployments(r.Namespace).Get(ctx, kube.Controller, metav1.GetOptions{})
	if err != nil {
		return nil, wanted, err
	}
	want := int32(1)
	if dep.Spec.Replicas != nil {
		want = *dep.Spec.Replicas
	}
	if s := dep.Status; s.ObservedGeneration < dep.Generation || min(s.UpdatedReplicas, s.ReadyReplicas) < want {
		say("Deployment", dep.Name, min(s.UpdatedReplicas, s.ReadyReplicas), want)
	}
	return out, wanted, nil
}

// imageless are our pods whose image their node cannot get.
func (r *run) imageless(ctx context.Context) (names []string, err error) {
	ctx, cancel := r.ask(ctx)
	defer cancel()
	list, err := r.Cluster.Client.Pods(r.Namespace).List(ctx, metav1.ListOptions{LabelSelector: doctor.Labels})
	if err != nil {
		return nil, err
	}
	for _, p := range list.Items {
		if slices.ContainsFunc(slices.Concat(p.Status.InitContainerStatuses, p.Status.ContainerStatuses), func(s corev1.ContainerStatus) bool {
			return s.State.Waiting != nil && slices.Contains([]string{"ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"}, s.State.Waiting.Reason)
		}) {
			names = append(names, p.Name)
		}
	}
	return names, nil
}

// tell prints what is not right, as status does, and the last words of programs that do not answer.
func (r *run) tell(ctx context.Context, l look) {
	if l.report.Version != "" {
		_ = doctor.Text{Now: time.Now()}.Status(r.Out, l.report) // as every line
	}
	last := func(p podexec.Pod, err error) {
		if err == nil || p.Name == "" {
			return
		}
		ctx, cancel := r.ask(ctx)
		defer cancel()
		if out, bad := podexec.Log(ctx, r.Config, p, 1); bad == nil && len(out) > 0 {
			r.say("%s, last log line: %s", p.Name, strings.TrimSpace(string(out)))
		}
	}
	for _, n := range l.seen.Nodes {
		last(n.Pod, n.Err)
	}
	for _, c := range l.seen.Controllers {
		last(c.Pod, c.Err)
	}
}

// try has the chart start a pod on every node, and another ask all of them by their addresses.
func (r *run) try(ctx context.Context, left time.Duration) error {
	r.say("wait  pods on all nodes answer")
	_, err := r.helm.run(ctx, "test", r.release, "--timeout", fmt.Sprintf("%ds", int(left.Seconds())))
	if err == nil || ctx.Err() != nil {
		r.removeTest(context.WithoutCancel(ctx))
		if err == nil {
			r.ok("a pod on every node answers another pod")
		}
		return err
	}
	r.say("FAIL  not every pod answers:")
	r.tellTest(ctx, err)
	r.removeTest(ctx)
	r.say("")
	r.tell(ctx, r.look(ctx))
	return r.giveUp()
}

func (r *run) tellTest(ctx context.Context, err error) {
	ctx, cancel := r.ask(ctx)
	defer cancel()
	out, bad := podexec.Log(ctx, r.Config, podexec.Pod{Namespace: r.Namespace, Name: testPod}, 20)
	if bad != nil || len(out) == 0 {
		out = []byte(err.Error())
	}
	for line := range strings.Lines(string(out)) {
		r.say("      %s", strings.TrimRight(line, "\n"))
	}
	list, err := r.Cluster.Client.Pods(r.Namespace).List(ctx, metav1.ListOptions{LabelSelector: "headcni.io/test=answer"})
	if err != nil {
		return // the other error says enough
	}
	for _, p := range list.Items {
		if p.Status.Phase != corev1.PodRunning {
			r.say("      on %s the pod has not started", p.Spec.NodeName)
		}
	}
}

// removeTest takes away what `helm test` left: its pod, and after a failure all of it.
func (r *run) removeTest(ctx context.Context) {
	ctx, cancel := r.ask(ctx)
	defer cancel()
	var errs []error
	for _, kind := range []string{"/api/v1 pods", "/apis/apps/v1 daemonsets", "/api/v1 serviceaccounts", "/apis/rbac.authorization.k8s.io/v1 rolebindings", "/apis/rbac.authorization.k8s.io/v1 roles"} {
		group, resource, _ := strings.Cut(kind, " ")
		errs = append(errs, r.Raw.Delete(ctx, fmt.Sprintf("%s/namespaces/%s/%s/%s", group, r.Namespace, resource, testPod)))
	}
	if err := errors.Join(errs...); err != nil && !apierrors.IsNotFound(err) {
		r.warn("the test's pods stay: "+err.Error(), "helm uninstall takes them, and so does the next run")
	}
}
