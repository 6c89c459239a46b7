package e2e

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"strings"
	"testing"
	"time"
)

const webhookManifest = `
apiVersion: v1
kind: Secret
metadata: {name: webhook, namespace: e2e}
data: {tls.crt: CERTIFICATE, tls.key: PRIVATEKEY}
---
apiVersion: v1
kind: Pod
metadata: {name: webhook, namespace: e2e, labels: {app: webhook}}
spec:
  nodeName: NODE
  terminationGracePeriodSeconds: 1
  containers:
    - name: webhook
      image: AGNHOST
      args: [webhook, --tls-cert-file=/tls/tls.crt, --tls-private-key-file=/tls/tls.key, --port=8444]
      readinessProbe: {httpGet: {scheme: HTTPS, path: /readyz, port: 8444}, periodSeconds: 1}
      volumeMounts: [{name: tls, mountPath: /tls}]
  volumes: [{name: tls, secret: {secretName: webhook}}]
---
apiVersion: v1
kind: Service
metadata: {name: webhook, namespace: e2e}
spec:
  selector: {app: webhook}
  ports: [{port: 443, targetPort: 8444}]
`

const webhookConfiguration = `
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingWebhookConfiguration
metadata: {name: e2e}
webhooks:
  - name: deny.e2e.example
    admissionReviewVersions: [v1]
    sideEffects: None
    timeoutSeconds: 5
    clientConfig: {service: {namespace: e2e, name: webhook, path: /always-deny}, caBundle: CERTIFICATE}
    namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: e2e}}
    rules: [{apiGroups: [""], apiVersions: [v1], operations: [CREATE], resources: [configmaps]}]
`

// testWebhook has the API server, a process of one node, ask a pod of another through its service.
func testWebhook(t *testing.T, w *world) {
	certificate, key := selfSigned(t, "webhook.e2e.svc")
	fill := strings.NewReplacer("CERTIFICATE", certificate, "PRIVATEKEY", key, "NODE", w.Workers()[1].Name)
	w.apply(t, "webhook.yaml", fill.Replace(webhookManifest))
	w.kubectl(t, "wait", "-n", echoes, "pod/webhook", "--for=condition=Ready", "--timeout=60s")
	w.apply(t, "webhook-configuration.yaml", fill.Replace(webhookConfiguration))
	defer w.kubectl(t, "delete", "validatingwebhookconfiguration", "e2e")
	eventually(t, "the webhook refuses", 30*time.Second, func(ctx context.Context) error {
		_, err := w.Kubectl(ctx, "create", "configmap", "-n", echoes, fmt.Sprintf("refused-%d", time.Now().UnixNano()))
		if err == nil {
			return errors.New("it was not asked")
		}
		if !strings.Contains(err.Error(), "this webhook denies all requests") {
			return err
		}
		return nil
	})
}

// selfSigned makes a certificate for name and its key, in PEM in base64.
func selfSigned(t *testing.T, name string) (certificate, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	encode := func(kind string, b []byte) string {
		return base64.StdEncoding.EncodeToString(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: b}))
	}
	return encode("CERTIFICATE", der), encode("PRIVATE KEY", pkcs8)
}
