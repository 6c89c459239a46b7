// Package deploy runs deploy-with-helm.sh: what it refuses, what it finds wrong, how it treats the key. kubectl, helm and
// curl are stand-ins that note how they were called; what is rendered comes from real helm. That it installs anything is
// test/e2e's business.
package deploy

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

const (
	apiKey  = "hskey-api-neverseen.0123456789"
	preAuth = "hskey-auth-neverseen-0123456789"
	url     = "https://hs.example.com"
	routed  = `{"nodeKey":"nodekey:1","state":"routed","routes":["10.244.0.0/24"]}`
)

func twoNodes(view string) []fakeNode {
	return []fakeNode{
		{Name: "a", Ready: "True", CIDRs: "10.244.0.0/24 fd00:244::/64", View: routed},
		{Name: "b", Ready: "True", CIDRs: "10.244.1.0/24 fd00:244:0:1::/64", View: view},
	}
}

// run is one run of the script.
type run struct {
	scenario scenario
	args     []string
	env      []string
	stdin    string

	dir, out string
	code     int
	calls    []call
}

// command prepares a run in a world that has the programs of the scenario and no others.
func (r *run) command(t *testing.T) *exec.Cmd {
	t.Helper()
	r.dir = t.TempDir()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	bash, err := exec.LookPath("bash")
	if err != nil {
		t.Fatal(err)
	}
	script, err := filepath.Abs("../../deploy-with-helm.sh")
	if err != nil {
		t.Fatal(err)
	}
	// A file that only a child reads is not among what `go test` looks at before it repeats an old result.
	if _, err := os.ReadFile(script); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{"bin", "tmp", "elsewhere"} {
		if err := os.Mkdir(filepath.Join(r.dir, dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range append([]string{"helm", "kubectl", "curl"}, harmless...) {
		if slices.Contains(r.scenario.Missing, name) {
			continue
		}
		if err := os.Symlink(self, filepath.Join(r.dir, "bin", name)); err != nil {
			t.Fatal(err)
		}
	}
	b, err := json.Marshal(r.scenario)
	if err == nil {
		err = os.WriteFile(filepath.Join(r.dir, "scenario"), b, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(bash, append([]string{script}, r.args...)...)
	cmd.Dir = filepath.Join(r.dir, "elsewhere")
	cmd.Env = append([]string{"PATH=" + filepath.Join(r.dir, "bin"), "TMPDIR=" + filepath.Join(r.dir, "tmp"), "HOME=" + r.dir, fakeEnv + "=" + r.dir}, r.env...)
	cmd.Stdin = strings.NewReader(r.stdin)
	return cmd
}

func (r *run) do(t *testing.T) {
	t.Helper()
	cmd := r.command(t)
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
		seen = append(seen, c.line(), c.Parent)
		seen = append(seen, c.Env...)
	}
	for _, text := range seen {
		for _, key := range []string{apiKey, preAuth} {
			for _, form := range []string{key, base64.StdEncoding.EncodeToString([]byte(key))[:30]} {
				if strings.Contains(text, form) {
					t.Errorf("the key is in %q", text)
				}
			}
		}
	}
	if strings.Contains(r.out, "command not found") || strings.Contains(r.out, "knows nothing of") || strings.Contains(r.out, "unbound variable") {
		t.Errorf("a program or variable is missing:\n%s", r.out)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("exit code %d, and it said:\n%s", r.code, r.out)
			for _, c := range r.calls {
				if c.Name == "helm" {
					t.Log(c.line())
				}
			}
		}
	})
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
		"a public http URL":     {[]string{"-u", "http://headscale.lan:8080", "-k", apiKey}, nil, "", "use https://"},
		"an http URL with 10.":  {[]string{"-u", "http://10.0.0.1.example.com", "-k", apiKey}, nil, "", "use https://"},
		"unknown":               {with("--wait=1"), nil, "", "unknown option --wait"},
		"no value":              {with("--set"), nil, "", "--set needs a value"},
		"a key by --set":        {with("--set", "config.headscale.authKey=x"), nil, "", "must not hold the key"},
		"a key behind another":  {with("--set", "a=b,apiKey=x"), nil, "", "must not hold the key"},
		"a key in a file":       {with("-f", file("v1", "config:\n  headscale:\n    authKey: x\n")), nil, "", "must not hold the key"},
		"a key in JSON":         {with("-f", file("v2", `{"apiKey": "x"}`)), nil, "", "must not hold the key"},
		"no such authority":     {with("--ca", filepath.Join(dir, "none")), nil, "", "cannot be read"},
		"no authority":          {with("--ca", file("ca", "hello")), nil, "", "holds no certificate"},
		"no such file":          {with("-f", filepath.Join(dir, "none")), nil, "", "cannot be read"},
		"a time":                {with("--timeout", "5"), nil, "", "--timeout 5 is not a time"},
		"an image without tag":  {with("--image", "r:5000/a"), nil, "", "has no tag"},
		"a namespace":           {with("-n", "a b"), nil, "", "not a namespace"},
		"two words":             {[]string{"-u", url, "-k", "-"}, nil, "a b\n", "not one word"},
		"nothing":               {[]string{"-u", url, "-k", "-"}, nil, " \n", "is empty"},
		"no key file":           {[]string{"-u", url}, []string{"HEADSCALE_API_KEY_FILE=" + dir + "/none"}, "", "cannot be read"},
		"a key and a Secret":    {with("--set", "existingSecret=x"), nil, "", "leave one of them out"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := run{args: tc.args, env: tc.env, stdin: tc.stdin}
			r.do(t)
			r.want(t, 2, tc.says)
			if r.find("helm ") != nil || r.find("kubectl ") != nil {
				t.Error("it started something all the same")
			}
		})
	}
}

// An empty key in a values file is the chart's default, no secret.
func TestUsageTakesEmptyKeys(t *testing.T) {
	t.Parallel()
	values := filepath.Join(t.TempDir(), "values")
	if err := os.WriteFile(values, []byte("config:\n  headscale:\n    authKey: \"\"\n    apiKeyFile: \"\"\napiKey: # none\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	r := run{args: []string{"-u", url, "-k", apiKey, "-f", values}, scenario: scenario{Nodes: twoNodes(routed), APIStatus: "200"}}
	r.do(t)
	r.want(t, 0)
	if r.find("helm upgrade", "--values "+values) == nil {
		t.Error("helm does not get the file")
	}
}

func TestChecks(t *testing.T) {
	for name, tc := range map[string]struct {
		s    scenario
		says []string
	}{
		"helm is missing":    {scenario{Missing: []string{"helm"}}, []string{"helm is missing", "helm.sh/docs"}},
		"helm is old":        {scenario{HelmVersion: "v2.17.0"}, []string{"helm is v2.17.0", "Helm 3"}},
		"kubectl is missing": {scenario{Missing: []string{"kubectl"}}, []string{"kubectl is missing"}},
		"both are missing":   {scenario{Missing: []string{"helm", "kubectl"}}, []string{"helm is missing", "kubectl is missing"}},
		"no cluster":         {scenario{Unreachable: true}, []string{"the cluster of context staging does not answer", "10.0.0.1:6443 was refused", "KUBECONFIG=/etc/rancher/k3s/k3s.yaml"}},
		"no right":           {scenario{Forbidden: "create clusterrolebindings"}, []string{"you may not create clusterrolebindings", "cluster-admin"}},
		"no nodes":           {scenario{}, []string{"no Linux nodes"}},
		"no such host":       {scenario{CurlExit: 6, Nodes: twoNodes(routed)}, []string{url + " does not answer: Could not resolve", "--skip-url-check"}},
		"self-signed":        {scenario{CurlExit: 60, Nodes: twoNodes(routed)}, []string{"a certificate that is not trusted", "--ca FILE"}},
		"elsewhere already":  {scenario{Owner: "mine -n net", Nodes: twoNodes(routed)}, []string{"helm status mine -n net", "upgrade it: -n net", "helm uninstall mine -n net"}},
		"another server":     {scenario{NotThere: true, Nodes: twoNodes(routed)}, []string{"is no Headscale", "server_url"}},
		"a key that expired": {scenario{APIStatus: "401", Nodes: twoNodes(routed)}, []string{"refuses the API key", "headscale apikeys create"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := run{args: []string{"-u", url, "-k", apiKey}, scenario: tc.s}
			r.do(t)
			r.want(t, 1, tc.says...)
			if r.find("helm upgrade") != nil || r.find("apply") != nil {
				t.Error("it changed the cluster all the same")
			}
		})
	}
}

func TestNoKeyAnywhere(t *testing.T) {
	t.Parallel()
	r := run{args: []string{"-u", url}, scenario: scenario{Nodes: twoNodes(routed)}}
	r.do(t)
	r.want(t, 1, "no key was given", "-k -")
}

// What is no reason to stop is said all the same.
func TestWarnings(t *testing.T) {
	t.Parallel()
	nodes := twoNodes(routed)
	nodes[0].CIDRs, nodes[1].Flannel = "", "vxlan"
	r := run{args: []string{"-u", url, "-k", apiKey},
		scenario: scenario{Nodes: nodes, Missing: []string{"curl"}, DaemonSets: []string{"kube-system/kube-proxy", "kube-flannel/kube-flannel-ds"}}}
	r.do(t)
	r.want(t, 0, "curl is missing", "another pod network is here: flannel on b, kube-flannel/kube-flannel-ds", "config.cni.exclusive=true",
		"without pod CIDRs: a", "--cluster-cidr")
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
		"--key=":                 {[]string{"--key=" + apiKey}, nil, ""},
		"standard input":         {[]string{"-k", "-"}, nil, apiKey + "\n"},
		"-k before variables":    {[]string{"-k", apiKey}, append([]string{"HEADSCALE_API_KEY=other"}, all[1:]...), ""},
		"HEADSCALE_API_KEY":      {nil, all, ""},
		"HEADCNI_AUTH_KEY":       {nil, []string{"HEADSCALE_API_KEY= ", "HEADCNI_AUTH_KEY=" + apiKey, all[2], all[3]}, ""},
		"HEADSCALE_API_KEY_FILE": {nil, []string{"HEADSCALE_API_KEY_FILE=" + file("a", apiKey), all[3]}, ""},
		"HEADCNI_AUTH_KEY_FILE":  {nil, []string{"HEADCNI_AUTH_KEY_FILE=" + file("a", apiKey)}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := run{args: append([]string{"-u", url + "/"}, tc.args...), env: tc.env, stdin: tc.stdin,
				scenario: scenario{Nodes: twoNodes(routed), APIStatus: "200"}}
			r.do(t)
			r.want(t, 0, "Headscale takes the API key", "done")
			apply := r.find("kubectl", "--namespace kube-system", "apply --server-side", "--filename -")
			if apply == nil {
				t.Fatal("no Secret")
			}
			if want := "api-key: " + base64.StdEncoding.EncodeToString([]byte(apiKey)) + "\n"; !strings.Contains(apply.Stdin, want) {
				t.Errorf("the Secret lacks %q", want)
			}
			if c := r.find("curl", "/api/v1/apikey"); c == nil || !strings.Contains(c.Stdin, "Bearer "+apiKey) {
				t.Errorf("Headscale's API is asked with %+v", c)
			}
			if r.find("helm upgrade --install headcni ", "--set-string config.headscale.url="+url+" ", "--set-string existingSecret=headcni-auth") == nil {
				t.Error("helm is called otherwise")
			}
			for _, c := range r.calls {
				if i := slices.IndexFunc(c.Env, func(s string) bool {
					return strings.HasPrefix(s, "HEADSCALE_") || strings.HasPrefix(s, "HEADCNI_AUTH_")
				}); i >= 0 {
					t.Errorf("%s gets %s", c.line(), c.Env[i])
				}
			}
		})
	}
}

func TestOptionsReachHelmAndKubectl(t *testing.T) {
	t.Parallel()
	r := run{args: []string{"-u", url, "-k", apiKey, "--set", "config.network.mtu=1300", "--set=config.ipam.strategy=random", "--image", "r:5000/a/b:c",
		"-n", "net", "--kubeconfig", "/k", "--context=c", "--timeout", "1m30s"},
		scenario: scenario{Nodes: twoNodes(routed)[:1], NoNamespace: true, MicroK8s: true, APIStatus: "200", HasSecret: true}}
	r.do(t)
	r.want(t, 0)
	for _, c := range r.calls {
		if c.Name == "kubectl" && !strings.HasPrefix(c.line(), "kubectl --kubeconfig /k --context c ") {
			t.Errorf("called as %s", c.line())
		}
	}
	if r.find("helm upgrade", "--namespace net", "--kubeconfig /k --kube-context c", "--set config.network.mtu=1300", "--set config.ipam.strategy=random",
		"image.repository=r:5000/a/b ", "image.tag=c ", "--timeout 90s", "config.cni.binDir=/var/snap/microk8s/current/opt/cni/bin") == nil {
		t.Error("helm upgrade is called otherwise")
	}
	if c := r.find("apply --filename -"); c == nil || !strings.Contains(c.Stdin, "enforce: privileged") {
		t.Errorf("the namespace is made by %+v", c)
	}
	if r.find("--namespace net rollout restart deployment/headcni-controller") == nil {
		t.Error("the controller does not learn of the new key")
	}
}

// Headscale with a certificate of its own: curl, the controller and the nodes are told.
func TestAuthority(t *testing.T) {
	t.Parallel()
	ca := filepath.Join(t.TempDir(), "ca.crt")
	if err := os.WriteFile(ca, []byte("-----BEGIN CERTIFICATE-----\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	r := run{args: []string{"-u", url, "-k", apiKey, "--ca", ca}, scenario: scenario{Nodes: twoNodes(routed), APIStatus: "200"}}
	r.do(t)
	r.want(t, 0)
	if r.find("helm upgrade", "--set-file caBundle="+ca) == nil || r.find("curl", "--cacert "+ca, "/key") == nil || r.find("curl", "--cacert "+ca, "/api/v1/apikey") == nil {
		t.Error("the authority does not reach helm and curl")
	}
}

// What was installed by hand under another name is upgraded under that name.
func TestReleaseOfAnotherName(t *testing.T) {
	t.Parallel()
	r := run{args: []string{"-u", url, "-k", apiKey}, scenario: scenario{Nodes: twoNodes(routed), APIStatus: "200", Owner: "mine -n kube-system"}}
	r.do(t)
	r.want(t, 0, "helm uninstall mine -n kube-system")
	if r.find("helm upgrade --install mine ") == nil || r.find("helm test mine ") == nil {
		t.Error("helm is called for another release")
	}
}

func TestTheKeyInTheClusterStays(t *testing.T) {
	t.Parallel()
	r := run{args: []string{"-u", url, "--image", "a@sha256:00"}, scenario: scenario{Nodes: twoNodes(routed), HasSecret: true}}
	r.do(t)
	r.want(t, 0, "the key in the cluster stays")
	if r.find("apply") != nil || r.find("rollout") != nil || r.find("image.digest=sha256:00") == nil {
		t.Error("it is called otherwise")
	}
}

// What is missing is said for each node, with what to do.
func TestNotDone(t *testing.T) {
	pending := `{"nodeKey":"nodekey:2","state":"pending","message":"the policy says \"no\" to it"}`
	for name, tc := range map[string]struct {
		s      scenario
		key    string
		says   []string
		silent string
	}{
		"a daemon": {scenario{Nodes: twoNodes(routed), NotReady: true}, apiKey,
			[]string{"not ready: DaemonSet headcni (1 of 2 ready)", "last log line: the last line", "HeadCNINotRight: forward: the firewall drops"}, "conflist"},
		"a route": {scenario{Nodes: twoNodes(pending)}, apiKey,
			[]string{"not routed yet: b", `node b: Ready is True; pod CIDRs: 10.244.1.0/24 fd00:244:0:1::/64; Headscale: pending. the policy says "no" to it`}, "autoApprovers"},
		"unseen, with an API key": {scenario{Nodes: twoNodes(`{"state":"unseen"}`)}, apiKey, []string{"not routed yet: b"}, "autoApprovers"},
		"a node":                  {scenario{Nodes: append(twoNodes(routed), fakeNode{Name: "c", Ready: "False", CIDRs: "10.244.2.0/24", View: routed})}, apiKey, []string{"nodes not Ready: c"}, ""},
		"pods, with a pre-auth key": {scenario{Nodes: twoNodes(`{"state":"unseen"}`), TestFails: "pod on b at 10.244.1.7: no answer"}, preAuth,
			[]string{"not every pod answers", "pod on b at 10.244.1.7: no answer", `"tagOwners": { "tag:headcni": [] }`,
				`"autoApprovers": { "routes": { "10.244.0.0/24": ["tag:headcni"], "fd00:244::/64": ["tag:headcni"], "10.244.1.0/24": ["tag:headcni"], "fd00:244:0:1::/64": ["tag:headcni"] } }`,
				`"attr": ["cache-network-maps"]`}, ""},
		"pods, kubeadm's ranges": {scenario{Nodes: twoNodes(routed), TestFails: "x", Subnet: "10.244.0.0/16,fd00:244::/56"}, apiKey,
			[]string{`"src": ["tag:headcni", "10.244.0.0/16", "fd00:244::/56"]`, `"dst": ["tag:headcni:*", "10.244.0.0/16:*", "fd00:244::/56:*"]`}, "autoApprovers"},
		"helm": {scenario{Nodes: twoNodes(routed), HelmFails: "another operation (install/upgrade/rollback) is in progress"}, apiKey,
			[]string{"another operation (install", "helm rollback headcni -n kube-system"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			tc.s.APIStatus = "200"
			r := run{args: []string{"-u", url, "-k", tc.key, "--timeout", "1s"}, scenario: tc.s}
			r.do(t)
			r.want(t, 1, tc.says...)
			if tc.silent != "" && strings.Contains(r.out, tc.silent) {
				t.Errorf("it says %q", tc.silent)
			}
			if tc.s.TestFails != "" && r.find("delete", "pod/headcni-test", "daemonset/headcni-test") == nil {
				t.Error("the test's pods stay")
			}
		})
	}
}

func TestUnseenWillDoWithAPreAuthKey(t *testing.T) {
	t.Parallel()
	r := run{args: []string{"-u", url, "-k", preAuth}, scenario: scenario{Nodes: twoNodes(`{"state":"unseen"}`)}}
	r.do(t)
	r.want(t, 0, "any tagged node may announce", "done")
	if r.find("/api/v1/apikey") != nil {
		t.Error("a pre-auth key is no business of Headscale's API")
	}
}

// Without the image no time is waited out, and pods of an earlier run look for it at once.
func TestNoImage(t *testing.T) {
	t.Parallel()
	start := time.Now()
	r := run{args: []string{"-u", url, "-k", apiKey}, scenario: scenario{Nodes: twoNodes(routed), APIStatus: "200", NotReady: true, Waiting: "ImagePullBackOff"}}
	r.do(t)
	r.want(t, 1, "nodes cannot get the image", "make image", "images import")
	if took := time.Since(start); took > 2*time.Minute {
		t.Errorf("it took %v", took)
	}
	if r.find("delete pod --wait=false headcni-1") == nil {
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
		{"upgrade", syscall.SIGINT, 130}, {"upgrade", syscall.SIGTERM, 143}, {"test", syscall.SIGTERM, 143},
	} {
		t.Run(tc.during+" "+tc.signal.String(), func(t *testing.T) {
			t.Parallel()
			r := run{args: []string{"-u", url, "-k", "-"}, stdin: apiKey, scenario: scenario{Nodes: twoNodes(routed), APIStatus: "200", Hangs: tc.during}}
			cmd := r.command(t)
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
			r.want(t, tc.code, "Interrupted; HeadCNI may be installed in part. Run this again to go on, or take it off: helm uninstall headcni -n kube-system")
			if !slices.ContainsFunc(r.calls, func(c call) bool { return c.Interrupted }) {
				t.Error("helm goes on")
			}
			if tc.during == "test" && r.find("delete", "pod/headcni-test") == nil {
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
