package e2e

import (
	"context"
	_ "embed" // testdata
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/cluster"
	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
	"github.com/headcni/headcni/pkg/kube"
)

//go:embed testdata/device.yaml
var deviceManifest string

// servicesLabel is of Nodes that lead devices of the tailnet to services. A kubelet may not set it on its own Node.
const servicesLabel = "node-restriction.kubernetes.io/services"

// tailnetName is the name in the tailnet that the Service echo wants.
const tailnetName = "shop-window"

// joinDevice has a user join the tailnet with a stock tailscaled that accepts routes, and leads to networks of its own.
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
		"--accept-routes", "--hostname=device", "--advertise-routes="+behindDevice); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Control.Run(within(t, time.Minute), "headscale", "nodes", "approve-routes", "--identifier", fmt.Sprint(w.tailnet(t)["device"]), "--routes", behindDevice); err != nil {
		t.Fatal(err)
	}
}

// split writes into the configuration of a Headscale that does not run what `headcnictl dns headscale` prints for it, and beside it the
// names of Services.
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
	dns := labtest.Section(config, "dns")
	labtest.Section(dns, "nameservers")["split"] = map[string]any{"cluster.local": []string{cluster.DNSAddress}}
	const records = "/etc/headscale/extra-records.json"
	dns["extra_records_path"] = records
	names := w.kubectl(t, "get", "configmap", "-n", namespace, kube.Records, "-o", `jsonpath={.data.extra-records\.json}`)
	if b, err = json.Marshal(config); err == nil {
		err = errors.Join(os.WriteFile(path, b, 0o600), os.WriteFile(w.Control.Path(records), []byte(names), 0o600))
	}
	if err != nil {
		t.Fatal(err)
	}
}

// fromDevice: the device is told the addresses of Services and of each pod behind one without an address, and reaches them all. Whom
// the pods see, and what a policy makes of it, is as docs/names.md says.
func (a *askers) fromDevice(t *testing.T) {
	t.Helper()
	// told asks as the device's resolver would, where tailscaled is that.
	told := func(name string, want []netip.Addr) {
		t.Helper()
		eventually(t, name+", from a device of the tailnet", 2*time.Minute, func(ctx context.Context) error {
			for i, kind := range []string{"A", "AAAA"} {
				out, err := a.Device.Run(ctx, "tailscale", "dns", "query", name, kind)
				if err == nil && !strings.Contains(out, want[i].String()) {
					err = fmt.Errorf("no %s in\n%s", want[i], out)
				}
				if err != nil {
					return err
				}
			}
			return nil
		})
	}
	told("echo.e2e.svc.cluster.local.", a.service)
	told(tailnetName+"."+lab.BaseDomain+".", a.service)
	device, err := a.Device.TailnetAddrs()
	if err != nil {
		t.Fatal(err)
	}
	leader := a.Workers()[0].Name
	for i, service := range a.service {
		for _, network := range []string{"tcp", "udp"} {
			a.sources(t, network, service, func(on string, seen netip.Addr) bool {
				switch {
				case on != leader:
					return seen.String() == a.addresses[leader+"."+lab.BaseDomain][i]
				case *noClusterCIDR:
					return seen == device[i]
				}
				// kube-proxy masquerades it, by whichever of the node's addresses the kernel picks.
				return labtest.Sh(t, a.Workers()[0].Machine, "ip -o addr show to %s", seen) != ""
			})
		}
	}
	all := slices.Sorted(maps.Keys(a.echo))
	a.answers(t, "a pod without a Service's address", all)
	a.apply(t, "device.yaml", deviceManifest)
	a.answers(t, "where a policy lets pods in only", nil)
	a.kubectl(t, "patch", "networkpolicy", "-n", echoes, "pods-only", "--type=json", fmt.Sprintf(
		`--patch=[{"op":"add","path":"/spec/ingress/0/from/-","value":{"ipBlock":{"cidr":"%s/32"}}},{"op":"add","path":"/spec/ingress/0/from/-","value":{"ipBlock":{"cidr":"%s/128"}}}]`, device[0], device[1]))
	a.answers(t, "where a policy lets the device in", all)
	a.kubectl(t, "delete", "networkpolicy", "-n", echoes, "pods-only")
}

// sources asks a Service until pods of all nodes have answered, by conntrack's one connection each, and looks at whom they see.
func (a *askers) sources(t *testing.T, network string, service netip.Addr, right func(node string, seen netip.Addr) bool) {
	t.Helper()
	nodes := map[string]string{}
	for node, p := range a.echo {
		nodes[p.Name] = node
	}
	missing := maps.Clone(nodes)
	ask := func(ctx context.Context) (pod, client string, err error) {
		if network == "udp" {
			return a.askUDP(ctx, netip.AddrPortFrom(service, 81))
		}
		at := "http://" + netip.AddrPortFrom(service, 80).String()
		out, err := a.Device.Run(ctx, "curl", "-sSfg", "--max-time", "5", "--write-out", "\n", at+"/hostname", at+"/clientip")
		pod, client, _ = strings.Cut(strings.TrimSpace(out), "\n")
		return pod, client, err
	}
	eventually(t, fmt.Sprintf("all pods of %s answer a device by %s", service, network), time.Minute, func(ctx context.Context) error {
		for len(missing) > 0 {
			pod, client, err := ask(ctx)
			if err != nil {
				return fmt.Errorf("no answer yet from %v: %w", missing, err)
			}
			seen, err := netip.ParseAddrPort(client)
			if _, ok := nodes[pod]; err != nil || !ok {
				return fmt.Errorf("%q says that it sees %q", pod, client)
			}
			if addr := seen.Addr().Unmap(); missing[pod] != "" && !right(nodes[pod], addr) {
				t.Errorf("%s by %s: a pod on %s sees %s", service, network, nodes[pod], addr)
			}
			delete(missing, pod)
		}
		return nil
	})
}

// askUDP asks one pod behind a Service for its name and whom it sees: two datagrams of one connection.
func (a *askers) askUDP(ctx context.Context, to netip.AddrPort) (pod, client string, err error) {
	c, err := a.Device.Dial(ctx, "udp", to.String())
	if err != nil {
		return "", "", err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return "", "", err
	}
	answer := func(question string) string {
		buf := make([]byte, 512)
		n := 0
		if err == nil {
			_, err = c.Write([]byte(question))
		}
		if err == nil {
			n, err = c.Read(buf)
		}
		return strings.TrimSpace(string(buf[:n]))
	}
	pod, client = answer("hostname"), answer("clientip")
	return pod, client, err
}

// answers waits until the device is told all pods' addresses by the headless Service, and exactly the pods of these nodes answer there.
// Where none does, the Service with an address does not either.
func (a *askers) answers(t *testing.T, what string, want []string) {
	t.Helper()
	eventually(t, what, 2*time.Minute, func(ctx context.Context) error {
		get := func(addr netip.Addr, port uint16) error {
			_, err := a.Device.Run(ctx, "curl", "-sSfg", "--max-time", "1", url(addr, port, "/hostname"))
			return err
		}
		for i, kind := range []string{"A", "AAAA"} {
			out, err := a.Device.Run(ctx, "tailscale", "dns", "query", "headless.e2e.svc.cluster.local.", kind)
			if err != nil {
				return err
			}
			for node, p := range a.echo {
				addr := addrs(t, p)[i]
				if !strings.Contains(out, addr.String()) {
					return fmt.Errorf("no %s in\n%s", addr, out)
				}
				if err := get(addr, 8080); (err == nil) != slices.Contains(want, node) {
					return fmt.Errorf("the pod on %s, at %s: %v", node, addr, err)
				}
			}
			if len(want) == 0 && get(a.service[i], 80) == nil {
				return fmt.Errorf("%s answers", a.service[i])
			}
		}
		return nil
	})
}
