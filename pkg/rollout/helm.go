package rollout

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/headcni/headcni/internal/printable"
)

// helm is the program, for one namespace of one cluster.
type helm struct {
	namespace, kubeconfig, context string
}

// helmPatience is what Helm has to write down that it was interrupted.
const helmPatience = 30 * time.Second

// keyVariables hold a key or lead to one; Helm gets none.
var keyVariables = []string{"HEADSCALE_API_KEY", "HEADCNI_AUTH_KEY", "HEADSCALE_API_KEY_FILE", "HEADCNI_AUTH_KEY_FILE"}

// run returns what Helm prints. When ctx ends Helm is told to, and its end awaited.
func (h helm) run(ctx context.Context, args ...string) ([]byte, error) {
	args = append(args, "--namespace", h.namespace)
	if h.kubeconfig != "" {
		args = append(args, "--kubeconfig", h.kubeconfig)
	}
	if h.context != "" {
		args = append(args, "--kube-context", h.context)
	}
	cmd := exec.CommandContext(ctx, "helm", args...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = helmPatience
	for _, v := range os.Environ() {
		if name, _, _ := strings.Cut(v, "="); !slices.Contains(keyVariables, name) {
			cmd.Env = append(cmd.Env, v)
		}
	}
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if err != nil {
		var lines []string
		for line := range strings.Lines(errs.String()) {
			lines = append(lines, printable.Cut(strings.TrimSpace(line), 1000)) // it may hold whole objects
		}
		return nil, &helmError{command: args[0], text: strings.Join(lines, "\n"), err: err}
	}
	return out.Bytes(), nil
}

// helmError is what Helm said when it failed.
type helmError struct {
	command, text string
	err           error
}

func (e *helmError) Error() string {
	if e.text == "" {
		return fmt.Sprintf("helm %s: %v", e.command, e.err)
	}
	return fmt.Sprintf("helm %s: %s", e.command, e.text)
}

func (e *helmError) Unwrap() error { return e.err }

// notThere reports whether Helm knows no such release.
func notThere(err error) bool {
	e := new(helmError)
	return errors.As(err, &e) && strings.Contains(e.text, "release: not found")
}

var helmVersion = regexp.MustCompile(`^v?(\d+)\.(\d+)\.`)

// version returns what Helm calls itself, or an error that says what to do.
func (h helm) version(ctx context.Context, atLeast ...int) (string, error) {
	const where = "https://helm.sh/docs/intro/install/"
	if _, err := exec.LookPath("helm"); err != nil {
		return "", fmt.Errorf("helm is missing: install Helm 3 or later: %s", where)
	}
	out, err := h.run(ctx, "version", "--short")
	if err != nil {
		return "", err
	}
	text := strings.TrimSpace(string(out))
	var have []int
	if m := helmVersion.FindStringSubmatch(text); m != nil {
		for _, digits := range m[1:] {
			n, _ := strconv.Atoi(digits) // the pattern has digits only
			have = append(have, n)
		}
	}
	if have == nil || slices.Compare(have, atLeast) < 0 {
		return "", fmt.Errorf("helm is %s: install Helm %s or later: %s", text, strings.Trim(strings.ReplaceAll(fmt.Sprint(atLeast), " ", "."), "[]"), where)
	}
	return text, nil
}
