// Package deploy runs deploy-with-helm.sh and the commands of headcnictl behind it: what they refuse, what they find wrong, how they treat the key.
// helm is a stand-in that notes how it was called, and the API server and Headscale are imitated; what is rendered comes from real helm. That
// anything is installed is test/e2e's business.
package deploy

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/headcni/headcni/internal/headscaletest"
	"github.com/headcni/headcni/pkg/findings"
	"github.com/headcni/headcni/pkg/reconcile"
)

const (
	// apiKey stands for the key that a run's Headscale made, in its arguments, variables, input and files.
	apiKey  = "API-KEY"
	preAuth = "hskey-auth-neverseen-0123456789"
	// url is reached by a proxy: the run's Headscale.
	url = "http://10.254.0.1:8080"
)

func twoNodes() []fakeNode {
	return []fakeNode{
		{Name: "a", CIDRs: "10.244.0.0/24 fd00:244::/64", Addr: "192.0.2.1"},
		{Name: "b", CIDRs: "10.244.1.0/24 fd00:244:0:1::/64", Addr: "192.0.2.2"},
	}
}

// run is one run of the script, or of another command of headcnictl.
type run struct {
	scenario scenario
	// Headscale's policy, what is wrong with it, and its minor version, 0 = the newest.
	policy  string
	fault   headscaletest.Fault
	version int

	command []string // of headcnictl, none = the script
	args    []string
	env     []string
	stdin   string

	dir, key, out string
	code          int
	calls         []call
	cluster       *cluster
	headscale     *headscaletest.Server
}

// start prepares a run in a world that has the programs of the scenario and no others.
func (r *run) start(t *testing.T) *exec.Cmd {
	t.Helper()
	r.dir = t.TempDir()
	for _, dir := range []string{"path", "tmp", "elsewhere", "source", "source/bin"} {
		if err := os.Mkdir(filepath.Join(r.dir, dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	bash, err := exec.LookPath("bash")
	if err != nil {
		t.Fatal(err)
	}
	chart, err := filepath.Abs("../../chart")
	if err != nil {
		t.Fatal(err)
	}
	script, err := os.ReadFile("../../deploy-with-helm.sh")
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(r.scenario)
	if err != nil {
		t.Fatal(err)
	}
	links := map[string]string{"source/chart": chart, "source/bin/headcnictl": program, "path/cat": "/bin/cat"} // the help is printed by cat
	if !slices.Contains(r.scenario.Missing, "helm") {
		links["path/helm"] = self
	}
	for name, to := range links {
		if err := os.Symlink(to, filepath.Join(r.dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if r.version == 0 {
		r.version = headscaletest.Newest
	}
	r.headscale = headscaletest.NewVersion(t, r.version)
	r.headscale.SetPolicy(r.policy)
	r.key = r.headscale.APIKey()
	r.headscale.Break(r.fault)
	namespace := "kube-system"
	if i := slices.Index(r.args, "-n"); i >= 0 {
		namespace = r.args[i+1]
	}
	var api string
	r.cluster, api = serve(t, namespace, r.scenario)
	if r.scenario.Unreachable {
		api = "http://127.0.0.1:1"
	}
	for name, text := range map[string]string{
		"scenario": string(b), "source/deploy-with-helm.sh": string(script), "key": r.key,
		"kubeconfig": fmt.Sprintf(`{"kind":"Config","clusters":[{"name":"c","cluster":{"server":%q}}],"contexts":[{"name":"c","context":{"cluster":"c"}}],"current-context":"c"}`, api),
	} {
		if err := os.WriteFile(filepath.Join(r.dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	fill := strings.NewReplacer(apiKey, r.key, "KEYFILE", filepath.Join(r.dir, "key"), "KUBECONFIG", filepath.Join(r.dir, "kubeconfig"))
	var args []string
	for _, a := range r.args {
		args = append(args, fill.Replace(a))
	}
	cmd := exec.Command(bash, append([]string{filepath.Join(r.dir, "source", "deploy-with-helm.sh")}, args...)...)
	if r.command != nil {
		cmd = exec.Command(program, slices.Concat(r.command, args)...)
	}
	cmd.Dir = filepath.Join(r.dir, "elsewhere")
	cmd.Env = []string{"PATH=" + filepath.Join(r.dir, "path"), "TMPDIR=" + filepath.Join(r.dir, "tmp"), "HOME=" + r.dir, "KUBECONFIG=" + filepath.Join(r.dir, "kubeconfig"),
		fakeEnv + "=" + r.dir, "http_proxy=" + r.headscale.URL}
	for _, v := range r.env {
		cmd.Env = append(cmd.Env, fill.Replace(v))
	}
	cmd.Stdin = strings.NewReader(fill.Replace(r.stdin))
	return cmd
}

func (r *run) do(t *testing.T) {
	t.Helper()
	cmd := r.start(t)
	b, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil {
		t.Fatal(err)
	}
	r.finish(t, cmd, b)
}

// finish reads what was noted and checks what always holds: no key in the output or with a process, nothing left over.
func (r *run) finish(t *testing.T, cmd *exec.Cmd, out []byte) {
	t.Helper()
	r.out, r.code, r.calls = string(out), cmd.ProcessState.ExitCode(), readCalls(t, r.dir)
	left, err := os.ReadDir(filepath.Join(r.dir, "tmp"))
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	seen := []string{r.out}
	for _, c := range r.calls {
		seen = append(seen, c.line(), c.Parent, c.Values)
		for _, v := range c.Env {
			seen = append(seen, v)
			if strings.HasPrefix(v, "HEADSCALE_") || strings.HasPrefix(v, "HEADCNI_AUTH_") {
				t.Errorf("helm gets %s", v)
			}
		}
	}
	for _, text := range seen {
		for _, key := range []string{r.key, preAuth} {
			for _, form := range []string{key, base64.StdEncoding.EncodeToString([]byte(key))[:30]} {
				if strings.Contains(text, form) {
					t.Errorf("the key is in %q", text)
				}
			}
		}
	}
	if strings.Contains(r.out, "command not found") || strings.Contains(r.out, "unbound variable") {
		t.Errorf("a program or variable is missing:\n%s", r.out)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("exit code %d, and it said:\n%s", r.code, r.out)
			for _, c := range r.calls {
				t.Log(c.line())
			}
		}
	})
}

// held is the key that the cluster has in the end.
func (r *run) held(t *testing.T, namespace string) (*corev1.Secret, string) {
	t.Helper()
	s, err := r.cluster.Secrets(namespace).Get(t.Context(), "headcni-auth", metav1.GetOptions{})
	if err != nil {
		return nil, ""
	}
	return s, string(s.Data["api-key"])
}

func readCalls(t *testing.T, dir string) []call {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, "calls"))
	if os.IsNotExist(err) {
		return nil
	}
	if err != nil {
		t.Fatal(err)
	}
	var out []call
	for line := range bytes.Lines(b) {
		if !bytes.HasSuffix(line, []byte("\n")) {
			break // still being written
		}
		var c call
		if err := json.Unmarshal(line, &c); err != nil {
			t.Fatal(err)
		}
		out = append(out, c)
	}
	return out
}

// find returns the first call whose line contains all of what.
func (r *run) find(what ...string) *call {
	for i, c := range r.calls {
		if !slices.ContainsFunc(what, func(w string) bool { return !strings.Contains(c.line()+" ", w) }) {
			return &r.calls[i]
		}
	}
	return nil
}

func (r *run) want(t *testing.T, code int, says ...string) {
	t.Helper()
	if r.code != code {
		t.Errorf("exit code %d, want %d", r.code, code)
	}
	for _, s := range says {
		if !strings.Contains(r.out, s) {
			t.Errorf("does not say %q", s)
		}
	}
}

func TestHelp(t *testing.T) {
	t.Parallel()
	for _, option := range []string{"-h", "--help"} {
		r := run{args: []string{option}}
		r.do(t)
		r.want(t, 0, "-u, --url", "-k, --key", "-n, --namespace", "--ca FILE", "-f, --values", "--set", "--image", "--kubeconfig", "--context",
			"--timeout", "--dry-run", "HEADSCALE_API_KEY_FILE")
	}
}

func TestUsage(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	with := func(args ...string) []string { return append([]string{"-u", url, "-k", apiKey}, args...) }
	for name, tc := range map[string]struct {
		args, env []string
		stdin     string
		says      string
	}{
		"no URL":                {[]string{"-k", apiKey}, nil, "", "-u URL is missing"},
		"no scheme":             {[]string{"-u", "hs.example.com", "-k", apiKey}, nil, "", "is not a URL"},
		"two values in one URL": {[]string{"-u", "https://a,b=c", "-k", apiKey}, nil, "", "is not a URL"},
		"the node itself":       {[]string{"-u", "http://127.0.0.1:8080", "-k", apiKey}, nil, "", "all nodes reach"},
		"a public http URL":     {[]string{"-u", "http://headscale.lan:8080", "-k", apiKey}, nil, "", "an https:// URL"},
		"an http URL with 10.":  {[]string{"-u", "http://10.0.0.1.example.com", "-k", apiKey}, nil, "", "an https:// URL"},
		"unknown":               {with("--wait=1"), nil, "", "unknown flag: --wait"},
		"no value":              {with("--set"), nil, "", "flag needs an argument: --set"},
		"a key by --set":        {with("--set", "config.headscale.authKey=x"), nil, "", "must not hold the key"},
		"a key behind another":  {with("--set", "a=b,apiKey=x"), nil, "", "must not hold the key"},
		"a key in a file":       {with("-f", file("v1", "config:\n  headscale:\n    authKey: x\n")), nil, "", "must not hold the key"},
		"a key in JSON":         {with("-f", file("v2", `{"apiKey": "x"}`)), nil, "", "must not hold the key"},
		"no such authority":     {with("--ca", filepath.Join(dir, "none")), nil, "", "cannot be read"},
		"no authority":          {with("--ca", file("ca", "hello")), nil, "", "holds no certificate"},
		"no such file":          {with("-f", filepath.Join(dir, "none")), nil, "", "cannot be read"},
		"a time":                {with("--timeout", "5"), nil, "", "--timeout"},
		"an image without tag":  {with("--image", "r:5000/a"), nil, "", "has no tag"},
		"a namespace":           {with("-n", "a b"), nil, "", "not a namespace"},
		"two words":             {[]string{"-u", url, "-k", "-"}, nil, "a b\n", "one word"},
		"nothing":               {[]string{"-u", url, "-k", "-"}, nil, " \n", "must hold the key alone"},
		"no key file":           {[]string{"-u", url}, []string{"HEADSCALE_API_KEY_FILE=" + dir + "/none"}, "", "no such file"},
		"a key and a Secret":    {with("--set", "existingSecret=x"), nil, "", "leave one of them out"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := run{args: tc.args, env: tc.env, stdin: tc.stdin}
			r.do(t)
			r.want(t, 2, tc.says)
			if len(r.calls) > 0 || r.cluster.requests != nil {
				t.Error("it started something all the same")
			}
		})
	}
}

// world is a cluster in which all is right.
func world() scenario { return scenario{Nodes: twoNodes()} }

// An empty key in a values file is the chart's default, no secret.
func TestUsageTakesEmptyKeys(t *testing.T) {
	t.Parallel()
	values := filepath.Join(t.TempDir(), "values")
	if err := os.WriteFile(values, []byte("config:\n  headscale:\n    authKey: \"\"\n    apiKeyFile: \"\"\napiKey: # none\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	r := run{args: []string{"-u", url, "-k", apiKey, "-f", values}, scenario: world()}
	r.do(t)
	r.want(t, 0)
	if r.find("helm upgrade", "--values "+values) == nil {
		t.Error("helm does not get the file")
	}
}

// What speaks against an installation is found before anything is changed.
func TestChecks(t *testing.T) {
	nodes := func(change func([]fakeNode)) scenario {
		s := world()
		change(s.Nodes)
		return s
	}
	with := func(change func(*scenario)) run {
		r := run{scenario: world()}
		change(&r.scenario)
		return r
	}
	for name, tc := range map[string]struct {
		r    run
		says []string
	}{
		"helm is missing": {with(func(s *scenario) { s.Missing = []string{"helm"} }), []string{"helm is missing", "helm.sh/docs"}},
		"helm is old":     {with(func(s *scenario) { s.HelmVersion = "v2.17.0" }), []string{"helm is v2.17.0", "Helm 3"}},
		"no cluster":      {with(func(s *scenario) { s.Unreachable = true }), []string{"the cluster does not answer", "127.0.0.1:1", "KUBECONFIG=/etc/rancher/k3s/k3s.yaml"}},
		"no right":        {with(func(s *scenario) { s.Forbidden = "create clusterrolebindings" }), []string{"you may not create clusterrolebindings", "cluster-admin"}},
		"no nodes":        {with(func(s *scenario) { s.Nodes = nil }), []string{"no Linux nodes"}},
		"elsewhere already": {with(func(s *scenario) { s.Owner = "mine -n net" }),
			[]string{"helm status mine -n net", "upgrade it: -n net", "headcnictl uninstall --yes -n net"}},
		"a value that the chart does not take": {run{scenario: world(), args: []string{"--set", "config.network.mtu=x"}}, []string{"the chart does not take these values", "schema"}},
		"a node inside the pods' range": {run{scenario: nodes(func(n []fakeNode) { n[1].Addr = "10.244.0.7" })},
			[]string{"HC102", "Node b is at 10.244.0.7, inside the pods' 10.244.0.0/24"}},
		"a node inside kubeadm's range": {with(func(s *scenario) { s.Subnet, s.Nodes[1].Addr = "10.244.0.0/16", "10.244.200.7" }), []string{"HC102", "10.244.200.7"}},
		"pods inside the tailnet's":     {run{scenario: nodes(func(n []fakeNode) { n[1].CIDRs = "100.64.7.0/24" })}, []string{"HC102", "100.64.7.0/24 is inside the tailnet's"}},
		"no answer":                     {run{scenario: world(), fault: func(http.ResponseWriter, *http.Request) bool { panic(http.ErrAbortHandler) }}, []string{"HC220", url}},
		"another server":                {run{scenario: world(), fault: headscaletest.Answer(http.StatusOK, "<html>hello</html>")}, []string{"HC228", "does not answer like Headscale"}},
		"a key that expired":            {run{scenario: world(), fault: headscaletest.At("GET /api/v1/", headscaletest.Refuse())}, []string{"HC221", "headscale apikeys create"}},
		"a policy without the pods": {run{scenario: world(), policy: `{"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}]}`},
			[]string{"HC301", `"src": ["tag:headcni", "10.244.0.0/24", "10.244.1.0/24", "fd00:244::/64", "fd00:244:0:1::/64"]`}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			tc.r.args = append([]string{"-u", url, "-k", apiKey}, tc.r.args...)
			tc.r.do(t)
			tc.r.want(t, 1, tc.says...)
			if tc.r.find("helm upgrade") != nil || tc.r.cluster.asked("/namespaces/") {
				t.Errorf("it changed the cluster all the same: %q", tc.r.cluster.requests)
			}
		})
	}
}

func TestNoKeyAnywhere(t *testing.T) {
	t.Parallel()
	r := run{args: []string{"-u", url}, scenario: world()}
	r.do(t)
	r.want(t, 1, "no key was given", "-k -")
}

// What is no reason to stop is said all the same.
func TestWarnings(t *testing.T) {
	t.Parallel()
	s := world()
	s.Nodes[0].CIDRs, s.Nodes[1].Flannel, s.DaemonSets = "", "vxlan", []string{"kube-system/kube-proxy", "kube-flannel/kube-flannel-ds"}
	r := run{args: []string{"-u", url, "-k", apiKey}, scenario: s, version: 30}
	r.do(t)
	r.want(t, 0, "HC234", "another pod network is here: flannel on b, kube-flannel/kube-flannel-ds", "config.cni.exclusive=true", "without pod CIDRs: a", "--cluster-cidr")
}

// Every source of the key, in the specification's order; wherever it comes from, only the Secret gets it.
func TestKey(t *testing.T) {
	dir := t.TempDir()
	file := func(name, key string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(key+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	all := []string{"HEADSCALE_API_KEY=" + apiKey, "HEADCNI_AUTH_KEY=other2", "HEADSCALE_API_KEY_FILE=" + file("3", "other3"), "HEADCNI_AUTH_KEY_FILE=" + file("4", "other4")}
	for name, tc := range map[string]struct {
		args, env []string
		stdin     string
	}{
		"-k":                     {[]string{"-k", apiKey}, nil, ""},
		"-kKEY":                  {[]string{"-k" + apiKey}, nil, ""},
		"--key=":                 {[]string{"--key=" + apiKey}, nil, ""},
		"standard input":         {[]string{"-k", "-"}, nil, apiKey + "\n"},
		"-k before variables":    {[]string{"-k", apiKey}, append([]string{"HEADSCALE_API_KEY=other"}, all[1:]...), ""},
		"HEADSCALE_API_KEY":      {nil, all, ""},
		"HEADCNI_AUTH_KEY":       {nil, []string{"HEADSCALE_API_KEY= ", "HEADCNI_AUTH_KEY=" + apiKey, all[2], all[3]}, ""},
		"HEADSCALE_API_KEY_FILE": {nil, []string{"HEADSCALE_API_KEY_FILE=KEYFILE", all[3]}, ""},
		"HEADCNI_AUTH_KEY_FILE":  {nil, []string{"HEADCNI_AUTH_KEY_FILE=KEYFILE"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := run{args: append([]string{"-u", url + "/"}, tc.args...), env: tc.env, stdin: tc.stdin, scenario: world()}
			r.do(t)
			r.want(t, 0, "takes the API key", "2 of 2 nodes right", "done")
			s, key := r.held(t, "kube-system")
			if key != r.key {
				t.Errorf("the Secret holds %d bytes, not the key", len(key))
			}
			if s != nil && s.Annotations["helm.sh/resource-policy"] != "keep" {
				t.Error("an earlier release would take it along")
			}
			if r.find("helm upgrade --install headcni "+r.dir+"/source/chart ", "--set-string config.headscale.url="+url+" ", "--set-string existingSecret=headcni-auth") == nil {
				t.Error("helm is called otherwise")
			}
		})
	}
}

func TestOptionsReachHelm(t *testing.T) {
	t.Parallel()
	s := scenario{Nodes: twoNodes()[:1], NoNamespace: true, MicroK8s: true, Secret: "another"}
	r := run{args: []string{"-u", url, "-k", apiKey, "--set", "config.network.mtu=1300", "--set=config.ipam.strategy=random", "--image", "r:5000/a/b:c",
		"-n", "net", "--kubeconfig", "KUBECONFIG", "--context=c", "--timeout", "1m30s"}, scenario: s}
	r.do(t)
	r.want(t, 0, "Its end: headcnictl uninstall --yes -n net")
	if c := r.find("helm upgrade", "--namespace net", "--kubeconfig "+r.dir+"/kubeconfig --kube-context c", "--set config.network.mtu=1300", "--set config.ipam.strategy=random",
		"image.repository=r:5000/a/b ", "image.tag=c ", "config.cni.binDir=/var/snap/microk8s/current/opt/cni/bin"); c == nil {
		t.Error("helm upgrade is called otherwise")
	}
	ns, err := r.cluster.Namespaces().Get(t.Context(), "net", metav1.GetOptions{})
	if err != nil || ns.Labels["pod-security.kubernetes.io/enforce"] != "privileged" {
		t.Error("the namespace is not made for pods on the host's network:", err)
	}
	if _, key := r.held(t, "net"); key != r.key {
		t.Error("the key was not replaced")
	}
	if !r.cluster.asked("PATCH /apis/apps/v1/namespaces/net/deployments/headcni-controller") {
		t.Error("the controller does not learn of the new key")
	}
}

// Headscale with a certificate of its own: the controller and the nodes are told.
func TestAuthority(t *testing.T) {
	t.Parallel()
	srv := httptest.NewTLSServer(nil)
	defer srv.Close()
	ca := filepath.Join(t.TempDir(), "ca.crt")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	r := run{args: []string{"-u", url, "-k", apiKey, "--ca", ca}, scenario: world()}
	r.do(t)
	r.want(t, 0)
	if r.find("helm upgrade", "--set-file caBundle="+ca) == nil {
		t.Error("the authority does not reach helm")
	}
}

// What was installed by hand under another name is upgraded under that name.
func TestReleaseOfAnotherName(t *testing.T) {
	t.Parallel()
	s := world()
	s.Owner = "mine -n kube-system"
	r := run{args: []string{"-u", url, "-k", apiKey}, scenario: s}
	r.do(t)
	r.want(t, 0)
	if r.find("helm upgrade --install mine ") == nil || r.find("helm test mine ") == nil {
		t.Error("helm is called for another release")
	}
}

func TestTheKeyInTheClusterStays(t *testing.T) {
	t.Parallel()
	s := world()
	s.Secret = preAuth
	r := run{args: []string{"-u", url, "--image", "a@sha256:00"}, scenario: s}
	r.do(t)
	r.want(t, 0, "the key in the cluster stays", "with a pre-auth key any tagged node")
	if r.cluster.asked("/secrets") || r.cluster.asked("PATCH") || r.find("image.digest=sha256:00") == nil {
		t.Errorf("it is called otherwise: %q", r.cluster.requests)
	}
}

// What is missing is said for each node, with what to do.
func TestNotDone(t *testing.T) {
	wrong := func(id findings.ID) scenario {
		s := world()
		s.Nodes[1].Wrong = &reconcile.Found{ID: id, Severity: findings.Fail, Text: `the policy says "no" to it`}
		return s
	}
	with := func(change func(*scenario)) scenario {
		s := world()
		change(&s)
		return s
	}
	for name, tc := range map[string]struct {
		s      scenario
		key    string
		says   []string
		silent string
	}{
		"a daemon": {with(func(s *scenario) { s.NotReady = true }), apiKey, []string{"DaemonSet headcni: 1 of 2 new and ready"}, "NOT RIGHT"},
		"a daemon that does not start": {with(func(s *scenario) { s.NotReady, s.Waiting = true, "CrashLoopBackOff" }), apiKey,
			[]string{"container headcni-daemon: CrashLoopBackOff", "headcni-a, last log line: the last line"}, ""},
		"a route": {wrong(findings.NotApproved), apiKey, []string{"1 of 2 nodes right: b HC201", "NOT RIGHT", `the policy says "no" to it`, `"acls": [`}, "autoApprovers"},
		"a node":  {with(func(s *scenario) { s.Nodes[1].NotReady = true }), apiKey, []string{"node b is not Ready"}, ""},
		"pods, with a pre-auth key": {with(func(s *scenario) { s.TestFails = "pod on b at 10.244.1.7: no answer" }), preAuth,
			[]string{"not every pod answers", "pod on b at 10.244.1.7: no answer", `"tagOwners": { "tag:headcni": [] }`,
				`"autoApprovers": { "routes": { "10.244.0.0/24": ["tag:headcni"], "fd00:244::/64": ["tag:headcni"], "10.244.1.0/24": ["tag:headcni"], "fd00:244:0:1::/64": ["tag:headcni"] } }`,
				`"attr": ["cache-network-maps"]`}, ""},
		"pods, kubeadm's ranges": {with(func(s *scenario) { s.TestFails, s.Subnet = "x", "10.244.0.0/16,fd00:244::/56" }), apiKey,
			[]string{`"src": ["tag:headcni", "10.244.0.0/16", "fd00:244::/56"]`, `"dst": ["tag:headcni:*", "10.244.0.0/16:*", "fd00:244::/56:*"]`}, "autoApprovers"},
		"helm": {with(func(s *scenario) { s.HelmFails = "another operation (install/upgrade/rollback) is in progress" }), apiKey,
			[]string{"another operation (install", "helm rollback headcni -n kube-system"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := run{args: []string{"-u", url, "-k", tc.key, "--timeout", "1s"}, scenario: tc.s}
			r.do(t)
			r.want(t, 1, tc.says...)
			if tc.silent != "" && strings.Contains(r.out, tc.silent) {
				t.Errorf("it says %q", tc.silent)
			}
			if tc.s.TestFails != "" && (!r.cluster.asked("DELETE /api/v1/namespaces/kube-system/pods/headcni-test") ||
				!r.cluster.asked("DELETE /apis/rbac.authorization.k8s.io/v1/namespaces/kube-system/roles/headcni-test")) {
				t.Error("the test's pods stay")
			}
		})
	}
}

// Without the image no time is waited out, and pods of an earlier run look for it at once.
func TestNoImage(t *testing.T) {
	t.Parallel()
	s := world()
	s.NotReady, s.Waiting = true, "ImagePullBackOff"
	r := run{args: []string{"-u", url, "-k", apiKey, "--timeout", "10m"}, scenario: s}
	r.do(t)
	r.want(t, 1)
	if !r.cluster.asked("DELETE /api/v1/namespaces/kube-system/pods/headcni-a") {
		t.Error("the pod does not look again")
	}
}

// A signal ends helm, the test's pods and the script, and leaves nothing.
func TestInterrupted(t *testing.T) {
	for _, tc := range []struct {
		during string
		signal syscall.Signal
		code   int
	}{
		{"upgrade", syscall.SIGINT, 130}, {"upgrade", syscall.SIGTERM, 143}, {"test", syscall.SIGHUP, 129},
	} {
		t.Run(tc.during+" "+tc.signal.String(), func(t *testing.T) {
			t.Parallel()
			s := world()
			s.Hangs = tc.during
			r := run{args: []string{"-u", url, "-k", "-"}, stdin: apiKey, scenario: s}
			cmd := r.start(t)
			var out bytes.Buffer
			cmd.Stdout, cmd.Stderr = &out, &out
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			waitFor(t, func() bool { r.calls = readCalls(t, r.dir); return r.find("helm "+tc.during) != nil })
			if err := cmd.Process.Signal(tc.signal); err != nil {
				t.Fatal(err)
			}
			_ = cmd.Wait() // the exit code tells
			r.finish(t, cmd, out.Bytes())
			r.want(t, tc.code, "Interrupted; HeadCNI may be installed in part. Run this again to go on, or take it off: headcnictl uninstall --yes")
			if !slices.ContainsFunc(r.calls, func(c call) bool { return c.Interrupted }) {
				t.Error("helm goes on")
			}
			if tc.during == "test" && !r.cluster.asked("DELETE /api/v1/namespaces/kube-system/pods/headcni-test") {
				t.Error("the test's pods stay")
			}
		})
	}
}

func waitFor(t *testing.T, done func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !done(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("nothing happens")
		}
	}
}

// Without a source folder the chart is the program's own; an upgrade keeps the release's values.
func TestUpgrade(t *testing.T) {
	there := func(values string) scenario {
		s := world()
		s.Owner, s.Values, s.Secret = "headcni -n kube-system", values, "held"
		return s
	}
	for name, tc := range map[string]struct {
		r    run
		code int
		says string
		helm []string
	}{
		"with its values": {run{scenario: there(`{"config":{"headscale":{"url":"` + url + `"}}}`)}, 0, "done",
			[]string{"helm upgrade --install headcni ", "--reset-then-reuse-values", "headcni --timeout"}},
		"another value":       {run{scenario: there(`null`), args: []string{"--set", "a=b"}}, 0, "done", []string{"helm upgrade ", "--set a=b"}},
		"not there":           {run{scenario: world()}, 1, "headcnictl install", nil},
		"an image that stays": {run{scenario: there(`{"image":{"repository":"r/a","tag":"0.1.0"}}`)}, 1, "name the new one by --image", nil},
		"another image":       {run{scenario: there(`{"image":{"repository":"r/a","tag":"0.1.0"}}`), args: []string{"--image", "r/a:0.2.0"}}, 0, "done", []string{"helm upgrade", "image.tag=0.2.0"}},
		"an older helm":       {run{scenario: func() scenario { s := there(`null`); s.HelmVersion = "v3.13.1"; return s }()}, 1, "install Helm 3.14", nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			tc.r.command = []string{"upgrade", "--skip-url-check"}
			tc.r.do(t)
			tc.r.want(t, tc.code, tc.says)
			if (tc.helm != nil) != (tc.r.find("helm upgrade") != nil) || tc.helm != nil && tc.r.find(tc.helm...) == nil {
				t.Error("helm is called otherwise")
			}
		})
	}
}

// A key that Helm has among the release's values is replaced there too, and is on no disk meanwhile.
func TestUpgradeReplacesAKeyOfHelms(t *testing.T) {
	for name, values := range map[string]string{"apiKey": `{"apiKey":"` + preAuth + `","a":1}`, "authKey": `{"a":1,"config":{"headscale":{"authKey":"` + preAuth + `"}}}`} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := world()
			s.Owner, s.Values, s.Secret = "headcni -n kube-system", values, preAuth
			r := run{command: []string{"upgrade"}, args: []string{"--key-file", "KEYFILE"}, scenario: s}
			r.do(t)
			r.want(t, 0, "takes the API key", "done")
			c := r.find("helm upgrade", "--set-string apiKey= ", "--set-string config.headscale.authKey= ", "--set-string existingSecret=headcni-auth")
			if c == nil || !strings.Contains(c.Values, `"a":1`) {
				t.Error("helm is called otherwise")
			}
			if _, key := r.held(t, "kube-system"); key != r.key {
				t.Error("the key was not replaced")
			}
		})
	}
}

// Headscale is asked with the authority that the release has, and a folder that was chosen stays.
func TestUpgradeKeeps(t *testing.T) {
	t.Parallel()
	s := world()
	s.Owner, s.Values, s.MicroK8s, s.Authority = "headcni -n kube-system", `{"a":1}`, true, "rubbish"
	r := run{command: []string{"upgrade"}, args: []string{"--key-file", "KEYFILE"}, scenario: s}
	r.do(t)
	r.want(t, 1, "no certificate in", "Nothing was changed")
	s.Authority = ""
	r = run{command: []string{"upgrade"}, args: []string{"--key-file", "KEYFILE"}, scenario: s}
	r.do(t)
	r.want(t, 0, "done")
	if c := r.find("helm upgrade"); c == nil || !strings.Contains(c.Values, `"a":1`) || strings.Contains(c.line(), "binDir") {
		t.Error("helm is called otherwise")
	}
}

func TestUninstall(t *testing.T) {
	there := func(change func(*scenario)) scenario {
		s := world()
		s.Owner, s.Secret = "mine -n kube-system", "held"
		change(&s)
		return s
	}
	none := func(*scenario) {}
	for name, tc := range map[string]struct {
		s    scenario
		args []string
		code int
		says []string
		helm bool
	}{
		"not without yes": {there(none), nil, 1, []string{"nothing was changed", "release mine", "--yes"}, false},
		"a user's Secret": {there(none), []string{"--yes"}, 0, []string{"kubectl -n kube-system delete secret headcni-auth", "HeadCNI is off"}, true},
		"a node is down":  {there(func(s *scenario) { s.Nodes[1].NotReady = true }), []string{"--yes"}, 0, []string{"not Ready: b", "headcni-daemon uninstall"}, true},
		"again":           {there(func(s *scenario) { s.Owner, s.Gone = "", true }), []string{"--yes"}, 0, []string{"Helm has no release", "HeadCNI is off"}, true},
		"helm's was lost": {there(func(s *scenario) { s.Gone = true }), []string{"--yes"}, 1, []string{"its ClusterRole headcni is there"}, true},
		"elsewhere":       {there(func(s *scenario) { s.Owner = "mine -n net" }), []string{"--yes"}, 1, []string{"headcnictl uninstall --yes -n net"}, false},
		"wrong usage":     {there(none), []string{"now"}, 2, []string{"unknown command"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := run{command: []string{"uninstall"}, args: tc.args, scenario: tc.s}
			r.do(t)
			r.want(t, tc.code, tc.says...)
			if tc.helm != (r.find("helm uninstall") != nil) {
				t.Error("helm is called otherwise")
			}
			if s, _ := r.held(t, "kube-system"); s == nil {
				t.Error("a Secret that somebody else made is gone")
			}
		})
	}
}
