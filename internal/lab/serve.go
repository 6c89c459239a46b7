package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// EchoPort answers over UDP and TCP with the address that the question came from (the number is RFC 862's).
	EchoPort = 7
	// HTTPPort answers with a sentence.
	HTTPPort = 80

	maxDatagram = 65507
)

// Serve is the process in a pod: servers for EchoPort and HTTPPort, until ctx ends. It expects mount and UTS namespaces
// of its own, in which it sets the host name and has names looked up at MagicDNS's address.
func Serve(ctx context.Context, pod, node string) error {
	if err := unix.Sethostname([]byte(pod)); err != nil {
		return fmt.Errorf("set the host name: %w", err)
	}
	if err := coverEtc(pod); err != nil {
		return err
	}
	fatal := make(chan error, 3)
	udp, err := net.ListenPacket("udp", fmt.Sprintf(":%d", EchoPort))
	if err != nil {
		return err
	}
	defer udp.Close()
	tcp, err := net.Listen("tcp", fmt.Sprintf(":%d", EchoPort))
	if err != nil {
		return err
	}
	defer tcp.Close()
	hello := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		from, _ := netip.ParseAddrPort(r.RemoteAddr) // net/http always gives a valid one
		fmt.Fprintf(w, "Hello from pod %s on %s. You are %s.\n", pod, node, from.Addr().Unmap())
	})
	web := &http.Server{Addr: fmt.Sprintf(":%d", HTTPPort), Handler: hello, ReadHeaderTimeout: 10 * time.Second}
	defer web.Close()
	go func() { fatal <- echoDatagrams(udp) }()
	go func() { fatal <- answerStreams(tcp) }()
	go func() { fatal <- web.ListenAndServe() }()
	select {
	case err := <-fatal:
		return err
	case <-ctx.Done():
		return nil
	}
}

// coverEtc gives the pod an /etc of its own, as an image would. A bind mount over the node's resolv.conf would not do: it
// goes when tailscaled on the node replaces that file (rename(2) detaches mounts of other namespaces).
func coverEtc(pod string) error {
	entries, err := os.ReadDir("/etc")
	if err != nil {
		return err
	}
	links := map[string]string{} // the node's own files are none of the pod's business; the rest are links on it
	for _, e := range entries {
		if target, err := os.Readlink("/etc/" + e.Name()); err == nil && e.Name() != "resolv.conf" {
			links["/etc/"+e.Name()] = target
		}
	}
	if err := unix.Mount("tmpfs", "/etc", "tmpfs", 0, "mode=0755"); err != nil {
		return fmt.Errorf("cover /etc: %w", err)
	}
	for name, target := range links {
		if err := os.Symlink(target, name); err != nil {
			return err
		}
	}
	for name, text := range map[string]string{
		"resolv.conf": "nameserver 100.100.100.100\nsearch " + BaseDomain + "\n",
		"hosts":       "127.0.0.1 localhost\n::1 localhost\n127.0.0.1 " + pod + "\n",
		"hostname":    pod + "\n",
	} {
		if err := os.WriteFile("/etc/"+name, []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// echoDatagrams answers each datagram by one of the same size that begins with the sender's address and a line feed.
func echoDatagrams(c net.PacketConn) error {
	buf := make([]byte, maxDatagram)
	for {
		n, from, err := c.ReadFrom(buf)
		if err != nil {
			return err
		}
		if ap, err := netip.ParseAddrPort(from.String()); err == nil {
			copy(buf[:n], ap.Addr().Unmap().String()+"\n")
		}
		// An answer that cannot be sent is a lost datagram to whoever waits for it.
		_, _ = c.WriteTo(buf[:n], from)
	}
}

// answerStreams tells each connection where it comes from.
func answerStreams(l net.Listener) error {
	for {
		c, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return err
		}
		if ap, err := netip.ParseAddrPort(c.RemoteAddr().String()); err == nil {
			fmt.Fprintln(c, ap.Addr().Unmap())
		}
		c.Close()
	}
}
