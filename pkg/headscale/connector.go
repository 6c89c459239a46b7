package headscale

import (
	"bytes"
	"context"
	"fmt"
	"sync"

	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/secret"
)

// Connector keeps one Client while the credential and the CA file stay the same: a client keeps its connections, and a new one
// for each call would cost a TLS handshake for each. The credential and the CA file are read at
// every Connect, so that a new key or certificate counts without a restart. It is safe for concurrent use.
type Connector struct {
	cfg    config.Headscale
	getenv func(string) string

	mu     sync.Mutex
	client *Client // nil until the first Connect
	key    secret.Secret
	ca     []byte
	kind   Kind // "" until the server has told
}

// NewConnector makes a Connector for the Headscale of a configuration. It reads and connects nothing.
func NewConnector(cfg config.Headscale, getenv func(string) string) *Connector {
	return &Connector{cfg: cfg, getenv: getenv}
}

// Connect returns the client, or nil where the credential is a pre-auth key, with which the API cannot be used. It asks the
// server only where the key's prefix does not tell what kind it is, and then once for each key. The credential is returned
// also with an error that came after it was read; config.ErrNoCredential means that there is none.
func (c *Connector) Connect(ctx context.Context) (*Client, config.Credential, error) {
	cred, err := c.cfg.Credential(c.getenv)
	if err != nil {
		return nil, cred, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.renew(cred.Key); err != nil {
		return nil, cred, err
	}
	if c.kind == "" {
		kind, err := c.client.Kind(ctx)
		if err != nil {
			return nil, cred, fmt.Errorf("%s: %w", cred.Source, err)
		}
		c.kind = kind
	}
	if c.kind != KindAPI {
		return nil, cred, nil
	}
	return c.client, cred, nil
}

// renew replaces the client where the key or the certificates have changed.
func (c *Connector) renew(key secret.Secret) error {
	ca, err := readCA(c.cfg.CAFile)
	if err != nil {
		return err
	}
	if c.client != nil && c.key == key && bytes.Equal(c.ca, ca) {
		return nil
	}
	t, err := newTransport(c.cfg.CAFile, ca, c.cfg.Proxy)
	if err != nil {
		return err
	}
	next, err := New(Options{URL: c.cfg.URL, Key: key, Transport: t})
	if err != nil {
		return err
	}
	if c.client != nil {
		c.client.http.CloseIdleConnections()
	}
	c.client, c.key, c.ca, c.kind = next, key, ca, ""
	return nil
}
