package chart

import (
	"bytes"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/headcni/headcni/internal/nstest"
)

// fakes stand in for helm and kubectl: they note the arguments that anybody could read, and answer from the environment.
const (
	fakeHelm = `#!/usr/bin/env bash
printf 'helm %s\n' "$*" >>"$LOG"
tr '\0' ' ' </proc/$PPID/cmdline >>"$LOG"; echo >>"$LOG"
case $1 in
version) echo v3.22.0 ;;
upgrade)
	for a in "$@"; do case $a in config.headscale.authKey=/*) f=${a#*=}; stat -c '%a' "$f" >"$LOG.mode"; cp "$f" "$LOG.key" ;; esac; done
	[[ -z ${FAIL_UPGRADE:-} ]] || { echo "Error: $FAIL_UPGRADE"; exit 1; } ;;
test) [[ -z ${FAIL_TEST:-} ]] || { echo "Error: $FAIL_TEST"; exit 1; } ;;
esac
`
	fakeKubectl = `#!/usr/bin/env bash
printf 'kubectl %s\n' "$*" >>"$LOG"
tr '\0' ' ' </proc/$PPID/cmdline >>"$LOG"; echo >>"$LOG"
case "$*" in
*'--raw /version'*) [[ -z ${NO_CLUSTER:-} ]] || { echo "connection refused" >&2; exit 1; } ;;
'auth can-i'*) echo yes ;;
*'headcni\.io/headscale'*) printf 'n1\t%s\nn2\t%s\n' '{"nodeKey":"nodekey:1","state":"routed"}' "$VIEW" ;;
*microk8s*) [[ -z ${MICROK8S:-} ]] || echo node/n1 ;;
*spec.podCIDRs*) printf '10.244.0.0/24 fd00:244::/64\n10.244.1.0/24 fd00:244:0:1::/64\n' ;;
'get nodes -o jsonpath='*) printf '%b' "${NODES:-n1\nn2\n}" ;;
*'get secret headcni-auth'*) [[ -n ${SECRET:-} ]] ;;
*'get daemonset headcni -o jsonpath={.spec'*) echo ghcr.io/headcni/headcni:1 ;;
*'get daemonset headcni'*) printf '%s' "${DAEMONS:-2,2,2,1,1}" ;;
*'get deployment'*) printf 1 ;;
*waiting.reason*) printf '%s' "${WAITING:-}" ;;
*kubeadm-config*) printf '%b' "${KUBEADM:-}" ;;
*'get events'*) printf 'headcni.io/daemon\tn2: the firewall drops\nkubelet\tn2: other\n' ;;
esac
`
)

// deployment is one run of the script.
type deployment struct {
	args  []string
	env   []string
	stdin string
	// key is the kind that the server takes the key for: api (200), else 401.
	status int

	code        int
	out, log    string
	key, mode   string
	left        []string
	url, runDir string
}

func (d *deployment) run(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("curl"); err != nil {
		nstest.Skip(t, "needs curl")
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/api/v1/apikey" {
			if r.Header.Get("Authorization") != "Bearer "+theKey {
				t.Errorf("the server is asked with %q", r.Header.Get("Authorization"))
			}
			w.WriteHeader(d.status)
		}
	}))
	defer server.Close()
	dir := t.TempDir()
	for name, text := range map[string]string{"helm": fakeHelm, "kubectl": fakeKubectl} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	log := filepath.Join(dir, "log")
	run := filepath.Join(dir, "run")
	if err := os.Mkdir(run, 0o700); err != nil {
		t.Fatal(err)
	}
	script, err := filepath.Abs(filepath.Join(root, "deploy-with-helm.sh"))
	if err != nil {
		t.Fatal(err)
	}
	d.url = "http://host.test:" + server.URL[strings.LastIndex(server.URL, ":")+1:]
	cmd := exec.Command(script, append([]string{"-u", d.url + "/"}, d.args...)...)
	cmd.Dir = dir // it works from anywhere
	// The script refuses 127.0.0.1, so the server has a name.
	if err := os.WriteFile(filepath.Join(dir, ".curlrc"), []byte(`connect-to = "host.test::127.0.0.1:"`+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd.Env = append([]string{"PATH=" + dir + ":" + os.Getenv("PATH"), "HOME=" + dir, "LOG=" + log, "XDG_RUNTIME_DIR=" + run, "TMPDIR=" + run,
		`VIEW={"nodeKey":"nodekey:2","state":"routed"}`}, d.env...)
	cmd.Stdin = strings.NewReader(d.stdin)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	_ = cmd.Run() // the exit code tells
	d.code, d.out = cmd.ProcessState.ExitCode(), out.String()
	d.log, d.key, d.mode = file(log), file(log+".key"), strings.TrimSpace(file(log+".mode"))
	entries, err := os.ReadDir(run)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		d.left = append(d.left, e.Name())
	}
}

func file(path string) string {
	b, _ := os.ReadFile(path) // not there: empty
	return string(b)
}

func TestDeploy(t *testing.T) {
	unapproved := `VIEW={"nodeKey":"nodekey:2","state":"pending","message":"not approved"}`
	for name, tc := range map[string]struct {
		d       deployment
		code    int
		says    []string
		helm    []string
		without []string
	}{
		"all is well": {d: deployment{args: []string{"-k", theKey, "--set", "config.network.mtu=1300", "--image", "r:5000/a/b:c"}, status: 200},
			says: []string{"pods on all 2 nodes reach each other"},
			helm: []string{"helm upgrade --install headcni ", "/chart --namespace kube-system", "--set-string image.repository=r:5000/a/b ",
				"--set-string image.tag=c", "--set config.network.mtu=1300", "--set-file config.headscale.authKey=/", "helm test headcni --namespace kube-system"},
			without: []string{"controller.replicas"}},
		"--key=, another namespace, one node": {d: deployment{args: []string{"--key=" + theKey, "-n", "net"}, env: []string{`NODES=n1\n`}, status: 200},
			helm: []string{"--namespace net", "controller.replicas=1"}},
		"key on standard input":  {d: deployment{args: []string{"-k", "-"}, stdin: theKey + "\n", status: 200}},
		"key in the environment": {d: deployment{env: []string{"HEADCNI_AUTH_KEY=" + theKey}, status: 200}},
		"MicroK8s, a digest": {d: deployment{args: []string{"-k", theKey, "--image=a/b@sha256:00"}, env: []string{"MICROK8S=1"}, status: 200},
			helm: []string{"config.cni.binDir=/var/snap/microk8s/current/opt/cni/bin", "image.digest=sha256:00"}},
		"Secret in the cluster": {d: deployment{env: []string{"SECRET=1"}}, without: []string{"authKey"}},
		"dry run": {d: deployment{args: []string{"--dry-run", "-k", theKey}, status: 200},
			helm: []string{"THE-KEY-IS-NOT-SHOWN", "--dry-run"}, without: []string{"helm test", "--set-file"}},
		"no key": {code: 1, says: []string{"no key: give one with -k", "headcni-auth"}},
		"a key that has expired": {d: deployment{args: []string{"-k", theKey}, status: 401}, code: 1,
			says: []string{"refuses the API key", "headscale apikeys create"}, without: []string{"helm upgrade"}},
		"no cluster": {d: deployment{args: []string{"-k", theKey}, env: []string{"NO_CLUSTER=1"}, status: 200}, code: 1,
			says: []string{"connection refused", "kubectl config current-context"}, without: []string{"helm upgrade"}},
		"key by --set":   {d: deployment{args: []string{"--set", "config.headscale.authKey=x"}}, code: 1, says: []string{"give the key with -k"}},
		"no such option": {d: deployment{args: []string{"--wait=1"}}, code: 1, says: []string{"no such option: --wait"}},
		"helm fails": {d: deployment{args: []string{"-k", theKey}, env: []string{"FAIL_UPGRADE=another operation is in progress"}, status: 200}, code: 1,
			says: []string{"helm failed", "another operation"}},
		"no image": {d: deployment{args: []string{"-k", theKey, "--timeout", "60"}, env: []string{"WAITING=ImagePullBackOff", "DAEMONS=2,0,2,1,1"}, status: 200},
			code: 1, says: []string{"nodes have no image ghcr.io/headcni/headcni:1", "make image", "--image"}},
		"daemons are not ready": {d: deployment{args: []string{"-k", theKey, "--timeout", "3s"}, env: []string{"DAEMONS=2,1,2,1,1"}, status: 200}, code: 1,
			says: []string{"NOT READY", "nodes whose network is programmed: 1 of 2", "n2: the firewall drops"}, without: []string{"autoApprovers"}},
		"routes are not approved": {d: deployment{args: []string{"-k", theKey, "--timeout", "3"}, env: []string{unapproved}, status: 200}, code: 1,
			says: []string{"NOT READY", "not approved yet: n2", "Node n2: not approved"}},
		"a pre-auth key and traffic fails": {d: deployment{args: []string{"-k", "hskey-auth-x"}, env: []string{
			`VIEW={"nodeKey":"nodekey:2","state":"unseen"}`, "FAIL_TEST=pod headcni-test failed", `KUBEADM=networking:\n  podSubnet: 10.244.0.0/16,fd00:244::/56\n`}}, code: 1,
			says: []string{"a pod does not reach", "headcni-test failed",
				`"autoApprovers": {"routes": {"10.244.0.0/16": ["tag:headcni"], "fd00:244::/56": ["tag:headcni"]}},`,
				`"src": ["tag:headcni", "10.244.0.0/16", "fd00:244::/56"], "dst": ["tag:headcni:*", "10.244.0.0/16:*", "fd00:244::/56:*"]`}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := tc.d
			d.run(t)
			if d.code != tc.code {
				t.Errorf("exit code %d, want %d", d.code, tc.code)
			}
			for _, want := range tc.says {
				if !strings.Contains(d.out, want) {
					t.Errorf("does not say %q", want)
				}
			}
			for _, want := range tc.helm {
				if !strings.Contains(d.log, want) {
					t.Errorf("nothing is called with %q", want)
				}
			}
			for _, not := range tc.without {
				if strings.Contains(d.log, not) || strings.Contains(d.out, not) {
					t.Errorf("%q is there", not)
				}
			}
			d.checkKey(t)
			if t.Failed() {
				t.Logf("it said:\n%s\nit called:\n%s", d.out, d.log)
			}
		})
	}
}

// checkKey: no process has the key among its arguments, helm had it in a file of mode 0600, and nothing is left.
func (d *deployment) checkKey(t *testing.T) {
	t.Helper()
	if strings.Contains(d.log, theKey) || strings.Contains(d.out, theKey) {
		t.Error("the key is in the arguments of a process or in the output")
	}
	if strings.Contains(d.log, "--set-file") && (d.mode != "600" || d.key != theKey && d.key != "hskey-auth-x") {
		t.Errorf("helm gets a file of mode %q with %q", d.mode, d.key)
	}
	if len(d.left) > 0 {
		t.Errorf("left behind: %v", d.left)
	}
}
