package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spf13/cobra"

	"github.com/headcni/headcni/pkg/kube/podexec"
)

// Why there is no answer: an API server that is not there, and Ctrl-C.
func TestFail(t *testing.T) {
	refused := fmt.Errorf("list the Nodes: %w", &url.Error{Op: "Get", URL: "https://192.0.2.1:6443", Err: &net.OpError{Op: "dial", Net: "tcp", Err: syscall.ECONNREFUSED}})
	ended, end := context.WithCancel(t.Context())
	end()
	for _, c := range []struct {
		cmd  *cobra.Command
		ctx  context.Context
		err  error
		want string
	}{
		{statusCmd(), t.Context(), refused, "connection refused; is the cluster up, and is it that which --kubeconfig,"},
		{versionCmd(), t.Context(), refused, "connection refused\n"},
		{statusCmd(), ended, context.Canceled, "headcnictl: interrupted\n"},
		{statusCmd(), t.Context(), context.Canceled, "context canceled\n"},
	} {
		var out strings.Builder
		c.cmd.SetErr(&out)
		c.cmd.SetContext(c.ctx)
		if err := fail(c.cmd, c.err); !errors.Is(err, couldNotLook) || !strings.Contains(out.String(), c.want) {
			t.Errorf("%v: %q, want %q", err, out.String(), c.want)
		}
	}
}

// Nobody waits in silence for nodes that do not answer, nor hears of each of many.
func TestLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out strings.Builder
		f, once := &lookFlags{timeout: 30 * time.Second, stderr: func() io.Writer { return &out }}, sync.Once{}
		f.late(&once, podexec.Pod{Namespace: "headcni", Name: "quick"}).Stop()
		time.Sleep(patience)
		if out.Len() > 0 {
			t.Errorf("one has answered: %q", out.String())
		}
		for _, name := range []string{"slow", "slower"} {
			defer f.late(&once, podexec.Pod{Namespace: "headcni", Name: name}).Stop()
			time.Sleep(time.Second)
		}
		time.Sleep(patience)
		synctest.Wait()
		if want := "headcnictl: pod headcni/slow does not answer yet; a node may take 30s (--timeout)\n"; out.String() != want {
			t.Errorf("%q, want %q", out.String(), want)
		}
	})
}
