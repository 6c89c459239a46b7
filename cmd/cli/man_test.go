package main

import (
	"testing"

	"github.com/headcni/headcni/internal/mantest"
)

// TestManual: make install copies pages that say what --help says.
func TestManual(t *testing.T) {
	t.Setenv("KUBECONFIG", "") // a flag's default
	mantest.Pages(t, root(), "1")
	mantest.Completion(t, root())
}
