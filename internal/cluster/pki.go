package cluster

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

// pki is the cluster's certificate authority, one for everything: who holds which certificate is not what is tested.
type pki struct {
	url     string // the API server's
	ca      *x509.Certificate
	key     *ecdsa.PrivateKey
	caPEM   []byte
	serving pair
	// account signs service account tokens.
	account pair
	serial  int64
}

// pair is a certificate and its key, as PEM.
type pair struct{ cert, key []byte }

func newPKI(server []netip.Addr, services []netip.Prefix, url string) (*pki, error) {
	p := &pki{url: url}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	p.key = key
	template := p.template(pkix.Name{CommonName: "headcni-test-cluster"})
	template.IsCA, template.BasicConstraintsValid = true, true
	template.KeyUsage |= x509.KeyUsageCertSign
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	if p.ca, err = x509.ParseCertificate(der); err != nil {
		return nil, err
	}
	p.caPEM = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	ips := []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback}
	for _, service := range services {
		ips = append(ips, service.Addr().Next().AsSlice()) // the Service `kubernetes` has the first address
	}
	for _, a := range server {
		ips = append(ips, a.AsSlice())
	}
	names := []string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"}
	if p.serving, err = p.issue(pkix.Name{CommonName: "kube-apiserver"}, names, ips); err != nil {
		return nil, err
	}
	p.account, err = p.issue(pkix.Name{CommonName: "service-accounts"}, nil, nil)
	return p, err
}

func (p *pki) template(name pkix.Name) *x509.Certificate {
	p.serial++
	return &x509.Certificate{
		SerialNumber: big.NewInt(p.serial),
		Subject:      name,
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(30 * 24 * time.Hour),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
}

// issue makes a certificate with a key of its own.
func (p *pki) issue(name pkix.Name, names []string, ips []net.IP) (pair, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return pair{}, err
	}
	template := p.template(name)
	template.DNSNames, template.IPAddresses = names, ips
	der, err := x509.CreateCertificate(rand.Reader, template, p.ca, key.Public(), p.key)
	if err != nil {
		return pair{}, fmt.Errorf("issue a certificate for %s: %w", name.CommonName, err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return pair{}, err
	}
	return pair{
		cert: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		key:  pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}),
	}, nil
}

// kubeconfig makes a kubeconfig for a user, who is told by name and group.
func (p *pki) kubeconfig(user, group string) ([]byte, error) {
	return p.kubeconfigFor(p.url, user, group)
}

// kubeconfigFor is kubeconfig with another way to the API server.
func (p *pki) kubeconfigFor(url, user, group string) ([]byte, error) {
	id := pkix.Name{CommonName: user}
	if group != "" {
		id.Organization = []string{group}
	}
	client, err := p.issue(id, nil, nil)
	if err != nil {
		return nil, err
	}
	c := clientcmdapi.NewConfig()
	c.Clusters["test"] = &clientcmdapi.Cluster{Server: url, CertificateAuthorityData: p.caPEM}
	c.AuthInfos[user] = &clientcmdapi.AuthInfo{ClientCertificateData: client.cert, ClientKeyData: client.key}
	c.Contexts["test"] = &clientcmdapi.Context{Cluster: "test", AuthInfo: user}
	c.CurrentContext = "test"
	return clientcmd.Write(*c)
}

// files are what an API server reads, by name.
func (p *pki) files() (map[string][]byte, error) {
	kubeletClient, err := p.issue(pkix.Name{CommonName: "kube-apiserver", Organization: []string{"system:masters"}}, nil, nil)
	if err != nil {
		return nil, err
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(p.key)
	if err != nil {
		return nil, err
	}
	return map[string][]byte{
		"ca.crt": p.caPEM, "ca.key": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}),
		"server.crt": p.serving.cert, "server.key": p.serving.key,
		"kubelet-client.crt": kubeletClient.cert, "kubelet-client.key": kubeletClient.key,
		"sa.crt": p.account.cert, "sa.key": p.account.key,
	}, nil
}

// writeFiles writes files into a folder, which it makes.
func writeFiles(dir string, files map[string][]byte) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			return err
		}
	}
	return nil
}
