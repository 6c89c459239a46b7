package e2e

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/headcni/headcni/internal/cluster"
)

// lookRights are the rights that docs/operations.md says whoever looks needs, and a user who has less.
const lookRights = `
apiVersion: v1
kind: ServiceAccount
metadata: {name: NAME, namespace: default}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: NAME}
rules:
- {apiGroups: [""], resources: [nodes], verbs: [list]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: NAME}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: NAME}
subjects: [{kind: ServiceAccount, name: NAME, namespace: default}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: NAME, namespace: kube-system}
rules:
- {apiGroups: [""], resources: [pods], verbs: [list]}
- {apiGroups: [""], resources: [RESOURCE], verbs: [VERBS]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: NAME, namespace: kube-system}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: NAME}
subjects: [{kind: ServiceAccount, name: NAME, namespace: default}]
`

// TestCLI looks at a whole cluster from afar: healthy, with a key that Headscale refuses, without rights; and makes an archive.
func TestCLI(t *testing.T) {
	w := start(t, cluster.Options{Workers: 2, ProxyMode: *proxyMode})
	ctl := filepath.Join(w.Dir, "headcnictl")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", ctl, "../../cmd/cli").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	// look returns what headcnictl prints, and its exit code.
	look := func(ctx context.Context, kubeconfig string, args ...string) (string, string) {
		command := fmt.Sprintf("code=0; KUBECONFIG=%s %s %s 2>&1 || code=$?; echo exit $code", kubeconfig, ctl, strings.Join(args, " "))
		out, err := w.Control.Run(ctx, "sh", "-c", command)
		if err != nil {
			t.Fatal(err)
		}
		i := strings.LastIndex(out, "exit ")
		return out[:i], strings.TrimSpace(out[i+len("exit "):])
	}
	want := func(kubeconfig, code, text string, args ...string) {
		t.Helper()
		out, got := look(within(t, 5*time.Minute), kubeconfig, args...)
		t.Logf("headcnictl %s: exit code %s\n%s", strings.Join(args, " "), got, out)
		if got != code || !strings.Contains(out, text) {
			t.Errorf("want exit code %s and %q", code, text)
		}
	}
	admin := w.Kubeconfig()
	want(admin, "2", "no pod of HeadCNI's daemon in namespace kube-system", "status")
	w.install(t, nil)
	want(admin, "0", "3 of 3 nodes right", "status", "--wait=4m")
	want(admin, "0", " 0 failures", "doctor")
	want(admin, "0", "1 of 1 node right", "status", "--node", w.Nodes[1].Name)
	want(admin, "2", `there is no Node "nobody"`, "status", "--node", "nobody")
	want(admin, "2", "no pod of HeadCNI's daemon", "status", "-n", "default")
	want("/none", "2", "read the kubeconfig", "status")

	want(w.user(t, "looker", "pods/exec"), "0", "3 of 3 nodes right", "status")
	want(w.user(t, "reader", "pods/log"), "2", "needs the right to create pods/exec in namespace kube-system", "status")
	want(w.user(t, "", ""), "2", "list the Nodes", "status")

	w.whyLive(t, ctl, look, want)

	dump := filepath.Join(w.Dir, "dump.tgz")
	want(admin, "0", "secrets masked", "sysdump", "-o", dump)
	w.checkDump(t, dump)
	want(w.user(t, "dumper", "pods/exec"), "0", "did not answer: cluster/networkpolicies.json", "sysdump", "-o", dump)

	key := w.kubectl(t, "get", "secret", "-n", namespace, "headcni-auth", "-o", "jsonpath={.data.api-key}")
	patch := func(key string) {
		t.Helper()
		w.kubectl(t, "patch", "secret", "-n", namespace, "headcni-auth", "-p", `{"data":{"api-key":"`+key+`"}}`)
	}
	patch(base64.StdEncoding.EncodeToString([]byte("hskey-api-wrongwrongwr-" + strings.Repeat("w", 64))))
	eventually(t, "the refused key is found", 4*time.Minute, func(ctx context.Context) error {
		if out, code := look(ctx, admin, "status"); code != "1" || !strings.Contains(out, "HC221") {
			time.Sleep(2 * time.Second)
			return fmt.Errorf("exit code %s of\n%s", code, out)
		}
		return nil
	})
	want(admin, "1", "headscale apikeys create", "status")
	right, err := base64.StdEncoding.DecodeString(key)
	if err != nil {
		t.Fatal(err)
	}
	file := func(name, text string) string {
		t.Helper()
		path := filepath.Join(w.Dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	// The pod that is asked may have its Secret later than the leader.
	showsKey := func(want, text string) {
		t.Helper()
		eventually(t, "key show: "+text, 4*time.Minute, func(ctx context.Context) error {
			if out, code := look(ctx, admin, "key", "show"); code != want || !strings.Contains(out, text) {
				time.Sleep(2 * time.Second)
				return fmt.Errorf("exit code %s of\n%s", code, out)
			}
			return nil
		})
	}
	showsKey("1", "is refused by Headscale")
	want(admin, "1", "nothing was changed", "key", "rotate", "--from-file", file("wrong", "hskey-api-otherwrongr-"+strings.Repeat("w", 64)))
	want(admin, "0", "written to Secret "+namespace+"/headcni-auth", "key", "rotate", "--from-file", file("right", string(right)+"\n"))
	want(w.user(t, "rotator", "pods/exec"), "2", "it needs the right to patch the Secret headcni-auth", "key", "rotate", "--from-file", file("new", w.newAPIKey(t)))
	want(admin, "0", "3 of 3 nodes right", "status", "--wait=4m")
	showsKey("0", "number ")
	number := func(ctx context.Context) string {
		out, _ := look(ctx, admin, "key", "show")
		_, after, _ := strings.Cut(out, "number ")
		n, _, _ := strings.Cut(after, ",")
		return n
	}
	before := number(within(t, time.Minute))
	want(admin, "0", "key "+before+" has ended", "key", "rotate", "--join")
	eventually(t, "another join key", 4*time.Minute, func(ctx context.Context) error {
		if n := number(ctx); n == before || n == "" {
			time.Sleep(time.Second)
			return fmt.Errorf("it is key %q", n)
		}
		return nil
	})
}

type (
	// lookFunc returns what headcnictl prints, and its exit code.
	lookFunc func(ctx context.Context, kubeconfig string, args ...string) (string, string)
	// wantFunc wants an exit code and a text of it.
	wantFunc func(kubeconfig, code, text string, args ...string)
)

// whyLive has a packet sent from pod to pod: where all is well, to a port that nobody listens on, and against a policy, of which all nodes are
// asked then.
func (w *world) whyLive(t *testing.T, ctl string, look lookFunc, want wantFunc) {
	t.Helper()
	w.apply(t, "echo.yaml", echoManifest)
	eventually(t, "the pods answer", 3*time.Minute, w.findPods)
	from, to := w.echo[w.Workers()[0].Name], w.echo[w.Workers()[1].Name]
	why := []string{"why", "--live", echoes + "/" + from.Name, echoes + "/" + to.Name, "--port"}
	want(w.Kubeconfig(), "0", "answered, and the answer came back", append(why, "8080")...)
	want(w.Kubeconfig(), "0", "sent from the pod's link, on its node", append(why[:4:4], "--proto", "icmp")...)
	want(w.Kubeconfig(), "1", "refused, as step", append(why, "81")...)
	w.apply(t, "denies.yaml", "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: denies, namespace: "+echoes+"}, spec: {podSelector: {}, policyTypes: [Ingress]}}")
	defer w.kubectl(t, "delete", "networkpolicy", "-n", echoes, "denies")
	eventually(t, "the policy holds", time.Minute, func(ctx context.Context) error {
		if _, err := w.get(ctx, from, url(addrs(t, to)[0], 8080, "/hostname")); err == nil {
			time.Sleep(100 * time.Millisecond)
			return errors.New("it still answers")
		}
		return nil
	})
	want(w.Kubeconfig(), "1", "NetworkPolicies denied it", append(why, "8080")...)
	w.policiesFromAfar(t, ctl, look, want, from, to)
	for _, n := range w.Nodes {
		if out, err := n.Run(within(t, time.Minute), "ip", "-br", "link"); err != nil || strings.Contains(out, "headcni-why") {
			t.Errorf("%s: %v, left links:\n%s", n.Name, err, out)
		}
	}
}

// policiesFromAfar asks all nodes from afar about a policy that isolates to, and follows what it denies.
func (w *world) policiesFromAfar(t *testing.T, ctl string, look lookFunc, want wantFunc, from, to *corev1.Pod) {
	t.Helper()
	admin := w.Kubeconfig()
	for _, n := range w.Nodes {
		want(admin, "0", "node "+n.Name+"\n", "policy", "list")
	}
	explain := []string{"policy", "explain", echoes + "/" + to.Name, "--from", echoes + "/" + from.Name, "--port", "8080"}
	want(admin, "0", echoes+"/denies", explain...)
	out, code := look(within(t, time.Minute), admin, explain...)
	if code != "0" || strings.Contains(out, "was not asked") || strings.Count(out, "the kernel does the same") != 2 {
		t.Errorf("want both kernels, exit code %s:\n%s", code, out)
	}
	want(admin, "0", `"verdict": "denied"`, append(explain, "-o", "json")...)
	want(admin, "0", echoes+"/"+from.Name, "ipam", "list")
	want(admin, "0", "all well", "ipam", "check")
	want(admin, "2", "there is no pod nobody in namespace default", "policy", "explain", "nobody")
	want(admin, "0", "DENIED", "drops", "--node", to.Spec.NodeName)
	want(w.user(t, "stranger", "pods/log"), "2", "needs the right to create pods/exec", "policy", "list")

	ctx := within(t, 2*time.Minute)
	go func() {
		for ctx.Err() == nil {
			_, _ = w.get(ctx, from, url(addrs(t, to)[0], 8080, "/hostname")) // it is denied
			time.Sleep(time.Second)
		}
	}()
	out, err := w.Control.Run(ctx, "sh", "-c", fmt.Sprintf("KUBECONFIG=%s timeout -s INT 20 %s drops -f 2>&1 || [ $? = 124 ]", admin, ctl))
	if line := to.Spec.NodeName + "  "; err != nil || !strings.Contains(out, line) || !strings.Contains(out, echoes+"/"+from.Name) || !strings.Contains(out, echoes+"/"+to.Name) {
		t.Errorf("drops -f: %v, want lines of %q:\n%s", err, line, out)
	}
	eventually(t, "nobody logs any more", time.Minute, func(ctx context.Context) error {
		for _, n := range w.Nodes {
			if out, err := n.Run(ctx, "pgrep", "-f", "headcnictl drops"); err == nil {
				time.Sleep(time.Second)
				return fmt.Errorf("%s: %s", n.Name, out)
			}
		}
		return nil
	})
}

// newAPIKey makes one with Headscale's own client.
func (w *world) newAPIKey(t *testing.T) string {
	t.Helper()
	out, err := w.Control.Run(within(t, time.Minute), "headscale", "apikeys", "create")
	words := strings.Fields(out)
	if err != nil || len(words) == 0 {
		t.Fatalf("%v: %s", err, out)
	}
	return words[len(words)-1]
}

// user makes a service account that may list nodes and pods, and get and create a resource of pods, and returns its kubeconfig. One
// without a name may nothing.
func (w *world) user(t *testing.T, name, resource string) string {
	t.Helper()
	if name == "" {
		name = "default"
	} else {
		verbs := "create"
		if resource == "pods/log" {
			verbs = "get"
		}
		w.apply(t, name+".yaml", strings.NewReplacer("NAME", name, "RESOURCE", resource, "VERBS", verbs).Replace(lookRights))
	}
	token := strings.TrimSpace(w.kubectl(t, "create", "token", "-n", "default", name))
	b, err := os.ReadFile(w.Kubeconfig())
	path := filepath.Join(w.Dir, name+".kubeconfig")
	if err = errors.Join(err, os.WriteFile(path, b, 0o600)); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"set-credentials", "it", "--token=" + token}, {"set-context", "--current", "--user=it"}} {
		if _, err := w.Control.Run(within(t, time.Minute), "kubectl", append([]string{"--kubeconfig=" + path, "config"}, args...)...); err != nil {
			t.Fatal(err)
		}
	}
	return path
}

// checkDump wants everything in an archive that all nodes answered for, and no secret.
func (w *world) checkDump(t *testing.T, path string) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	z, err := gzip.NewReader(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{}
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		content, err2 := io.ReadAll(r)
		if err := errors.Join(err, err2); err != nil {
			t.Fatal(err)
		}
		files[strings.TrimPrefix(h.Name, "headcni-sysdump/")] = string(content)
	}
	var secrets []string
	for _, of := range []string{"headcni-auth", "headcni-join"} {
		text := w.kubectl(t, "get", "secret", "-n", namespace, of, "-o", `go-template={{range $k, $v := .data}}{{$v}} {{end}}`)
		for _, encoded := range strings.Fields(text) {
			secret, err := base64.StdEncoding.DecodeString(encoded)
			if err != nil {
				t.Fatal(err)
			}
			secrets = append(secrets, encoded)
			if s := string(secret); strings.HasPrefix(s, "hskey-") {
				secrets = append(secrets, s, s[strings.LastIndex(s, "-")+1:])
			}
		}
	}
	if len(secrets) < 6 {
		t.Errorf("the cluster has %d secrets: is the pattern right?", len(secrets))
	}
	bad := regexp.MustCompile(`nodekey:[0-9a-f]{8}|eyJ[A-Za-z0-9_-]{20}|BEGIN [A-Z ]+-----\s*[A-Za-z0-9+/]{20}`)
	for name, text := range files {
		for _, s := range secrets {
			if strings.Contains(text, s) {
				t.Errorf("a secret is in %s", name)
			}
		}
		if found := bad.FindString(text); found != "" {
			t.Errorf("%.12q... is in %s", found, name)
		}
	}
	want := map[string]string{"summary.txt": "3 of 3 nodes right", "cluster/nodes.json": "podCIDR", "cluster/pods.json": "headcni-daemon", "cluster/configmap-headcni-config.json": "headscale"}
	for _, n := range w.Nodes {
		for name, text := range map[string]string{
			"status.json": `"ready": true`, "daemon.log": "started", "tailscaled.log": "", "rules.txt": "5191:", "routes.txt": "table 52: unicast", "nft.txt": "chain guard",
			"links.txt": "headcni01", "sysctls.txt": "forwarding", "conflists.txt": "headcni", "tailscale.json": "Running", "metrics.txt": "headcni_", "config.yaml": "headscale",
		} {
			want["nodes/"+n.Name+"/"+name] = text
		}
	}
	for name, text := range want {
		if content, ok := files[name]; !ok || !strings.Contains(content, text) {
			t.Errorf("%q is not in %s (there: %v): %.300s", text, name, ok, content)
		}
	}
	t.Logf("%s", files["summary.txt"])
}
