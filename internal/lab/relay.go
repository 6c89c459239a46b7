package lab

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"
)

// A relay (DERP server) of its own outlives Headscale. It is a second Headscale of which only the relay is used: the real
// server code, without one more program to pin.
const (
	relayPort    = 8081
	relayConfig  = "/etc/headscale/relay.yaml"
	relayMapFile = "/etc/headscale/derp.yaml"
)

// relayMap is what Headscale tells the nodes about the relay: its derp-example.yaml has the form. JSON would not do, as
// its keys are never numbers.
func relayMap() string { return "regions:\n" + relayRegion(900, "lab", underlayAddrs(1)) }

// relayRegion is one relay of such a map.
func relayRegion(id int, code string, addrs []netip.Prefix) string {
	return fmt.Sprintf(`  %[1]d:
    regionid: %[1]d
    regioncode: %[2]s
    regionname: %[2]s
    nodes:
      - {name: %[1]da, regionid: %[1]d, hostname: %[3]s, ipv4: %[3]s, ipv6: "%[4]s", stunport: 3478, derpport: %[5]d}
`, id, code, addrs[0].Addr(), addrs[1].Addr(), relayPort)
}

// withRelay makes a Headscale configuration use the relay that is apart.
func withRelay(c object) {
	derp := c["derp"].(object)
	derp["server"].(object)["enabled"] = false
	derp["paths"] = []string{relayMapFile}
}

// startRelay starts the relay and waits until it listens.
func (c *Control) startRelay(ctx context.Context, opt Options) error {
	conf := headscaleConfig(fmt.Sprintf("http://%s:%d", underlayAddrs(1)[0].Addr(), relayPort), opt.Batch)
	state := "/var/lib/headscale-relay"
	server := conf["derp"].(object)["server"].(object)
	server["region_id"], server["verify_clients"] = 900, false // it knows no nodes
	server["private_key_path"] = filepath.Join(state, "derp.key")
	conf["listen_addr"] = fmt.Sprintf("[::]:%d", relayPort)
	conf["metrics_listen_addr"], conf["grpc_listen_addr"] = "127.0.0.1:9091", "127.0.0.1:50444"
	conf["noise"] = object{"private_key_path": filepath.Join(state, "noise.key")}
	conf["database"] = object{"type": "sqlite", "sqlite": object{"path": filepath.Join(state, "db.sqlite")}}
	conf["policy"] = object{"mode": "database"}
	conf["unix_socket"] = "/run/headscale/relay.sock"
	if err := os.MkdirAll(c.Path(state), 0o700); err != nil {
		return err
	}
	b, err := json.Marshal(conf) // JSON is valid YAML
	if err != nil {
		return err
	}
	if err := os.WriteFile(c.Path(relayConfig), b, 0o600); err != nil {
		return err
	}
	if err := os.WriteFile(c.Path(relayMapFile), []byte(relayMap()), 0o600); err != nil {
		return err
	}
	return c.runRelay(ctx)
}

func (c *Control) runRelay(ctx context.Context) (err error) {
	if c.Relay, err = start(c.ns, filepath.Join(c.Dir, "relay.log"), c.env, nil, c.find("headscale"), "--config", relayConfig, "serve"); err != nil {
		return err
	}
	return until(ctx, 20*time.Millisecond, c.Relay, func() error {
		conn, err := c.Dial(ctx, "tcp", net.JoinHostPort("127.0.0.1", fmt.Sprint(relayPort)))
		if err != nil {
			return err
		}
		return conn.Close()
	})
}
