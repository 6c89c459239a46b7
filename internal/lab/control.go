package lab

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"
)

const (
	// BaseDomain is the tailnet's MagicDNS domain.
	BaseDomain = "tailnet.lab"
	// Tag is what nodes join with.
	Tag = "tag:headcni"

	headscalePort = 8080
	headscaleUser = "lab"
)

// ServiceCIDRs are those of the cluster of which a lab's nodes might be.
var ServiceCIDRs = []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16"), netip.MustParsePrefix("fd00:96::/112")}

// ClusterCIDRs are the pools that every node's pod CIDRs come from.
var ClusterCIDRs = []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:244::/32")}

// Control is the control host: Headscale with its embedded DERP server, and the underlay's bridge.
type Control struct {
	*Machine
	Headscale *Process
	// Relay is the relay where Options.Relay is set, else nil.
	Relay *Process
	// URL is Headscale's.
	URL string
	// cert is Headscale's certificate where Options.TLS is set, which signed itself; else nil.
	cert *x509.Certificate
	// APIKey is a Headscale API key.
	APIKey string
}

type object = map[string]any

// headscaleConfig is as close to Headscale's defaults as an offline tailnet allows.
func headscaleConfig(serverURL string, batch time.Duration) object {
	addrs := underlayAddrs(1)
	return object{
		"server_url":          serverURL,
		"listen_addr":         fmt.Sprintf("[::]:%d", headscalePort),
		"metrics_listen_addr": "127.0.0.1:9090",
		"grpc_listen_addr":    "127.0.0.1:50443",
		"noise":               object{"private_key_path": "/var/lib/headscale/noise_private.key"},
		"prefixes":            object{"v4": "100.64.0.0/10", "v6": "fd7a:115c:a1e0::/48", "allocation": "sequential"},
		"derp": object{
			// Headscale refuses to start without a relay, and Tailscale's are out of reach.
			"server": object{
				"enabled": true, "region_id": 999, "region_code": "lab", "region_name": "lab", "verify_clients": true,
				"stun_listen_addr": "[::]:3478", "private_key_path": "/var/lib/headscale/derp_server_private.key",
				"automatically_add_embedded_derp_region": true,
				"ipv4":                                   addrs[0].Addr().String(), "ipv6": addrs[1].Addr().String(),
			},
			"urls": []string{}, "paths": []string{}, "auto_update_enabled": false,
		},
		"disable_check_updates":  true,
		"database":               object{"type": "sqlite", "sqlite": object{"path": "/var/lib/headscale/db.sqlite"}},
		"log":                    object{"level": "info", "format": "text"},
		"policy":                 object{"mode": "file", "path": "/etc/headscale/policy.hujson"},
		"dns":                    object{"magic_dns": true, "base_domain": BaseDomain, "override_local_dns": false, "nameservers": object{"global": []string{}}},
		"unix_socket":            "/run/headscale/headscale.sock",
		"unix_socket_permission": "0700",
		"cli":                    object{"timeout": "60s"}, // hashing a key is slow on a busy machine
		"logtail":                object{"enabled": false},
		// Headscale gathers node changes for this long before it tells the others. Its default of 500 ms is for thousands
		// of nodes; it only makes joining slower.
		"tuning": object{"node_store_batch_timeout": batch.String()},
	}
}

// headscalePolicy lets everybody talk to everybody. Since Headscale 0.29 `*` means tailnet addresses only, so the pods
// stand beside it.
func headscalePolicy() object {
	src, dst := []string{"*"}, []string{"*:*"}
	for _, c := range ClusterCIDRs {
		src, dst = append(src, c.String()), append(dst, c.String()+":*")
	}
	return object{
		"tagOwners": object{Tag: []string{headscaleUser + "@"}},
		"acls":      []object{{"action": "accept", "src": src, "dst": dst}},
	}
}

// setUp starts Headscale on the control host.
func (c *Control) setUp(ctx context.Context, opt Options) error {
	c.URL = "http://" + netip.AddrPortFrom(opt.underlay(1)[0].Addr(), headscalePort).String()
	if opt.TLS {
		c.URL = "https://" + tlsHost
	}
	policy := headscalePolicy()
	if opt.Policy != nil {
		opt.Policy(policy)
	}
	serverURL := c.URL
	if opt.ServerURL != "" {
		serverURL = opt.ServerURL
	}
	config := headscaleConfig(serverURL, opt.Batch)
	if opt.Relay || len(opt.Derpers) > 0 {
		withRelay(config)
	}
	if opt.OnlyIPv6 {
		delete(config["derp"].(object)["server"].(object), "ipv4")
	}
	files := map[string]object{"config.yaml": config, "policy.hujson": policy}
	for _, dir := range []string{"/etc/headscale", "/run/headscale"} {
		if err := os.MkdirAll(c.Path(dir), 0o755); err != nil {
			return err
		}
	}
	if len(opt.Derpers) > 0 {
		if err := os.WriteFile(c.Path(relayMapFile), []byte(derperMap(len(opt.Derpers))), 0o600); err != nil {
			return err
		}
	}
	if opt.TLS {
		if err := c.withTLS(config); err != nil {
			return err
		}
	}
	for name, content := range files {
		b, err := json.Marshal(content) // JSON is valid YAML and valid HuJSON
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(c.Path("/etc/headscale"), name), b, 0o600); err != nil {
			return err
		}
	}
	if opt.Relay {
		if err := c.startRelay(ctx, opt); err != nil {
			return err
		}
	}
	if err := c.StartHeadscale(ctx); err != nil {
		return err
	}
	return c.makeKey(ctx)
}

// StartHeadscale starts Headscale and waits until it answers.
func (c *Control) StartHeadscale(ctx context.Context) (err error) {
	if c.Headscale, err = c.Start("headscale", nil, "serve"); err != nil {
		return err
	}
	client := &http.Client{Timeout: time.Second, Transport: c.transport()}
	return until(ctx, 20*time.Millisecond, c.Headscale, func() error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.URL+"/health", nil)
		if err != nil {
			return err
		}
		resp, err := client.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return errors.New(resp.Status)
		}
		return nil
	})
}

// makeKey makes a user and an API key through Headscale's local socket, as an administrator would.
func (c *Control) makeKey(ctx context.Context) error {
	if _, err := c.Run(ctx, "headscale", "users", "create", headscaleUser); err != nil {
		return err
	}
	out, err := c.Run(ctx, "headscale", "apikeys", "create", "--expiration", "2160h")
	if err != nil {
		return err
	}
	fields := strings.Fields(out)
	if len(fields) == 0 {
		return errors.New("headscale apikeys create printed no key")
	}
	c.APIKey = fields[len(fields)-1]
	return nil
}

// WaitConnected waits until Headscale has connections from n nodes.
func (c *Control) WaitConnected(ctx context.Context, n int) error {
	return until(ctx, 100*time.Millisecond, c.Headscale, func() error {
		out, err := c.Run(ctx, "headscale", "nodes", "list", "--output", "json")
		if err != nil {
			return err
		}
		var nodes []struct {
			Online bool `json:"online"`
		}
		if err := json.Unmarshal([]byte(out), &nodes); err != nil {
			return fmt.Errorf("read the list of nodes: %w", err)
		}
		online := 0
		for _, node := range nodes {
			if node.Online {
				online++
			}
		}
		if online < n {
			return fmt.Errorf("%d of %d nodes are connected", online, n)
		}
		return nil
	})
}
