package headscale

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/headscaletest"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/secret"
)

func noEnv(string) string { return "" }

func writeFile(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// A key that changes counts with the next call; one that stays is asked about once, over one connection.
func TestConnectorKeepsTheClient(t *testing.T) {
	hs := headscaletest.NewVersion(t, 27) // whose keys do not tell what kind they are
	one, two := hs.APIKey(), hs.APIKey()
	// Only those with a key: another test's tailscaled may still look for its Headscale, which had this port.
	var mu sync.Mutex
	connections := map[string]bool{}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "" {
			mu.Lock()
			connections[r.RemoteAddr] = true
			mu.Unlock()
		}
		hs.ServeHTTP(w, r)
	}))
	t.Cleanup(srv.Close)
	asked := func() int { return len(hs.Calls("GET /api/v1/apikey")) }
	keyFile := filepath.Join(t.TempDir(), "key")
	c := NewConnector(config.Headscale{URL: srv.URL, APIKeyFile: keyFile}, noEnv)

	if api, _, err := c.Connect(t.Context()); api != nil || err == nil {
		t.Errorf("without the file: %v, %v", api, err)
	}
	var clients []*Client
	for _, key := range []string{one, one, two} {
		writeFile(t, keyFile, key)
		api, cred, err := c.Connect(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if cred.Key.Reveal() != key || cred.Source != "headscale.apiKeyFile" {
			t.Errorf("the credential is of %s", cred.Source)
		}
		if _, err := api.Nodes(t.Context()); err != nil {
			t.Fatal(err)
		}
		clients = append(clients, api)
	}
	if clients[0] != clients[1] || clients[1] == clients[2] {
		t.Error("want one client for each key")
	}
	mu.Lock()
	over := len(connections)
	mu.Unlock()
	if asked() != 2 || over != 2 {
		t.Errorf("asked %d times what kind a key is, over %d connections; want one of each for each key", asked(), over)
	}
	writeFile(t, keyFile, "preauth")
	for range 2 {
		if api, cred, err := c.Connect(t.Context()); api != nil || err != nil || cred.Key.Reveal() != "preauth" {
			t.Errorf("a pre-auth key: %v, %v", api, err)
		}
	}
	if asked() != 3 {
		t.Errorf("asked %d times about three keys", asked())
	}
}

// A server that cannot be asked what kind a key is, is asked again.
func TestConnectorAsksAgain(t *testing.T) {
	srv := headscaletest.NewVersion(t, 27)
	key := srv.APIKey()
	srv.Break(headscaletest.Refuse())
	c := NewConnector(config.Headscale{URL: srv.URL}, func(name string) string {
		return map[string]string{"HEADSCALE_API_KEY": key}[name]
	})
	_, _, err := c.Connect(t.Context())
	if !errors.Is(err, ErrUnauthorized) || !strings.HasPrefix(err.Error(), "HEADSCALE_API_KEY: ") {
		t.Errorf("a wrong key: %v", err)
	}
	srv.Break(nil)
	if api, _, err := c.Connect(t.Context()); api == nil || err != nil {
		t.Errorf("%v, %v", api, err)
	}
	none := NewConnector(config.Headscale{URL: srv.URL}, noEnv)
	if _, _, err := none.Connect(t.Context()); !errors.Is(err, config.ErrNoCredential) {
		t.Errorf("no key: %v", err)
	}
}

// A CA file that is replaced counts without a restart.
func TestConnectorReadsTheCAFileAgain(t *testing.T) {
	hs := headscaletest.New(t)
	key := hs.APIKey()
	srv := httptest.NewTLSServer(hs)
	t.Cleanup(srv.Close)
	caFile := filepath.Join(t.TempDir(), "ca.pem")
	c := NewConnector(config.Headscale{URL: srv.URL, CAFile: caFile}, func(string) string { return key })
	writeFile(t, caFile, "no certificate")
	if _, _, err := c.Connect(t.Context()); err == nil || !strings.Contains(err.Error(), caFile) {
		t.Errorf("an empty bundle: %v", err)
	}
	nodes := func(der []byte) error {
		writeFile(t, caFile, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
		api, _, err := c.Connect(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		_, err = api.Nodes(t.Context())
		return err
	}
	if err := nodes(anotherCA(t)); !errors.Is(err, ErrUnreachable) {
		t.Errorf("with another CA: %v", err)
	}
	if err := nodes(srv.Certificate().Raw); err != nil {
		t.Errorf("with the server's: %v", err)
	}
}

// With a proxy nothing is sent but by it: the server's name is nobody's here.
func TestProxy(t *testing.T) {
	hs := headscaletest.New(t)
	srv := httptest.NewTLSServer(hs)
	t.Cleanup(srv.Close)
	var asked atomic.Value
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Store(r.Method + " " + r.Host)
		to, err := net.Dial("tcp", srv.Listener.Addr().String())
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		defer to.Close()
		w.WriteHeader(http.StatusOK)
		from, buffered, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		defer from.Close()
		go io.Copy(to, buffered)
		_, _ = io.Copy(from, to) // until either hangs up
	}))
	t.Cleanup(proxy.Close)
	caFile := filepath.Join(t.TempDir(), "ca.pem")
	writeFile(t, caFile, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})))
	key := hs.APIKey()
	cfg := config.Headscale{URL: "https://example.com", CAFile: caFile, Proxy: proxy.URL} // a name that the certificate has
	api, _, err := NewConnector(cfg, func(string) string { return key }).Connect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := api.Nodes(t.Context()); err != nil {
		t.Error(err)
	}
	if got := asked.Load(); got != "CONNECT example.com:443" {
		t.Errorf("the proxy was asked for %v", got)
	}
	proxy.Close()
	api.http.CloseIdleConnections()
	if _, err := api.Nodes(t.Context()); !errors.Is(err, ErrUnreachable) || !strings.Contains(err.Error(), "proxyconnect") {
		t.Errorf("without the proxy: %v", err)
	}
}

// anotherCA is a certificate that has signed nothing.
func anotherCA(t *testing.T) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// A connection on which nothing comes back any more, as after a change of the host's network, is used for one try only.
func TestDeadConnectionIsLeft(t *testing.T) {
	hs := headscaletest.New(t)
	hs.Break(func(http.ResponseWriter, *http.Request) bool {
		time.Sleep(20 * time.Millisecond) // so that two calls at once take two connections
		return false
	})
	srv := httptest.NewUnstartedServer(hs)
	srv.EnableHTTP2 = true
	var dead, connections atomic.Int32
	srv.Listener = mutable{srv.Listener, &dead, &connections}
	srv.StartTLS()
	t.Cleanup(srv.Close)
	caFile := filepath.Join(t.TempDir(), "ca.pem")
	writeFile(t, caFile, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})))
	c, err := New(Options{URL: srv.URL, Key: secret.New(hs.APIKey()), CAFile: caFile})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			if _, err := c.Nodes(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	before := connections.Load()
	dead.Store(before)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := c.Nodes(ctx); !errors.Is(err, ErrUnreachable) {
		t.Fatalf("over a dead connection: %v", err)
	}
	if _, err := c.Nodes(t.Context()); err != nil {
		t.Error(err)
	}
	if now := connections.Load(); now != before+1 {
		t.Errorf("%d connections, want one beside the %d dead ones", now, before)
	}
}

// mutable is a listener whose connections, but the newest, can be made silent: as many of them as dead says.
type mutable struct {
	net.Listener
	dead, connections *atomic.Int32
}

func (m mutable) Accept() (net.Conn, error) {
	c, err := m.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return mutableConn{c, m.connections.Add(1), m.dead}, nil
}

type mutableConn struct {
	net.Conn
	number int32
	dead   *atomic.Int32
}

func (c mutableConn) Write(b []byte) (int, error) {
	if c.number <= c.dead.Load() {
		return len(b), nil
	}
	return c.Conn.Write(b)
}
