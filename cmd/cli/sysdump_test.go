package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/headcni/headcni/pkg/nodestatus"
)

func TestSysdump(t *testing.T) {
	noCluster(t)
	socket := answering(t, func() nodestatus.Status { return nodestatus.Status{Ready: true} })
	dir := t.TempDir()
	path := filepath.Join(dir, "x.tgz")
	out, err := headcnictl(t, "sysdump", "-o", path, "--socket", socket)
	info, statErr := os.Stat(path)
	if err != nil || statErr != nil || info.Mode().Perm() != 0o600 || !strings.Contains(out, path+" (") {
		t.Fatalf("%v, %v: %s", err, statErr, out)
	}
	var code exitCode
	if out, err := headcnictl(t, "sysdump", "-o", filepath.Join(dir, "none", "x.tgz"), "--socket", socket); !errors.As(err, &code) || code != 2 {
		t.Errorf("a folder that is not there: %v: %s", err, out)
	}
	// Ctrl-C leaves neither a file nor half of one.
	ctx, stop := context.WithCancel(t.Context())
	stop()
	cmd := root()
	var said bytes.Buffer
	cmd.SetOut(&said)
	cmd.SetErr(&said)
	cmd.SetArgs([]string{"sysdump", "-o", filepath.Join(dir, "y.tgz"), "--socket", socket})
	if err := cmd.ExecuteContext(ctx); !errors.As(err, &code) || code != 2 {
		t.Errorf("interrupted: %v: %s", err, said.String())
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("left: %v, %v", entries, err)
	}
}
