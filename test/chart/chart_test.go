// Package chart renders the Helm chart with real helm: golden files, and what must hold whatever the values are.
package chart

import (
	"bytes"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/headcni/headcni/internal/golden"
	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/kube"
)

const (
	root     = "../.."
	chartDir = root + "/chart"
	theKey   = "hskey-api-never-to-be-seen"
)

// admission is what makes the chart render its admission policy.
const admission = "admissionregistration.k8s.io/v1/ValidatingAdmissionPolicy"

// modern and old are what a cluster says of itself.
var (
	modern = []string{"--kube-version", "1.37.2", "--api-versions", admission}
	old    = []string{"--kube-version", "1.20.0"}
	url    = []string{"--set", "config.headscale.url=https://headscale.example.com"}
	key    = []string{"--set", "config.headscale.authKey=" + theKey}
)

// cases are the value sets. The default is written to a file whole, of the others what differs from it.
var cases = []struct {
	name string
	args []string
}{
	{"default", slices.Concat(modern, url, key, []string{"--set", "config.ipam.type=headcni-ipam"})},
	{"kubernetes-1.20", slices.Concat(old, url, key)},
	{"host-mode", slices.Concat(modern, url, key, []string{"--set", "config.tailscale.mode=host"})},
	{"daemon-mode", slices.Concat(modern, url, key, []string{"--set", "config.tailscale.mode=daemon", "--set", "config.logging.level=debug"})},
	{"existing-secret", slices.Concat(modern, url, []string{"--set", "existingSecret=mine"})},
	{"api-key", slices.Concat(modern, url, []string{"--set", "apiKey=" + theKey})},
	{"monitoring", slices.Concat(modern, url, key, []string{
		"--api-versions", "monitoring.coreos.com/v1/PodMonitor", "--api-versions", "monitoring.coreos.com/v1/PrometheusRule",
		"--set", "monitoring.podMonitor.enabled=true", "--set", "monitoring.prometheusRule.enabled=true",
		"--set", "monitoring.dashboard.enabled=true", "--set", "monitoring.podMonitor.labels.release=prometheus",
	})},
	{"service-monitor", slices.Concat(modern, url, key, []string{
		"--api-versions", "monitoring.coreos.com/v1/ServiceMonitor", "--set", "monitoring.serviceMonitor.enabled=true",
		"--set", "monitoring.serviceMonitor.labels.release=prometheus",
	})},
	{"everything-else", slices.Concat(modern, url, key, []string{
		"--set", "caBundle=PEM", "--set", "kubernetes.serviceHost=10.0.0.1", "--set", "kubernetes.servicePort=6443",
		"--set", "image.digest=sha256:00", "--set", "image.pullSecrets[0].name=pull", "--set", "controller.replicas=1",
		"--set", "config.monitoring.listen=", "--set", "controller.listen=[::1]:9671", "--set", "admissionPolicy.enabled=false",
		"--set", "config.cni.binDir=/var/snap/microk8s/current/opt/cni/bin",
		"--set", "config.cni.confDir=/var/snap/microk8s/current/args/cni-network",
		"--set", "daemon.extraEnv[0].name=HTTPS_PROXY,daemon.extraEnv[0].value=http://proxy",
		"--set", "podLabels.team=net", "--set", "podAnnotations.note=x", "--set", "daemon.maxUnavailable=3",
	})},
}

func helm(t *testing.T) string {
	t.Helper()
	bin := filepath.Join(os.Getenv("HEADCNI_TOOLS"), "helm")
	if _, err := os.Stat(bin); os.Getenv("HEADCNI_TOOLS") == "" || err != nil {
		nstest.Skip(t, "needs helm: run `make test`, or set HEADCNI_TOOLS to what test/tools/ensure prints")
	}
	// Files that only helm reads are not among what `go test` looks at before it repeats an old result.
	err := filepath.WalkDir(chartDir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			_, err = os.ReadFile(path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return bin
}

func render(t *testing.T, args ...string) (string, error) {
	t.Helper()
	return helmTemplate(t, chartDir, args...)
}

// helmTemplate runs helm in a home of its own: a user's settings and plugins are no business of the test.
func helmTemplate(t *testing.T, chart string, args ...string) (string, error) {
	t.Helper()
	home := t.TempDir()
	cmd := exec.Command(helm(t), slices.Concat([]string{"template", "my-release", chart, "--namespace", "kube-system"}, args)...)
	cmd.Env = []string{"HOME=" + home, "HELM_CACHE_HOME=" + home, "HELM_CONFIG_HOME=" + home, "HELM_DATA_HOME=" + home, "KUBECONFIG=/nowhere"}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return stderr.String(), err
	}
	return string(out), nil
}

// renderChart is what a chart renders to, as text.
func renderChart(t *testing.T, chart string, args ...string) string {
	t.Helper()
	out, err := helmTemplate(t, chart, args...)
	if err != nil {
		t.Fatalf("helm template %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

func mustRender(t *testing.T, args ...string) []manifest {
	t.Helper()
	return parse(t, renderChart(t, chartDir, args...))
}

// manifest is one rendered document.
type manifest struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`
	text              string
	// item: it is part of a List, which is there too.
	item bool
}

func (o manifest) id() string { return o.Kind + "/" + o.Namespace + "/" + o.Name }

func parse(t *testing.T, out string) []manifest {
	t.Helper()
	var objects []manifest
	for _, text := range regexp.MustCompile(`(?m)^---\n`).Split(out, -1) {
		o := manifest{text: text}
		if err := yaml.Unmarshal([]byte(text), &o); err != nil {
			t.Fatalf("%v in\n%s", err, text)
		}
		if o.Kind != "" {
			objects = append(objects, o)
		}
		if o.Kind == "List" {
			objects = append(objects, items(t, o)...)
		}
	}
	if len(objects) < 15 {
		t.Fatalf("%d objects only", len(objects))
	}
	return objects
}

func items(t *testing.T, list manifest) []manifest {
	t.Helper()
	var in struct{ Items []map[string]any }
	if err := yaml.Unmarshal([]byte(list.text), &in); err != nil || len(in.Items) == 0 {
		t.Fatalf("%s: %v, %d items", list.id(), err, len(in.Items))
	}
	var out []manifest
	for _, item := range in.Items {
		b, err := yaml.Marshal(item)
		o := manifest{text: string(b), item: true}
		if err == nil {
			err = yaml.Unmarshal(b, &o)
		}
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, o)
	}
	return out
}

// into decodes strictly: a field that Kubernetes does not have is an error.
func into[T any](t *testing.T, o manifest) T {
	t.Helper()
	var v T
	if err := yaml.UnmarshalStrict([]byte(o.text), &v); err != nil {
		t.Fatalf("%s: %v", o.id(), err)
	}
	return v
}

// template is the pod of an object that has one.
func template(t *testing.T, o manifest) (corev1.PodTemplateSpec, bool) {
	t.Helper()
	switch o.Kind {
	case "DaemonSet":
		return into[appsv1.DaemonSet](t, o).Spec.Template, true
	case "Deployment":
		return into[appsv1.Deployment](t, o).Spec.Template, true
	case "Job":
		return into[batchv1.Job](t, o).Spec.Template, true
	case "Pod":
		p := into[corev1.Pod](t, o)
		return corev1.PodTemplateSpec{ObjectMeta: p.ObjectMeta, Spec: p.Spec}, true
	}
	return corev1.PodTemplateSpec{}, false
}

func readValues(t *testing.T) map[string]any {
	t.Helper()
	b, err := os.ReadFile(chartDir + "/values.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var v map[string]any
	if err := yaml.UnmarshalStrict(b, &v); err != nil {
		t.Fatal(err)
	}
	return v
}

func TestGolden(t *testing.T) {
	first := map[string]string{}
	for _, o := range mustRender(t, cases[0].args...) {
		first[o.id()] = o.text
	}
	for i, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			var out strings.Builder
			here := map[string]bool{}
			for _, o := range mustRender(t, tc.args...) {
				here[o.id()] = true
				if !o.item && (i == 0 || first[o.id()] != o.text) {
					out.WriteString("---\n" + strings.TrimRight(o.text, "\n") + "\n")
				}
			}
			var gone []string
			for id := range first {
				if !here[id] {
					gone = append(gone, "# not here: "+id+"\n")
				}
			}
			slices.Sort(gone)
			golden.Check(t, filepath.Join("testdata", tc.name+".yaml"), strings.Join(gone, "")+out.String())
		})
	}
}

func TestLint(t *testing.T) {
	cmd := exec.Command(helm(t), slices.Concat([]string{"lint", "--strict", chartDir}, url)...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestRefused(t *testing.T) {
	for name, tc := range map[string]struct {
		args []string
		want string
	}{
		"no URL":            {key, "config.headscale.url is required"},
		"a public http URL": {slices.Concat(key, []string{"--set", "config.headscale.url=http://headscale.lan:8080"}), "tailscaled comes back to an http:// URL only"},
		"key twice":         {slices.Concat(url, key, []string{"--set", "apiKey=x"}), "give the key once"},
		"key and Secret":    {slices.Concat(url, key, []string{"--set", "existingSecret=x"}), "not both"},
		"monitored twice":   {slices.Concat(url, key, []string{"--set", "monitoring.podMonitor.enabled=true,monitoring.serviceMonitor.enabled=true"}), "enable one"},
		"unknown config":    {slices.Concat(url, []string{"--set", "config.network.podCIDR=x"}), "podCIDR"},
		"unknown value":     {slices.Concat(url, []string{"--set", "replicas=3"}), "replicas"},
		"wrong type":        {slices.Concat(url, []string{"--set", "config.network.mtu=big"}), "mtu"},
		"a number as label": {slices.Concat(url, []string{"--set", "podLabels.x=1"}), "/podLabels/x"},
		"no such mode":      {slices.Concat(url, []string{"--set", "config.tailscale.mode=both"}), "mode"},
		"Kubernetes is old": {slices.Concat(url, []string{"--kube-version", "1.19.16"}), "kubeVersion"},
	} {
		t.Run(name, func(t *testing.T) {
			out, err := render(t, tc.args...)
			if err == nil || !strings.Contains(out, tc.want) {
				t.Errorf("%v\n%s\nwant %q", err, out, tc.want)
			}
			if strings.Contains(out, theKey) {
				t.Error("the key is in the message")
			}
		})
	}
}

// TestAlways is what holds for every set of values.
func TestAlways(t *testing.T) {
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			objects := mustRender(t, tc.args...)
			checkKey(t, objects)
			checkConfig(t, objects)
			checkVersions(t, tc.name == "kubernetes-1.20", objects)
			for _, o := range objects {
				if pod, ok := template(t, o); ok {
					checkPod(t, o, pod)
				}
			}
		})
	}
}

// checkKey: the key is in one Secret and nowhere else, and only the controller's pods mount it.
func checkKey(t *testing.T, objects []manifest) {
	t.Helper()
	for _, o := range objects {
		holds := strings.Contains(o.text, theKey) || o.Kind == "Secret" && o.Name == kube.AuthSecret && into[corev1.Secret](t, o).Data[kube.AuthSecretKey] != nil
		if holds && (o.Kind != "Secret" || o.Name != kube.AuthSecret || string(into[corev1.Secret](t, o).Data[kube.AuthSecretKey]) != theKey) {
			t.Errorf("%s holds the key", o.id())
		}
		pod, ok := template(t, o)
		if !ok {
			continue
		}
		mounts := slices.ContainsFunc(pod.Spec.Volumes, func(v corev1.Volume) bool { return v.Secret != nil })
		if want := o.Name == kube.Controller || o.Name == "headcni-uninstall"; mounts != want {
			t.Errorf("%s mounts a Secret: %v, want %v", o.id(), mounts, want)
		}
	}
}

// checkConfig: the daemon takes daemon.yaml as it is, strictly.
func checkConfig(t *testing.T, objects []manifest) {
	t.Helper()
	i := slices.IndexFunc(objects, func(o manifest) bool { return o.Kind == "ConfigMap" && o.Name == "headcni-config" })
	if i < 0 {
		t.Fatal("no ConfigMap headcni-config")
	}
	file := filepath.Join(t.TempDir(), "daemon.yaml")
	if err := os.WriteFile(file, []byte(into[corev1.ConfigMap](t, objects[i]).Data["daemon.yaml"]), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := config.Load(file, false, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if c.Headscale.URL != "https://headscale.example.com" || c.CNI.BinDir == "" {
		t.Errorf("daemon.yaml says %s", c)
	}
}

// checkVersions: an old cluster has these versions and kinds only.
func checkVersions(t *testing.T, isOld bool, objects []manifest) {
	t.Helper()
	of1_20 := []string{
		"v1 List", "v1 ServiceAccount", "v1 Secret", "v1 ConfigMap", "v1 Pod", "apps/v1 DaemonSet", "apps/v1 Deployment", "batch/v1 Job",
		"policy/v1beta1 PodDisruptionBudget", "rbac.authorization.k8s.io/v1 Role", "rbac.authorization.k8s.io/v1 RoleBinding",
		"rbac.authorization.k8s.io/v1 ClusterRole", "rbac.authorization.k8s.io/v1 ClusterRoleBinding",
	}
	for _, o := range objects {
		if isOld && !slices.Contains(of1_20, o.APIVersion+" "+o.Kind) {
			t.Errorf("Kubernetes 1.20 has no %s %s", o.APIVersion, o.Kind)
		}
		if isOld && strings.Contains(o.text, "appArmorProfile") {
			t.Errorf("%s: Kubernetes 1.20 has no appArmorProfile", o.id())
		}
		if !isOld && strings.Contains(o.text, "v1beta1") {
			t.Errorf("%s: Kubernetes 1.37 has no v1beta1 of it", o.id())
		}
	}
}

// capabilities are all that any container has.
var capabilities = map[string][]corev1.Capability{
	"install": {"DAC_OVERRIDE"}, "headcni-daemon": {"NET_ADMIN", "NET_RAW", "DAC_OVERRIDE", "NET_BIND_SERVICE"}, "tailscaled": {"NET_ADMIN", "NET_RAW"},
}

func checkPod(t *testing.T, o manifest, pod corev1.PodTemplateSpec) {
	t.Helper()
	volumes := map[string]corev1.Volume{}
	for _, v := range pod.Spec.Volumes {
		volumes[v.Name] = v
	}
	if pod.Spec.HostPID || pod.Spec.HostIPC || pod.Spec.HostNetwork == strings.Contains(o.Name, "test") {
		t.Errorf("%s: hostPID %v, hostIPC %v, hostNetwork %v", o.id(), pod.Spec.HostPID, pod.Spec.HostIPC, pod.Spec.HostNetwork)
	}
	for _, c := range slices.Concat(pod.Spec.InitContainers, pod.Spec.Containers) {
		s := c.SecurityContext
		switch {
		case s == nil || s.Privileged != nil || s.AllowPrivilegeEscalation == nil || *s.AllowPrivilegeEscalation ||
			s.ReadOnlyRootFilesystem == nil || !*s.ReadOnlyRootFilesystem:
			t.Errorf("%s %s: %+v", o.id(), c.Name, s)
		case s.Capabilities == nil || !slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}) ||
			!slices.Equal(s.Capabilities.Add, capabilities[c.Name]):
			t.Errorf("%s %s: capabilities %+v", o.id(), c.Name, s.Capabilities)
		}
		for _, m := range c.VolumeMounts {
			v, ok := volumes[m.Name]
			if !ok {
				t.Errorf("%s %s mounts %s, which is no volume", o.id(), c.Name, m.Name)
			}
			// What daemon.yaml says of paths must be true on the host and in the container.
			if v.HostPath != nil && v.HostPath.Path != m.MountPath && m.MountPath != "/host"+v.HostPath.Path {
				t.Errorf("%s %s has the host's %s at %s", o.id(), c.Name, v.HostPath.Path, m.MountPath)
			}
		}
		for _, e := range c.Env {
			if strings.Contains(e.Value, theKey) {
				t.Errorf("%s %s: the key is in %s", o.id(), c.Name, e.Name)
			}
		}
	}
}

// TestNames: the programs look for objects by these names.
func TestNames(t *testing.T) {
	var have []string
	for _, o := range mustRender(t, cases[0].args...) {
		have = append(have, o.Kind+"/"+o.Name)
		if o.Namespace == "" && o.Kind != "List" && !strings.HasPrefix(o.Kind, "Cluster") && !strings.HasPrefix(o.Kind, "ValidatingAdmission") {
			t.Errorf("%s has no namespace", o.id())
		}
	}
	for _, want := range []string{
		"ServiceAccount/" + kube.DaemonAccount, "Secret/" + kube.AuthSecret, "Secret/" + kube.JoinSecret, "ConfigMap/" + kube.Memory,
		"Deployment/" + kube.Controller, "DaemonSet/headcni", "DaemonSet/headcni-tailscaled", "ConfigMap/headcni-config",
		"ValidatingAdmissionPolicy/headcni-daemon", "ValidatingAdmissionPolicyBinding/headcni-daemon",
		"ValidatingAdmissionPolicy/headcni-kubelet", "ValidatingAdmissionPolicyBinding/headcni-kubelet", "Job/headcni-uninstall",
	} {
		if !slices.Contains(have, want) {
			t.Errorf("no %s", want)
		}
	}
}

// TestAdmissionPolicyKnowsTheAnnotations: the daemon's are allowed, the controller's are not.
func TestAdmissionPolicyKnowsTheAnnotations(t *testing.T) {
	for _, o := range mustRender(t, cases[0].args...) {
		if o.Kind != "ValidatingAdmissionPolicy" {
			continue
		}
		for _, a := range []string{kube.NodeKey, kube.Mode, kube.TailnetIPs, kube.TailnetDomain, kube.Uninstalled} {
			if !strings.Contains(o.text, "'"+a+"'") {
				t.Errorf("the daemon may not write %s", a)
			}
		}
		for _, a := range []string{kube.Headscale, kube.Uninstall, kube.Allocated} {
			if strings.Contains(o.text, "'"+a+"'") {
				t.Errorf("the daemon may write %s", a)
			}
		}
		// Each new release of Kubernetes may add a field.
		status := reflect.TypeFor[corev1.NodeStatus]()
		for i := range status.NumField() {
			field, _, _ := strings.Cut(status.Field(i).Tag.Get("json"), ",")
			if field != "conditions" && !strings.Contains(o.text, "may not change a Node's status."+field+"\n") {
				t.Errorf("the daemon may change status.%s", field)
			}
		}
		if want := "system:serviceaccount:kube-system:" + kube.DaemonAccount + "'"; !strings.Contains(o.text, want) {
			t.Errorf("not for %s", want)
		}
		return
	}
	t.Error("no admission policy")
}

// TestPathsOfTheImage: what the chart starts and mounts is where the programs have it.
func TestPathsOfTheImage(t *testing.T) {
	for _, o := range mustRender(t, cases[0].args...) {
		if o.Kind != "DaemonSet" || o.Name != "headcni" {
			continue
		}
		for _, want := range []string{
			paths.ConfigFile, paths.StateDir, paths.RunDir, filepath.Dir(paths.HostTailscaleSocket), paths.CNIBinDir, paths.CNIConfDir,
		} {
			if !strings.Contains(o.text, "mountPath: "+want) {
				t.Errorf("the daemon's pod has no %s", want)
			}
		}
		return
	}
	t.Error("no DaemonSet headcni")
}

// TestMetricsExist: alerts and dashboard name what the programs count.
func TestMetricsExist(t *testing.T) {
	var sources strings.Builder
	for _, pattern := range []string{"pkg/monitoring/*.go", "pkg/controller/*.go"} {
		files, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil || len(files) == 0 {
			t.Fatal(pattern, err)
		}
		for _, f := range files {
			b, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			sources.Write(b)
		}
	}
	var n int
	for _, file := range []string{"rules.yaml", "dashboard.json"} {
		b, err := os.ReadFile(filepath.Join(chartDir, "files", file))
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range regexp.MustCompile(`headcni_[a-z_]+`).FindAllString(string(b), -1) {
			n++
			if name = strings.TrimSuffix(name, "_bucket"); !strings.Contains(sources.String(), `"`+name+`"`) {
				t.Errorf("%s: no program has a metric %s", file, name)
			}
		}
	}
	if n < 15 {
		t.Errorf("found %d metrics only", n)
	}
}

func TestMain(m *testing.M) { nstest.Main(m) }
