package e2e

import (
	"strings"
	"testing"
	"time"
)

// testConformance runs upstream's own tests, in parallel, from the control host.
func testConformance(t *testing.T, w *world) {
	if *conformance == "" {
		return
	}
	path, err := w.Control.Run(within(t, 10*time.Second), "bash", "-c", "type -P e2e.test")
	if err != nil {
		t.Fatalf("e2e.test: %v; build it with test/tools/ensure kubernetes-e2e", err)
	}
	// e2e.test leaves files in its temporary folder.
	out, err := w.Control.Run(within(t, 20*time.Minute), "env", "TMPDIR="+t.TempDir(), "ginkgo", "--procs=6", "--no-color", "--timeout=19m", "--focus="+*conformance,
		strings.TrimSpace(path), "--", "--kubeconfig="+w.Kubeconfig(), "--provider=skeleton")
	lines := strings.Split(strings.TrimSpace(out), "\n")
	for _, line := range lines {
		if strings.HasPrefix(line, "Ran ") || strings.Contains(line, " Passed | ") || strings.Contains(line, "[FAIL]") {
			t.Log(line)
		}
	}
	if err != nil {
		t.Errorf("%v\n%s", err, strings.Join(lines[max(0, len(lines)-300):], "\n"))
	}
}
