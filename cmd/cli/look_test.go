package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strings"
	"syscall"
	"testing"

	"github.com/spf13/cobra"
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
