package deploy

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/yaml"
	sigsyaml "sigs.k8s.io/yaml"

	"github.com/headcni/headcni/internal/nstest"
)

// What a dry run prints are manifests as real helm renders them from our chart, and the Secret without its key. No
// cluster is needed.
func TestDryRun(t *testing.T) {
	t.Parallel()
	tools := os.Getenv("HEADCNI_TOOLS")
	if _, err := os.Stat(filepath.Join(tools, "helm")); tools == "" || err != nil {
		nstest.Skip(t, "needs helm: run `make test`, or set HEADCNI_TOOLS to what test/tools/ensure prints")
	}
	dry := func(r run) string {
		t.Helper()
		r.scenario = scenario{Missing: []string{"helm"}, Unreachable: true}
		cmd := r.start(t)
		if err := os.Symlink(filepath.Join(tools, "helm"), filepath.Join(r.dir, "path", "helm")); err != nil {
			t.Fatal(err)
		}
		var out, progress strings.Builder
		cmd.Stdout, cmd.Stderr = &out, &progress
		if err := cmd.Run(); err != nil {
			t.Errorf("%v:\n%s", err, progress.String())
		}
		r.finish(t, cmd, []byte(out.String()+progress.String()))
		if r.cluster.requests != nil {
			t.Errorf("a dry run changes %q", r.cluster.requests)
		}
		return out.String()
	}
	args := []string{"-u", url, "--dry-run", "--set", "config.network.mtu=1300", "--image", "r:5000/a:b", "-n", "net"}
	out := dry(run{args: append(args, "-k", apiKey)})
	if own := dry(run{command: []string{"install"}, args: append(args, "--key-file", "KEYFILE")}); own != out {
		t.Errorf("headcnictl has another chart than the source: %s", cmp.Diff(out, own))
	}

	objects := map[string]string{}
	for d := yaml.NewDocumentDecoder(io.NopCloser(strings.NewReader(out))); ; {
		b := make([]byte, 1<<20)
		n, err := d.Read(b)
		if errors.Is(err, io.EOF) {
			break
		}
		var o metav1.PartialObjectMetadata
		if err == nil {
			err = sigsyaml.Unmarshal(b[:n], &o)
		}
		if err != nil {
			t.Fatalf("no manifest: %v:\n%s", err, b[:n])
		}
		objects[fmt.Sprintf("%s/%s/%s", o.Kind, o.Namespace, o.Name)] = string(b[:n])
	}
	var set appsv1.DaemonSet
	into(t, objects["DaemonSet/net/headcni"], &set)
	if c := set.Spec.Template.Spec.Containers; len(c) == 0 || c[0].Image != "r:5000/a:b" {
		t.Errorf("the daemon's containers are %+v", c)
	}
	var config corev1.ConfigMap
	into(t, objects["ConfigMap/net/headcni-config"], &config)
	if text := config.Data["daemon.yaml"]; !strings.Contains(text, "mtu: 1300\n") || !strings.Contains(text, "url: "+url+"\n") {
		t.Errorf("the configuration is\n%s", text)
	}
	var secret struct{ Data map[string]string }
	into(t, objects["Secret/net/headcni-auth"], &secret)
	if secret.Data["api-key"] != "***" {
		t.Errorf("the Secret holds %v", secret.Data)
	}
}

func into(t *testing.T, text string, object any) {
	t.Helper()
	if text == "" {
		t.Fatal("an object is missing")
	}
	if err := sigsyaml.Unmarshal([]byte(text), object); err != nil {
		t.Fatal(err)
	}
}
