package main

import (
	"slices"
	"testing"

	"github.com/headcni/headcni/internal/mantest"
)

// TestManual: make install copies pages that say what --help says.
func TestManual(t *testing.T) {
	t.Setenv("KUBECONFIG", "") // a flag's default
	mantest.Pages(t, root(), "1")
	mantest.Completion(t, root())
}

// TestHints: whatever text names a command of this program names one that can be pasted, and that does it.
func TestHints(t *testing.T) {
	hints := mantest.Hints(t, root)
	if len(hints) < 60 {
		t.Errorf("found %d: is the pattern right?", len(hints))
	}
	for _, h := range hints {
		if len(h.Args) > 0 && h.Args[0] == "uninstall" && !slices.Contains(h.Args, "--yes") {
			t.Errorf("%s: without --yes uninstall does nothing: %v", h.Where, h.Args)
		}
	}
}
