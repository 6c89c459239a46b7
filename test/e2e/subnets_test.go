package e2e

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
	"github.com/headcni/headcni/pkg/kube"
)

// behindDevice are the networks that the device leads to.
const behindDevice = "192.168.50.0/24,fd00:50::/64"

// behindDevice: of the pods those reach what the device leads to whose Namespace names it, as their node, and what goes on ends with the
// consent.
func (a *askers) behindDevice(t *testing.T) {
	t.Helper()
	const with, without = "consent", echoes
	from := map[string]string{with: "asker", without: a.echo[a.Workers()[0].Name].Name}
	node := a.kubectl(t, "get", "pod", "-n", with, from[with], "-o", "jsonpath={.spec.nodeName}")
	var servers []netip.AddrPort
	for _, addr := range []string{"192.168.50.7", "fd00:50::7"} {
		labtest.Sh(t, a.Device.Machine, "ip addr add %s dev lo nodad", addr) // or it is tentative for a moment, and nobody may listen there
		servers = append(servers, labtest.Service(t, a.Device, netip.AddrPortFrom(netip.MustParseAddr(addr), 0)))
	}
	ask := func(ctx context.Context, namespace string, to netip.AddrPort) (string, error) {
		out, err := a.Kubectl(ctx, "exec", "-n", namespace, from[namespace], "--", "nc", "-v", "-N", "-w", "5", to.Addr().String(), fmt.Sprint(to.Port()))
		return strings.TrimSpace(out), err
	}
	refused := func(what, namespace string) {
		t.Helper()
		for _, to := range servers {
			eventually(t, what, time.Minute, func(ctx context.Context) error {
				out, err := ask(ctx, namespace, to)
				if err == nil {
					return fmt.Errorf("%s answers %q", to, out)
				}
				if !strings.Contains(err.Error(), "refused") {
					return err
				}
				return nil
			})
		}
	}
	reached := func(what string) {
		t.Helper()
		for i, to := range servers {
			eventually(t, what, time.Minute, func(ctx context.Context) error {
				out, err := ask(ctx, with, to)
				if want := a.addresses[node+"."+lab.BaseDomain][i]; err == nil && out != want {
					err = fmt.Errorf("%s sees %q, want %s", to, out, want)
				}
				return err
			})
		}
	}
	consent := func(value string) { a.kubectl(t, "annotate", "namespace", with, kube.TailnetSubnets+value) }

	consent("=" + behindDevice)
	reached("with consent")
	refused("without consent", without)
	var flows []*flow
	for _, to := range servers {
		flows = append(flows, a.hold(t, with, from[with], to.Addr()))
	}
	consent("-")
	for _, f := range flows {
		f.end(t)
	}
	refused("the consent is gone", with)
	consent("=" + behindDevice)
	reached("with consent again")
}

// flow is a connection from a pod to the device, in which both send.
type flow struct {
	far  net.Conn
	ends chan error
}

func (a *askers) hold(t *testing.T, namespace, pod string, to netip.Addr) *flow {
	t.Helper()
	l := labtest.Listen(t, a.Device, netip.AddrPortFrom(to, 0))
	at := netip.MustParseAddrPort(l.Addr().String())
	f := &flow{ends: make(chan error, 1)}
	go func() {
		_, err := a.Kubectl(within(t, 3*time.Minute), "exec", "-n", namespace, pod, "--", "sh", "-c", fmt.Sprintf("while echo x; do sleep 0.1; done | nc %s %d", at.Addr(), at.Port()))
		f.ends <- err
	}()
	came := make(chan net.Conn, 1)
	go func() {
		if c, err := l.Accept(); err == nil {
			came <- c
		}
	}()
	select {
	case f.far = <-came:
		t.Cleanup(func() { f.far.Close() })
	case err := <-f.ends:
		t.Fatalf("the pod ends with %v", err)
	}
	for range 3 {
		if err := f.far.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if _, err := f.far.Read(make([]byte, 1)); err != nil {
			t.Fatalf("what the pod sends does not come: %v", err)
		}
	}
	return f
}

// end waits until both ends know that it is over, each by what it sends.
func (f *flow) end(t *testing.T) {
	t.Helper()
	eventually(t, "the connection ends at the device", time.Minute, func(context.Context) error {
		if _, err := f.far.Write([]byte("x")); err == nil {
			return errors.New("it can send")
		}
		return nil
	})
	select {
	case <-f.ends:
	case <-within(t, time.Minute).Done():
		t.Error("the pod's end goes on")
	}
}
