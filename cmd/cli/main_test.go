package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/headcni/headcni/internal/program"
)

// ended runs the program as main does, and returns what it says, its error and its exit code.
func ended(ctx context.Context, args ...string) (said string, code int) {
	var out bytes.Buffer
	cmd := root()
	cmd.SetArgs(args)
	cmd.SetOut(&out)
	cmd.SetErr(&out)
	code = codeOf(cmd.ExecuteContext(ctx), &out)
	return out.String(), code
}

// TestWrongUsage: every command refuses what it does not know, in one line, and ends with 2.
func TestWrongUsage(t *testing.T) {
	t.Setenv("KUBECONFIG", "")
	t.Setenv("HOME", t.TempDir())
	var try func(cmd *cobra.Command, path []string)
	tried := 0
	try = func(cmd *cobra.Command, path []string) {
		many := strings.Fields("one two three four five")
		for _, more := range [][]string{{"--no-such-flag"}, many} {
			if len(more) > 1 && (cmd.Args == nil || cmd.Args(cmd, more) == nil) {
				continue // it takes as many as there are
			}
			var out bytes.Buffer
			cmd := root()
			cmd.SetArgs(append(append([]string{}, path...), more...))
			cmd.SetOut(io.Discard)
			cmd.SetErr(io.Discard)
			tried++
			if code := codeOf(cmd.ExecuteContext(t.Context()), &out); code != int(couldNotLook) || strings.Count(out.String(), "\n") != 1 {
				t.Errorf("%v %v: exit code %d, says %q", path, more, code, out.String())
			}
		}
		for _, sub := range cmd.Commands() {
			try(sub, append(append([]string{}, path...), sub.Name()))
		}
	}
	try(root(), nil)
	if tried < 80 {
		t.Errorf("tried %d: were all commands found?", tried)
	}
}

// TestHelp: what every command says of itself fits a terminal.
func TestHelp(t *testing.T) {
	var try func(cmd *cobra.Command, path []string)
	tried := 0
	try = func(cmd *cobra.Command, path []string) {
		for _, args := range [][]string{append(append([]string{}, path...), "--help"), append([]string{"help"}, path...)} {
			said, code := ended(t.Context(), args...)
			tried++
			if code != 0 || !strings.Contains(said, "Usage:") {
				t.Errorf("%v: exit code %d, says %q", args, code, said)
			}
			for line := range strings.Lines(said) {
				if n := utf8.RuneCountInString(strings.TrimRight(line, "\n")); n > program.Columns {
					t.Errorf("%v: %d columns: %s", args, n, line)
				}
			}
		}
		for _, sub := range cmd.Commands() {
			try(sub, append(append([]string{}, path...), sub.Name()))
		}
	}
	try(root(), nil)
	if tried < 90 {
		t.Errorf("tried %d: were all commands found?", tried)
	}
}

// TestNoCluster: where the API server cannot be asked, a command says why in one line, and ends with 2 before it has done anything.
func TestNoCluster(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("HOME", dir)
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	refused := file("refused", `{apiVersion: v1, kind: Config, current-context: c, clusters: [{name: c, cluster: {server: "https://127.0.0.1:1"}}],
		contexts: [{name: c, context: {cluster: c, user: u}}], users: [{name: u, user: {}}]}`)
	for kubeconfig, want := range map[string]string{
		filepath.Join(dir, "missing"): "missing: no such file or directory",
		file("empty", ""):             "says nothing of a cluster",
		file("broken", "a: ["):        "broken",
		file("context", "{apiVersion: v1, kind: Config, current-context: gone}"): "gone",
		refused: "connection refused",
	} {
		t.Setenv("KUBECONFIG", kubeconfig)
		for _, args := range []string{
			"status", "doctor", "why a b", "why a b --live", "ping a b", "peers", "routes", "connectivity test", "connectivity perf", "sysdump --file " + filepath.Join(dir, "dump"), "key show",
			"key rotate --join", "dns headscale", "dns corefile", "dns records",
		} {
			if strings.HasPrefix(args, "dns") {
				args += " --kubeconfig " + kubeconfig
				if strings.HasSuffix(kubeconfig, "empty") {
					continue // which speaks of it in other words
				}
			}
			said, code := ended(t.Context(), strings.Fields(args)...)
			if code != int(couldNotLook) || !strings.Contains(said, want) || strings.Count(said, "\n") != 1 {
				t.Errorf("%s with %s: exit code %d, says %q, want %q", args, filepath.Base(kubeconfig), code, said, want)
			}
			if local := root(); strings.Contains(said, "--local") {
				if cmd, _, err := local.Find(strings.Fields(args)); err != nil || cmd.Flags().Lookup("local") == nil {
					t.Errorf("%s has no --local: %s", args, said)
				}
			}
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 4 {
		t.Errorf("%v is left, %v", left, err)
	}
}

// TestInterrupted: Ctrl-C ends a look with 2, in one line.
func TestInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("interrupted"))
	t.Setenv("KUBECONFIG", "")
	t.Setenv("HOME", t.TempDir())
	for _, args := range []string{"status", "doctor", "routes", "peers"} {
		if said, code := ended(ctx, append(strings.Fields(args), "--local")...); code != int(couldNotLook) || strings.Count(said, "\n") != 1 {
			t.Errorf("%s: exit code %d, says %q", args, code, said)
		}
	}
}
