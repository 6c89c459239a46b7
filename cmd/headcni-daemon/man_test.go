package main

import (
	"testing"

	"github.com/headcni/headcni/internal/mantest"
)

// TestManual: make install copies pages that say what --help says.
func TestManual(t *testing.T) {
	mantest.Pages(t, root(), "8")
}
