// Package podexec runs fixed commands in pods, as kubectl exec does. It is a package of its own since only headcnictl links what it needs.
package podexec

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"

	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"
	utilexec "k8s.io/client-go/util/exec"
	"k8s.io/klog/v2"
	"k8s.io/streaming/pkg/httpstream"
)

// maxOutput bounds what is kept of a command's output, in bytes.
const maxOutput = 64 << 20

// Pod is where a command runs.
type Pod struct {
	Namespace, Name, Container string
}

// Exit is the error of a command that ran and did not exit with 0.
type Exit struct {
	Code   int
	Stderr string
}

func (e Exit) Error() string {
	return strings.TrimSpace(fmt.Sprintf("exit code %d: %s", e.Code, e.Stderr))
}

// ErrForbidden means that whoever asks has no right to.
var ErrForbidden = errors.New("no right to run commands in pods")

// Run runs a command and returns what it wrote to standard output, also where it returns an Exit.
func Run(ctx context.Context, c *rest.Config, pod Pod, command ...string) ([]byte, error) {
	return Feed(ctx, c, pod, nil, command...)
}

// Feed is Run for a command that reads its standard input, where what is secret or long belongs; nil = it has none.
func Feed(ctx context.Context, c *rest.Config, pod Pod, stdin []byte, command ...string) ([]byte, error) {
	var in io.Reader
	if stdin != nil {
		in = bytes.NewReader(stdin)
	}
	var stdout limited
	err := Stream(ctx, c, pod, in, &stdout, command...)
	return stdout.bytes(), err
}

// Stream runs a command to its end, and hands on what it writes to standard output as it comes. stdin may be nil.
func Stream(ctx context.Context, c *rest.Config, pod Pod, stdin io.Reader, stdout io.Writer, command ...string) error {
	// The library logs what ends a stream; whoever asked hears of it.
	ctx = klog.NewContext(ctx, klog.New(nil))
	u, err := address(c, pod, command)
	if err != nil {
		return err
	}
	if stdin != nil {
		q := u.Query()
		q.Set("stdin", "true")
		u.RawQuery = q.Encode()
	}
	// WebSocket is what API servers of today speak and proxies let pass; SPDY is for those before 1.31.
	ws, err := remotecommand.NewWebSocketExecutor(c, "GET", u.String())
	if err != nil {
		return err
	}
	spdy, err := remotecommand.NewSPDYExecutor(c, "POST", u)
	if err != nil {
		return err
	}
	executor, err := remotecommand.NewFallbackExecutor(ws, spdy, func(err error) bool {
		return httpstream.IsUpgradeFailure(err) || httpstream.IsHTTPSProxyError(err)
	})
	if err != nil {
		return err
	}
	var stderr limited
	err = executor.StreamWithContext(ctx, remotecommand.StreamOptions{Stdin: stdin, Stdout: stdout, Stderr: &stderr})
	var exit utilexec.ExitError
	switch {
	case err == nil:
	case errors.As(err, &exit):
		err = Exit{exit.ExitStatus(), strings.TrimSpace(string(stderr.bytes()))}
	case strings.Contains(err.Error(), "is forbidden"): // of the API server's answer client-go keeps the text alone
		err = fmt.Errorf("%w: %w", ErrForbidden, err)
	case ctx.Err() != nil:
		err = fmt.Errorf("no answer in time: %w", context.Cause(ctx))
	}
	return err
}

// address is that of the pod's subresource exec.
func address(c *rest.Config, pod Pod, command []string) (*url.URL, error) {
	group := *c
	group.GroupVersion, group.APIPath = &schema.GroupVersion{Version: "v1"}, "/api"
	base, path, err := rest.DefaultServerUrlFor(&group)
	if err != nil {
		return nil, err
	}
	u := base.JoinPath(path, "namespaces", pod.Namespace, "pods", pod.Name, "exec")
	u.RawQuery = url.Values{"container": {pod.Container}, "stdout": {"true"}, "stderr": {"true"}, "command": command}.Encode()
	return u, nil
}

// limited keeps the first maxOutput bytes. client-go may still write when it has returned for want of time.
type limited struct {
	mu   sync.Mutex
	kept []byte
}

func (l *limited) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.kept = append(l.kept, p[:min(len(p), maxOutput-len(l.kept))]...)
	return len(p), nil
}

func (l *limited) bytes() []byte {
	l.mu.Lock()
	defer l.mu.Unlock()
	return bytes.Clone(l.kept)
}

// Log returns the end of a container's log.
func Log(ctx context.Context, c *rest.Config, pod Pod, lines int) ([]byte, error) {
	u, err := address(c, pod, nil)
	if err != nil {
		return nil, err
	}
	u.Path = strings.TrimSuffix(u.Path, "exec") + "log"
	u.RawQuery = url.Values{"container": {pod.Container}, "tailLines": {fmt.Sprint(lines)}}.Encode()
	client, err := rest.HTTPClientFor(c)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxOutput))
	if err == nil && resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %s", resp.Status, strings.TrimSpace(string(b[:min(len(b), 300)])))
	}
	return b, err
}
