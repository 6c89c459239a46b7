package monitoring

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// Whoever opens connections as fast as they can, and says nothing, little or far too much, or comes back by none of them, holds few of the
// server's at a time and keeps no probe out.
func TestPortIsNotWornOut(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	addr := freeAddr(t)
	wait, err := Serve(ctx, addr, NewMetrics("v1"), fakeNode{ok: true})
	if err != nil {
		t.Fatal(err)
	}
	const each = 2 * maxConns
	kinds := map[string]string{
		"silent": "", "half a request": "GET /heal", "kept": "GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n",
		"a long header": "GET /healthz HTTP/1.1\r\nHost: a\r\nX: " + strings.Repeat("x", 4*maxHeader),
	}
	for what, says := range kinds {
		var closed atomic.Int64
		for range each {
			c, err := net.Dial("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			go func() {
				_, _ = io.WriteString(c, says) // it may be closed already
				_, err := io.Copy(io.Discard, c)
				if !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, net.ErrClosed) {
					closed.Add(1)
				}
			}()
		}
		for range 10 {
			if code, _ := get(t, "http://"+addr+"/healthz"); code != 200 {
				t.Errorf("%s: a probe beside them: %d", what, code)
			}
		}
		for end := time.Now().Add(time.Minute); closed.Load() < each-maxConns && time.Now().Before(end); {
			time.Sleep(5 * time.Millisecond)
		}
		if n := closed.Load(); n < each-maxConns {
			t.Errorf("%s: %d of %d connections were closed, want %d at least", what, n, each, each-maxConns)
		}
	}
	cancel()
	if err := wait(); err != nil {
		t.Error(err)
	}
}
