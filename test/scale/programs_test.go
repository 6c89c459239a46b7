package scale

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/headcni/headcni/internal/kubetest"
	"github.com/headcni/headcni/internal/labtest"
)

// serveAPI serves the imitated API server and is a kubeconfig for it.
func serveAPI(t testing.TB, api kubetest.Client) (kubeconfig string) {
	t.Helper()
	// A watch would otherwise outlast the test's own server.
	ctx, cancel := context.WithCancel(context.Background())
	s := httptest.NewUnstartedServer(api)
	s.Config.BaseContext = func(net.Listener) context.Context { return ctx }
	s.Start()
	t.Cleanup(func() { cancel(); s.Close() })
	kubeconfig = filepath.Join(t.TempDir(), "kubeconfig")
	if err := os.WriteFile(kubeconfig, []byte(kubeconfigFor(s.URL)), 0o600); err != nil {
		t.Fatal(err)
	}
	return kubeconfig
}

func kubeconfigFor(url string) string {
	return fmt.Sprintf("{apiVersion: v1, kind: Config, current-context: c, contexts: [{name: c, context: {cluster: c, user: c}}], "+
		"users: [{name: c}], clusters: [{name: c, cluster: {server: '%s'}}]}", url)
}

// startController starts the real one, which leads as soon as it can.
func startController(t testing.TB, kubeconfig, headscale, apiKey string) *exec.Cmd {
	t.Helper()
	file := filepath.Join(t.TempDir(), "controller.yaml")
	text := fmt.Sprintf("headscale: {url: %q}\nkubernetes: {kubeconfig: %q}\nnetwork: {clusterCIDRs: [%q]}\n", headscale, kubeconfig, pods)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	bin := labtest.Programs(t)
	labtest.WithController(t, bin)
	cmd := exec.Command(filepath.Join(bin, "headcni-controller"), "run", "--config", file, "--listen", "")
	cmd.Env = append(os.Environ(), "HEADSCALE_API_KEY="+apiKey)
	start(t, cmd)
	return cmd
}

// start starts a program, which is told to end with the test. Where the test fails, what the program said is shown.
func start(t testing.TB, cmd *exec.Cmd) {
	t.Helper()
	var said bytes.Buffer
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM) // it may have ended
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("%s: %s", cmd.Path, said.String())
		}
	})
}
