// Package rollout installs the chart in a cluster: it looks ahead, has Helm install, waits until every node is right, and tries it; and it takes
// it off again.
package rollout

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/yaml"

	"github.com/headcni/headcni/chart"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/secret"
	"github.com/headcni/headcni/pkg/doctor"
	"github.com/headcni/headcni/pkg/headscale"
	"github.com/headcni/headcni/pkg/kube"
)

// Rollout is what is to be done to a cluster.
type Rollout struct {
	Options
	Cluster *doctor.Cluster
	Config  *rest.Config
	Raw     kube.Raw
	// Out gets a line for each step.
	Out io.Writer
}

// ErrSaid means that what is wrong was said already.
var ErrSaid = errors.New("not done")

// defaultRelease is what Helm calls a release of ours that is not there yet.
const defaultRelease = "headcni"

// run is a Rollout under way.
type run struct {
	Rollout
	helm    helm
	dir     string // of files of ours, gone at the end
	chart   string
	release string
	// there: the cluster has the release. installing: it may have a part of it.
	there, installing bool
	failed            bool
	newNamespace      bool
	// held is the key that the cluster has.
	held secret.Secret
	kind headscale.Kind // "" where it is not known
	more []string       // of Helm's flags, by what the cluster is
	// config is the daemon's, as the chart makes it.
	config config.Config
	// ranges are those that pods have addresses in; nodeCIDRs are the Nodes'.
	ranges, nodeCIDRs []netip.Prefix
	noImage           bool
}

// begin makes a run. end takes away what it left on this machine.
func (r Rollout) begin(ctx context.Context, atLeast ...int) (_ *run, end func(), err error) {
	out := &run{Rollout: r, helm: helm{r.Namespace, r.Kubeconfig, r.Context}, release: defaultRelease}
	version, err := out.helm.version(ctx, atLeast...)
	if err != nil {
		return nil, nil, err
	}
	if out.dir, err = os.MkdirTemp("", "headcnictl-"); err != nil {
		return nil, nil, err
	}
	end = func() { _ = os.RemoveAll(out.dir) } // what is left is no secret
	out.ok("helm %s", version)
	if out.chart = r.Chart; out.chart == "" {
		out.chart = filepath.Join(out.dir, "headcni")
		if err := os.CopyFS(out.chart, chart.Files); err != nil {
			end()
			return nil, nil, err
		}
	} else if _, err := os.Stat(out.chart); err != nil {
		end()
		return nil, nil, fmt.Errorf("--chart: %w", err)
	}
	return out, end, nil
}

func (r *run) say(format string, args ...any) { fmt.Fprintf(r.Out, format+"\n", args...) }
func (r *run) ok(format string, args ...any)  { r.say("ok    "+format, args...) }

// warn says what is no reason to stop, and what to do about it.
func (r *run) warn(what, do string) { r.say("warn  %s\n      %s", what, do) }

// fault says what is one. Other checks go on.
func (r *run) fault(what, do string) {
	r.failed = true
	r.say("FAIL  %s\n      %s", what, do)
}

func (r *run) found(f doctor.Finding) {
	what := fmt.Sprintf("%s  %s: %s", f.ID, f.Title, f.Cause)
	if f.Wrong() {
		r.fault(what, f.Remedy)
	} else {
		r.warn(what, f.Remedy)
	}
}

// Install installs or upgrades. It changes nothing where what can be known ahead speaks against it.
func (r Rollout) Install(ctx context.Context) error {
	atLeast := []int{3}
	if r.Upgrade {
		atLeast = []int{3, 14} // --reset-then-reuse-values
	}
	x, end, err := r.begin(ctx, atLeast...)
	if err != nil {
		return err
	}
	defer end()
	if err := x.install(ctx); err != nil {
		if ctx.Err() != nil {
			x.interrupted()
			return context.Cause(ctx)
		}
		return err
	}
	return nil
}

func (r *run) install(ctx context.Context) error {
	until := time.Now().Add(r.Timeout)
	if err := r.checkCluster(ctx); err != nil {
		return err
	}
	if r.Upgrade {
		if err := r.keepValues(ctx); err != nil {
			return err
		}
	}
	if err := r.readConfig(ctx); err != nil {
		return err
	}
	if err := r.checkNodes(ctx); err != nil {
		return err
	}
	r.checkHeadscale(ctx)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if r.failed {
		r.say("Nothing was changed.")
		return ErrSaid
	}
	rekeyed, err := r.putSecret(ctx)
	if err != nil {
		return err
	}
	if err := r.upgrade(ctx, time.Until(until)); err != nil {
		return err
	}
	if rekeyed { // it would see the new key in two minutes
		if err := r.restartController(ctx); err != nil {
			return err
		}
	}
	if err := r.wait(ctx, until); err != nil {
		return err
	}
	if err := r.try(ctx, max(time.Until(until), 30*time.Second)); err != nil {
		return err
	}
	if r.kind == headscale.KindPreAuth {
		r.warn("with a pre-auth key any tagged node may announce any pod range that the policy approves", "an API key lets the controller approve exactly each node's own")
	}
	r.say("done  HeadCNI runs in namespace %s. Its end: %s", r.Namespace, r.removal())
	return nil
}

func (r *run) removal() string {
	if r.Namespace == kube.DefaultNamespace {
		return "headcnictl uninstall --yes"
	}
	return "headcnictl uninstall --yes -n " + r.Namespace
}

func (r *run) interrupted() {
	if r.installing {
		r.say("Interrupted; HeadCNI may be installed in part. Run this again to go on, or take it off: %s", r.removal())
	} else {
		r.say("Interrupted. Run this again to go on")
	}
}

// keepValues looks at the release's values, which an upgrade keeps.
func (r *run) keepValues(ctx context.Context) error {
	if !r.there {
		if r.failed {
			return ErrSaid
		}
		return fmt.Errorf("HeadCNI is not in namespace %s: headcnictl install", r.Namespace)
	}
	out, err := r.helm.run(ctx, "get", "values", r.release, "--output", "json")
	if err != nil {
		return err
	}
	var values struct {
		Config struct {
			Headscale struct {
				URL string `json:"url"`
			} `json:"headscale"`
		} `json:"config"`
		Image          struct{ Tag, Digest, Repository string }
		ExistingSecret string `json:"existingSecret"`
	}
	if err := json.Unmarshal(out, &values); err != nil {
		return fmt.Errorf("read the release's values: %w", err)
	}
	if !r.Key.Empty() && values.ExistingSecret != "" && values.ExistingSecret != kube.AuthSecret {
		return fmt.Errorf("the key is in the Secret %s of yours: leave the key out, and see headcnictl key rotate", values.ExistingSecret)
	}
	if r.Image == "" && (values.Image.Tag != "" || values.Image.Digest != "") && !r.gives("tag", "digest") {
		return fmt.Errorf("the release names an image, %s %s%s, which would stay as it is: name the new one by --image", values.Image.Repository, values.Image.Tag, values.Image.Digest)
	}
	// Rendered ahead with the same values; Helm itself keeps them in the release.
	out, key, err := withoutKey(out)
	if err != nil {
		return fmt.Errorf("read the release's values: %w", err)
	}
	file := filepath.Join(r.dir, "values.yaml")
	if err := os.WriteFile(file, out, 0o600); err != nil {
		return err
	}
	r.more = append(r.more, "--values", file)
	if key && (!r.Key.Empty() || r.foreignSecret()) { // the chart would write the key that Helm has over the new one
		r.more = append(r.more, "--set-string", "apiKey=", "--set-string", "config.headscale.authKey=")
		if !r.foreignSecret() {
			r.more = append(r.more, "--set-string", "existingSecret="+kube.AuthSecret)
		}
	}
	return nil
}

// withoutKey takes the key out of a release's values, in JSON, and reports whether there was one.
func withoutKey(values []byte) (_ []byte, held bool, err error) {
	var all map[string]any
	if err := json.Unmarshal(values, &all); err != nil {
		return nil, false, err
	}
	c, _ := all["config"].(map[string]any)
	h, _ := c["headscale"].(map[string]any)
	held = !empty(all["apiKey"]) || !empty(h["authKey"])
	delete(all, "apiKey")
	delete(h, "authKey")
	out, err := json.Marshal(all)
	return out, held, err
}

// values are Helm's flags for what the chart is given.
func (r *run) values() []string { return r.chartFlags(r.more...) }

// putSecret brings the key into the cluster, and reports whether it replaced another. Helm gets the Secret's name only: it keeps all values of a
// release, so a key among them would be in the cluster a second time, in every revision.
func (r *run) putSecret(ctx context.Context) (rekeyed bool, err error) {
	ctx, cancel := r.ask(ctx)
	defer cancel()
	client := r.Cluster.Client
	if r.newNamespace {
		_, err := client.Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{
			Name: r.Namespace, Labels: map[string]string{"pod-security.kubernetes.io/enforce": "privileged"}, // pods use the host's network
		}}, metav1.CreateOptions{})
		if err != nil && !apierrors.IsAlreadyExists(err) {
			return false, fmt.Errorf("make namespace %s: %w", r.Namespace, err)
		}
	}
	if r.Key.Empty() {
		r.ok("the key in the cluster stays")
		return false, nil
	}
	want := r.secret()
	secrets := client.Secrets(r.Namespace)
	have, err := secrets.Get(ctx, want.Name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		_, err = secrets.Create(ctx, want, metav1.CreateOptions{FieldManager: fieldManager})
	case err == nil:
		rekeyed = string(have.Data[kube.AuthSecretKey]) != r.Key.Reveal()
		var patch []byte
		if patch, err = json.Marshal(map[string]any{
			"metadata": map[string]any{"annotations": want.Annotations}, "data": want.Data,
		}); err == nil {
			_, err = secrets.Patch(ctx, want.Name, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: fieldManager})
		}
	}
	if err != nil {
		return false, fmt.Errorf("write the Secret %s/%s: %w", r.Namespace, want.Name, err)
	}
	r.ok("the key from %s is in the Secret %s/%s", r.KeySource, r.Namespace, want.Name)
	return rekeyed, nil
}

const fieldManager = "headcnictl"

// secretLabel marks a Secret that was made by an installation, which goes with it.
const secretLabel = "headcni.io/made-by"

func (r *run) secret() *corev1.Secret {
	return &corev1.Secret{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Secret"},
		ObjectMeta: metav1.ObjectMeta{
			Name: kube.AuthSecret, Namespace: r.Namespace, Labels: map[string]string{secretLabel: "install"},
			// An earlier release may own it, and would take it along.
			Annotations: map[string]string{"helm.sh/resource-policy": "keep"},
		},
		Type: corev1.SecretTypeOpaque, Data: map[string][]byte{kube.AuthSecretKey: []byte(r.Key.Reveal())},
	}
}

// upgrade has Helm install or upgrade.
func (r *run) upgrade(ctx context.Context, left time.Duration) error {
	r.say("wait  helm upgrade --install %s", r.release)
	r.installing = true
	args := []string{"upgrade", "--install", r.release, r.chart, "--timeout", fmt.Sprintf("%ds", max(int(left.Seconds()), 1))}
	if r.Upgrade {
		args = append(args, "--reset-then-reuse-values")
	}
	_, err := r.helm.run(ctx, append(args, r.values()...)...)
	if err != nil && strings.Contains(err.Error(), "another operation") {
		err = fmt.Errorf("%w\nAn earlier run was cut off. Take it back: helm rollback %s -n %s, or for the first install: %s", err, r.release, r.Namespace, r.removal())
	}
	if err != nil {
		return err
	}
	r.ok("the chart is installed")
	return r.lookAgain(ctx)
}

// lookAgain has pods of an earlier run look for their image at once: kubelet would for up to five minutes not.
func (r *run) lookAgain(ctx context.Context) error {
	ctx, cancel := r.ask(ctx)
	defer cancel()
	pods, err := r.imageless(ctx)
	for _, p := range pods {
		if bad := r.Cluster.Client.Pods(r.Namespace).Delete(ctx, p, metav1.DeleteOptions{}); !apierrors.IsNotFound(bad) {
			err = errors.Join(err, bad)
		}
	}
	return err
}

func (r *run) restartController(ctx context.Context) error {
	ctx, cancel := r.ask(ctx)
	defer cancel()
	patch := fmt.Appendf(nil, `{"spec":{"template":{"metadata":{"annotations":{"kubectl.kubernetes.io/restartedAt":%q}}}}}`, time.Now().UTC().Format(time.RFC3339))
	_, err := r.Cluster.Client.Deployments(r.Namespace).Patch(ctx, kube.Controller, types.StrategicMergePatchType, patch, metav1.PatchOptions{})
	return err
}

// DryRun prints what would be applied, and changes nothing. Where the cluster answers, the chart is made for what that has.
func (r Rollout) DryRun(ctx context.Context, to io.Writer) error {
	x, end, err := r.begin(ctx, 3)
	if err != nil {
		return err
	}
	defer end()
	if !x.foreignSecret() || !x.Key.Empty() {
		s := x.secret()
		s.Data = nil
		b, err := yaml.Marshal(s)
		if err == nil {
			_, err = fmt.Fprintf(to, "%sdata:\n  %s: \"***\"\n", b, kube.AuthSecretKey)
		}
		if err != nil {
			return err
		}
	}
	args := slices.Concat([]string{"template", x.release, x.chart}, x.values())
	if x.Cluster != nil {
		ctx, cancel := x.ask(ctx)
		defer cancel()
		if x.Raw.Get(ctx, "/version", new(any)) == nil {
			args = append(args, "--validate")
		}
	}
	out, err := x.helm.run(ctx, args...)
	if err == nil {
		_, err = to.Write(out)
	}
	return err
}

// policyNeeded prints what Headscale's policy must say. Where the cluster's pool is known it stands for the nodes' ranges, so that another node
// needs no change.
func (r *run) policyNeeded() {
	tags := r.config.Tailscale.Tags
	r.say("\nHeadscale's policy must say this. Add what it lacks (headscale policy get and set, or the file policy.path):\n\n%s\n"+
		"The ranges are the nodes' pod CIDRs; the range they are cut from (--cluster-cidr) covers new nodes too.",
		headscale.NeededPolicy(tags, r.ranges, r.kind != headscale.KindAPI))
}

// giveUp ends an installation that is not whole.
func (r *run) giveUp() error {
	if r.noImage {
		r.say("\nNo image is published: make one and import it on every node:\n  make image; ctr -n k8s.io images import bin/headcni-image-amd64.tar   " +
			"(K3s: k3s ctr images import ...)\nor push it to a registry and give it with --image")
	} else {
		r.policyNeeded()
	}
	r.say("\nNot done. HeadCNI stays installed; run this again when it is put right, or take it off: %s", r.removal())
	return ErrSaid
}
