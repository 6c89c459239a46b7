// Package daemontest answers on a socket as the daemon does.
package daemontest

import (
	"context"
	"path/filepath"
	"testing"

	"github.com/headcni/headcni/pkg/nodestatus"
)

// Serve answers until the test ends, and returns the socket.
func Serve(t testing.TB, answers nodestatus.Answers) (socket string) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "api.sock")
	ctx, stop := context.WithCancel(t.Context())
	up, down := make(chan struct{}), make(chan error)
	go func() {
		down <- nodestatus.Serve(ctx, socket, answers, func() { close(up) }, func(err error) { t.Error(err) })
	}()
	t.Cleanup(func() {
		stop()
		if err := <-down; err != nil {
			t.Error(err)
		}
	})
	<-up
	return socket
}
