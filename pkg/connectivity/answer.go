// Package connectivity tries what a pod network is for, with pods of its own on a real cluster: who reaches whom, seen as whom, with packets of
// which size, by which way; and do policies hold?
package connectivity

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"time"
)

// Port is where test pods answer, by HTTP and UDP: beyond 1024, so they need no rights.
const Port = 8080

// maxDatagram is the largest payload of UDP.
const maxDatagram = 65507

// Answer is a pod's answer to another.
type Answer struct {
	Node string     `json:"node"`
	You  netip.Addr `json:"you"`
}

// Serve answers on Port until ctx ends: by HTTP with an Answer, by UDP with a datagram of the question's size.
func Serve(ctx context.Context, node string) error {
	udp, err := net.ListenPacket("udp", fmt.Sprintf(":%d", Port))
	if err != nil {
		return err
	}
	srv := &http.Server{Addr: fmt.Sprintf(":%d", Port), Handler: Handler(node), ReadHeaderTimeout: 5 * time.Second}
	stop := context.AfterFunc(ctx, func() { srv.Close(); udp.Close() })
	defer stop()
	echoed := make(chan error, 1)
	go func() { echoed <- echo(udp) }()
	err = srv.ListenAndServe()
	udp.Close()
	if bad := <-echoed; !errors.Is(bad, net.ErrClosed) {
		err = errors.Join(err, bad)
	}
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// Handler says who asked, to whoever asks.
func Handler(node string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		from, _ := netip.ParseAddrPort(r.RemoteAddr)                                // net/http always gives a valid one
		_ = json.NewEncoder(w).Encode(Answer{Node: node, You: from.Addr().Unmap()}) // the asker has gone
	})
}

// echo sends back what comes.
func echo(c net.PacketConn) error {
	buf := make([]byte, maxDatagram)
	for {
		n, from, err := c.ReadFrom(buf)
		if err != nil {
			return err
		}
		_, _ = c.WriteTo(buf[:n], from) // an answer that cannot be sent is a lost datagram to whoever waits for it
	}
}
