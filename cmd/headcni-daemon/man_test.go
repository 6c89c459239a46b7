package main

import (
	"testing"

	"github.com/headcni/headcni/internal/mantest"
)

// TestManual: make install copies pages that say what --help says.
func TestManual(t *testing.T) {
	mantest.Pages(t, root(), "8")
}

// TestHints: whatever text names a command of this program names one that can be pasted.
func TestHints(t *testing.T) {
	if hints := mantest.Hints(t, root); len(hints) < 15 {
		t.Errorf("found %d: is the pattern right?", len(hints))
	}
}
