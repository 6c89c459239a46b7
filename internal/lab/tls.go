package lab

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"net"
	"net/http"
	"os"
	"strconv"
	"time"
)

const (
	// tlsHost is Headscale's name where it speaks TLS, at tlsPort, which is where proxies let one connect to.
	tlsHost = "headscale.lab"
	tlsPort = 443
	// CAFile is where each machine has the certificate to trust.
	CAFile = "/etc/headcni/ca.crt"
)

// withTLS makes a certificate, and a Headscale configuration use it.
func (c *Control) withTLS(config object) error {
	const cert, key = "/etc/headscale/tls.crt", "/etc/headscale/tls.key"
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{tlsHost}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(0, 1, 0),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &private.PublicKey, private)
	if err != nil {
		return err
	}
	if c.cert, err = x509.ParseCertificate(der); err != nil {
		return err
	}
	secret, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return err
	}
	if err := os.WriteFile(c.Path(key), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret}), 0o600); err != nil {
		return err
	}
	config["tls_cert_path"], config["tls_key_path"] = cert, key
	config["listen_addr"] = net.JoinHostPort("::", strconv.Itoa(tlsPort))
	return c.trust(c.Machine, cert)
}

// trust gives a machine the certificate, in CAFile, and in another file where one is named.
func (c *Control) trust(m *Machine, also ...string) error {
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.cert.Raw})
	for _, file := range append(also, CAFile) {
		if err := os.WriteFile(m.Path(file), text, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// transport is an administrator's, on the control host.
func (c *Control) transport() *http.Transport {
	t := &http.Transport{DialContext: c.Dial, DisableKeepAlives: true}
	if c.cert == nil {
		return t
	}
	t.DialContext = func(ctx context.Context, network, _ string) (net.Conn, error) {
		return c.Dial(ctx, network, net.JoinHostPort("127.0.0.1", strconv.Itoa(tlsPort)))
	}
	t.TLSClientConfig = &tls.Config{RootCAs: x509.NewCertPool()}
	t.TLSClientConfig.RootCAs.AddCert(c.cert)
	return t
}
