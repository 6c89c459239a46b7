package monitoring

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/headcni/headcni/pkg/cmdlog"
	"github.com/headcni/headcni/pkg/reconcile"
)

type fakeNode struct{ ok bool }

func (f fakeNode) Ready() (bool, []reconcile.Status) {
	return f.ok, []reconcile.Status{{Name: "rules", OK: f.ok}}
}

func get(t *testing.T, url string) (int, string) {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

// freeAddr is free a moment before it is used; only this test listens here.
func freeAddr(t *testing.T) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func TestServe(t *testing.T) {
	m := NewMetrics("v1")
	v4, v6 := netip.MustParseAddr("10.244.1.2"), netip.MustParseAddr("fd00::2")
	socket := filepath.Join(t.TempDir(), "daemon.sock")
	if err := m.OpenSpool(filepath.Join(t.TempDir(), "metrics.json"), cmdlog.Spool(socket), func(cmdlog.Record) {}, func(err error) { t.Error(err) }); err != nil {
		t.Fatal(err)
	}
	for _, h := range []cmdlog.Record{
		{Command: "ADD", Addrs: []netip.Addr{v4, v6}, Duration: 5 * time.Millisecond},
		{Command: "ADD", ErrorCode: 11, Stage: "gate"},
		{Command: "DEL", Addrs: []netip.Addr{v4}},
	} {
		if err := cmdlog.Send(socket, h); !errors.Is(err, os.ErrNotExist) { // nobody listens: spooled all the same
			t.Fatal(err)
		}
	}
	m.Part("rules", true, 3)
	m.Tailnet(Tailnet{Peers: map[string]int{"direct": 4, "offline": 1}, PodPeers: map[string]int{"direct": 3}, KeyExpiry: time.Unix(1800000000, 0), SmallestPath: 1230})
	m.Pools(func() []Pool { return []Pool{{"headcni", "ipv4", 3, 253}, {"other", "ipv6", 1, 0}} })
	m.Conntrack(func() (entries, most, full uint64, err error) { return 900, 1000, 7, nil })

	ctx, cancel := context.WithCancel(t.Context())
	addr := freeAddr(t)
	wait, err := Serve(ctx, addr, m, fakeNode{ok: false})
	if err != nil {
		t.Fatal(err)
	}
	if code, _ := get(t, "http://"+addr+"/healthz"); code != 200 {
		t.Errorf("healthz: %d", code)
	}
	if code, body := get(t, "http://"+addr+"/readyz"); code != 503 || !strings.Contains(body, `"rules"`) {
		t.Errorf("readyz: %d %s", code, body)
	}
	_, body := get(t, "http://"+addr+"/metrics")
	for _, want := range []string{
		"headcni_ip_allocations_total 2\n", "headcni_ip_releases_total 1\n", `headcni_network_errors_total{stage="gate"} 1`,
		`headcni_network_errors_total{stage="ipam"} 0`, "headcni_pod_network_setup_duration_seconds_count 1\n",
		`headcni_part_ok{part="rules"} 1`, `headcni_corrections_total{part="rules"} 3`, `headcni_build_info{version="v1"} 1`,
		`headcni_ip_pool_addresses_in_use{family="ipv4",network="headcni"} 3`, `headcni_ip_pool_addresses{family="ipv4",network="headcni"} 253`,
		`headcni_ip_pool_addresses_in_use{family="ipv6",network="other"} 1`,
		`headcni_tailnet_peers{path="offline"} 1`, `headcni_pod_peers{path="direct"} 3`, `headcni_pod_peers{path="offline"} 0`,
		"headcni_node_key_expiry_timestamp_seconds 1.8e+09", "headcni_smallest_path_bytes 1230",
		"headcni_conntrack_entries 900\n", "headcni_conntrack_max_entries 1000\n", "headcni_conntrack_full_total 7\n",
	} {
		if !strings.Contains(body, want) {
			t.Errorf("metrics lack %q", want)
		}
	}
	if _, err := Serve(ctx, addr, m, fakeNode{}); err == nil || !strings.Contains(err.Error(), "monitoring.listen") {
		t.Errorf("address in use: %v", err)
	}
	cancel()
	if err := wait(); err != nil {
		t.Error(err)
	}
}
