package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/headcni/headcni/internal/cluster"
	"github.com/headcni/headcni/internal/labtest"
)

// servicesLabel is of Nodes that lead devices of the tailnet to services. A kubelet may not set it on its own Node.
const servicesLabel = "node-restriction.kubernetes.io/services"

// joinDevice has a user join the tailnet with a stock tailscaled that accepts routes.
func (w *world) joinDevice(t *testing.T) {
	t.Helper()
	out, err := w.Control.Run(within(t, time.Minute), "headscale", "preauthkeys", "create", "--expiration", "24h", "--user", "1")
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Device.StartTailscaled(); err != nil {
		t.Fatal(err)
	}
	if err := w.Device.WaitSocket(within(t, time.Minute)); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Device.Run(within(t, time.Minute), "tailscale", "up", "--login-server="+w.Control.URL, "--auth-key="+labtest.LastWord(t, out),
		"--accept-routes", "--hostname=device"); err != nil {
		t.Fatal(err)
	}
}

// split writes into the configuration of a Headscale that does not run what `headcnictl dns headscale` prints for it.
func (w *world) split(t *testing.T) {
	t.Helper()
	path := w.Control.Path("/etc/headscale/config.yaml")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var config map[string]any
	if err := json.Unmarshal(b, &config); err != nil {
		t.Fatal(err)
	}
	labtest.Section(labtest.Section(config, "dns"), "nameservers")["split"] = map[string]any{"cluster.local": []string{cluster.DNSAddress}}
	if b, err = json.Marshal(config); err == nil {
		err = os.WriteFile(path, b, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// fromDevice: the device is told the addresses of a Service and of each pod behind one without an address, and reaches them all.
func (a *askers) fromDevice(t *testing.T) {
	t.Helper()
	pods, err := a.Client.CoreV1().Pods(echoes).List(t.Context(), metav1.ListOptions{LabelSelector: "app=echo"})
	if err != nil {
		t.Fatal(err)
	}
	// query asks as the device's resolver would, where tailscaled is that.
	query := func(ctx context.Context, name string) (string, error) {
		return a.Device.Run(ctx, "tailscale", "dns", "query", name, "A")
	}
	reach := func(ctx context.Context, addr string, port uint16) error {
		to := netip.AddrPortFrom(netip.MustParseAddr(addr), port)
		_, err := a.Device.Run(ctx, "curl", "-sSf", "--max-time", "5", fmt.Sprintf("http://%s/hostname", to))
		return err
	}
	eventually(t, "a Service, by name, from a device of the tailnet", 2*time.Minute, func(ctx context.Context) error {
		out, err := query(ctx, "echo.e2e.svc.cluster.local.")
		if err == nil && !strings.Contains(out, a.service) {
			err = fmt.Errorf("no %s in\n%s", a.service, out)
		}
		if err != nil {
			return err
		}
		return reach(ctx, a.service, 80)
	})
	for _, p := range pods.Items {
		eventually(t, "a pod without a Service's address, by name, from a device of the tailnet", time.Minute, func(ctx context.Context) error {
			out, err := query(ctx, "headless.e2e.svc.cluster.local.")
			if err == nil && !strings.Contains(out, p.Status.PodIP) {
				err = fmt.Errorf("no %s in\n%s", p.Status.PodIP, out)
			}
			if err != nil {
				return err
			}
			return reach(ctx, p.Status.PodIP, 8080)
		})
	}
}
