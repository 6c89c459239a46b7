package nodeview

import (
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"context"
	"fmt"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/headcni/headcni/pkg/config/secret"
	"github.com/headcni/headcni/pkg/findings"
	"github.com/headcni/headcni/pkg/kube"
)

// JoinKey reads the key that the controller has made for nodes to join with.
func (w *Watch) JoinKey(ctx context.Context) (secret.Secret, error) {
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	s, err := w.client.Secrets(w.namespace).Get(ctx, kube.JoinSecret, metav1.GetOptions{})
	if apierrors.IsNotFound(err) || err == nil && len(s.Data[kube.JoinSecretKey]) == 0 {
		return secret.Secret{}, findings.Errorf(findings.NoKey, "headcni-controller has not made a key to join with yet (Secret %s/%s): see `kubectl -n %[1]s logs "+
			"deploy/headcni-controller`", w.namespace, kube.JoinSecret)
	}
	if err = w.keyDenied.judge(err, time.Now()); err != nil {
		return secret.Secret{}, fmt.Errorf("read the key to join with (Secret %s/%s): %w", w.namespace, kube.JoinSecret, err)
	}
	return secret.New(strings.TrimSpace(string(s.Data[kube.JoinSecretKey]))), nil
}
