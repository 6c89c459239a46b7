package connectivity

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/netset"
)

// Kind is a way to ask.
type Kind string

const (
	// KindHTTP asks a test pod for its Answer.
	KindHTTP Kind = "http"
	// KindUDP wants a datagram back, which no router may cut.
	KindUDP Kind = "udp"
	// KindTCP wants an answer of the machine, also that nobody listens there.
	KindTCP Kind = "tcp"
	// KindTLS wants a server that speaks TLS.
	KindTLS Kind = "tls"
	// KindName wants a name's addresses.
	KindName Kind = "name"
)

// APIServer stands for where Kubernetes tells every pod that the API server is: its Service, without a name.
const APIServer = "API server"

// FullSize stands for the MTU of the asker's own link, or what its node says that the path carries, which is no less than the tunnel's.
const FullSize = -1

// leastMTU is the tunnel's in bytes, and the least of IPv6 (RFC 8200, section 5).
const leastMTU = 1280

// Ask is one question of a test pod.
type Ask struct {
	Kind Kind `json:"kind"`
	// To is HOST:PORT, or a name.
	To string `json:"to"`
	// Node is who must answer, "" = anybody.
	Node string `json:"node,omitempty"`
	// Seen are the addresses by which the other side must see the asker, nil = any.
	Seen []netip.Addr `json:"seen,omitempty"`
	// Want is an address that the name must have.
	Want netip.Addr `json:"want,omitzero"`
	// Size of the packet with its headers, in bytes.
	Size int `json:"size,omitempty"`
	// Denied: there must be no answer.
	Denied bool `json:"denied,omitempty"`
	// Within is how long to try, Try how long each try may take, 0 = as long as a lost packet needs to be sent again.
	Within time.Duration `json:"within"`
	Try    time.Duration `json:"try,omitempty"`
}

// Result is what came of an Ask.
type Result struct {
	// Error is "" where it was as it should be.
	Error string `json:"error,omitempty"`
	// Skipped: it was not asked.
	Skipped bool `json:"skipped,omitempty"`
	// For is how long it had been so when the asker was done: for refusals, which are tried more than once.
	For time.Duration `json:"for"`
}

const (
	// tryFor bounds one try: TCP sends its first packet again after a second.
	tryFor = 2500 * time.Millisecond
	// shortTry is for what policies change at any moment; a refusal is believed when it was met twice.
	shortTry, deniedTimes = 500 * time.Millisecond, 2
	// between tries.
	pause = 50 * time.Millisecond
	// atOnce is how many questions a pod asks at the same time.
	atOnce = 32
)

// AskAll reads Asks as JSON and writes their Results in the same order.
func AskAll(ctx context.Context, in io.Reader, out io.Writer) error {
	var asks []Ask
	if err := json.NewDecoder(in).Decode(&asks); err != nil {
		return fmt.Errorf("read the questions: %w", err)
	}
	return json.NewEncoder(out).Encode(askAll(ctx, asks))
}

func askAll(ctx context.Context, asks []Ask) []Result {
	results := make([]Result, len(asks))
	free := make(chan struct{}, atOnce)
	var wg sync.WaitGroup
	for i, a := range asks {
		wg.Go(func() {
			free <- struct{}{}
			defer func() { <-free }()
			results[i] = a.settle(ctx)
		})
	}
	wg.Wait()
	return results
}

// settle tries until it is as it should be, or the time is over: pods have just been made, and policies take a moment.
func (a Ask) settle(ctx context.Context) Result {
	ctx, cancel := context.WithTimeout(ctx, a.Within)
	defer cancel()
	end, _ := ctx.Deadline() // there is one
	var since time.Time
	var last error
	for times := 0; ; {
		began := time.Now()
		err := a.try(ctx, cmp.Or(a.Try, tryFor))
		switch {
		case !a.Denied && err == nil:
			return Result{}
		case a.Denied && err != nil && ctx.Err() == nil:
			if times++; times == 1 {
				since = began
			}
			if times == deniedTimes {
				return Result{For: time.Since(since)}
			}
		case a.Denied && err == nil:
			times, err = 0, errors.New("it answers, and a policy denies that")
		}
		if last == nil || ctx.Err() == nil && time.Now().Before(end) { // else the time was too short to tell; ctx may learn of it later than a dial
			last = err
		}
		select {
		case <-ctx.Done():
			return Result{Error: last.Error()}
		case <-time.After(pause):
		}
	}
}

func (a Ask) try(ctx context.Context, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	switch a.Kind {
	case KindHTTP:
		return a.http(ctx)
	case KindUDP:
		return a.udp(ctx)
	case KindTCP:
		c, err := (&net.Dialer{}).DialContext(ctx, "tcp", a.To)
		if errors.Is(err, syscall.ECONNREFUSED) {
			return nil
		}
		if err == nil {
			c.Close()
		}
		return plain(err)
	case KindTLS:
		to := a.To
		if to == APIServer {
			to = net.JoinHostPort(os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT"))
		}
		// Who it is does not matter here: nothing is said to it.
		c, err := (&tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true}}).DialContext(ctx, "tcp", to)
		if err == nil {
			c.Close()
		}
		return plain(err)
	case KindName:
		addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", a.To)
		if err != nil {
			return err
		}
		for i := range addrs {
			addrs[i] = addrs[i].Unmap()
		}
		if !slices.Contains(addrs, a.Want) {
			return fmt.Errorf("it has %v, and not %s", addrs, a.Want)
		}
		return nil
	}
	return fmt.Errorf("question of a kind %q that this version does not know: is the image older than headcnictl?", a.Kind)
}

func (a Ask) http(ctx context.Context) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+a.To+"/", nil)
	if err != nil {
		return err
	}
	resp, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(req)
	if err != nil {
		return plain(err)
	}
	defer resp.Body.Close()
	var got Answer
	if err := json.NewDecoder(resp.Body).Decode(&got); err != nil {
		return fmt.Errorf("what answers is no test pod: %s", resp.Status)
	}
	if a.Node != "" && got.Node != a.Node {
		return fmt.Errorf("the pod of %q answers", got.Node)
	}
	if len(a.Seen) > 0 && !slices.Contains(a.Seen, got.You) {
		return fmt.Errorf("it sees us as %s and not as %v: something masquerades pods' traffic", got.You, a.Seen)
	}
	return nil
}

// udp sends a packet of the size with don't-fragment, again and again, until it comes back.
func (a Ask) udp(ctx context.Context) error {
	size := a.Size
	to, err := netip.ParseAddrPort(a.To)
	if err != nil {
		return err
	}
	if size == FullSize {
		if size, err = ownMTU(to.Addr()); err != nil {
			return err
		}
	}
	headers, level, option, whole := 28, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO
	if to.Addr().Is6() {
		headers, level, option, whole = 48, unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_DO
	}
	dialer := net.Dialer{Control: func(_, _ string, c syscall.RawConn) (err error) {
		if bad := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), level, option, whole) }); bad != nil {
			return bad
		}
		return err
	}}
	c, err := dialer.DialContext(ctx, "udp", a.To)
	if err != nil {
		return plain(err)
	}
	defer c.Close()
	question := bytes.Repeat([]byte{'?'}, max(size-headers, 1))
	buf := make([]byte, maxDatagram)
	deadline, _ := ctx.Deadline() // there is one
	for {
		_, err := c.Write(question)
		if told := pathMTU(c, to.Addr().Is6()); a.Size == FullSize && errors.Is(err, syscall.EMSGSIZE) && told < size && told >= leastMTU {
			size = told
			question = question[:size-headers]
			continue
		}
		if err != nil && !errors.Is(err, syscall.ECONNREFUSED) {
			return fmt.Errorf("a packet of %d bytes: %w", size, plain(err))
		}
		// A datagram may be lost.
		_ = c.SetReadDeadline(earlier(time.Now().Add(shortTry/2), deadline)) // an open socket
		n, err := c.Read(buf)
		switch {
		case err == nil && n == len(question):
			return nil
		case ctx.Err() != nil || !time.Now().Before(deadline):
			return fmt.Errorf("no answer to a packet of %d bytes", size)
		}
	}
}

// pathMTU is what a connected socket knows of its path, 0 for nothing.
func pathMTU(c net.Conn, ipv6 bool) (mtu int) {
	level, option := unix.IPPROTO_IP, unix.IP_MTU
	if ipv6 {
		level, option = unix.IPPROTO_IPV6, unix.IPV6_MTU
	}
	if raw, err := c.(syscall.Conn).SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { mtu, _ = unix.GetsockoptInt(int(fd), level, option) })
	}
	return mtu
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// ownMTU is that of the link by which the asker reaches an address.
func ownMTU(to netip.Addr) (int, error) {
	c, err := net.Dial("udp", netip.AddrPortFrom(to, Port).String()) // sends nothing
	if err != nil {
		return 0, plain(err)
	}
	defer c.Close()
	own, err := netip.ParseAddrPort(c.LocalAddr().String())
	if err != nil {
		return 0, err
	}
	links, err := net.Interfaces()
	if err != nil {
		return 0, err
	}
	for _, l := range links {
		addrs, err := l.Addrs()
		if err != nil {
			continue // it has gone
		}
		for _, a := range addrs {
			if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().Unmap() == own.Addr().Unmap().WithZone("") {
				return l.MTU, nil
			}
		}
	}
	return 0, fmt.Errorf("no link has the address %s", own.Addr())
}

// plain is an error of package net in fewer words: the address is said elsewhere.
func plain(err error) error {
	var timeout net.Error
	var op *net.OpError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &timeout) && timeout.Timeout(), errors.Is(err, context.DeadlineExceeded):
		return errors.New("no answer")
	case errors.As(err, &op):
		var number syscall.Errno
		if errors.As(op.Err, &number) {
			return fmt.Errorf("%s: %w", op.Op, number)
		}
		return fmt.Errorf("%s: %w", op.Op, op.Err)
	}
	return err
}

// at is HOST:PORT.
func at(a netip.Addr, port int) string {
	return net.JoinHostPort(strings.TrimSpace(a.String()), strconv.Itoa(port))
}

// Here asks from this machine what its kernel sends into a tailnet, and skips the rest.
func Here(ctx context.Context, asks []Ask) []Result {
	results := make([]Result, len(asks))
	var by []int
	var list []Ask
	for i, a := range asks {
		if results[i].Skipped = !byTailnet(a.To); !results[i].Skipped {
			by, list = append(by, i), append(list, a)
		}
	}
	for k, r := range askAll(ctx, list) {
		results[by[k]] = r
	}
	return results
}

func byTailnet(to string) bool {
	c, err := net.Dial("udp", to) // sends nothing
	if err != nil {
		return false // no way there
	}
	defer c.Close()
	own, err := netip.ParseAddrPort(c.LocalAddr().String())
	return err == nil && (netset.TailnetIPv4.Contains(own.Addr().Unmap()) || netset.TailnetIPv6.Contains(own.Addr()))
}
