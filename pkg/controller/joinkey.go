package controller

import (
	"context"
	"crypto/sha256"
	"fmt"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/headcni/headcni/pkg/config/secret"
	"github.com/headcni/headcni/pkg/headscale"
	"github.com/headcni/headcni/pkg/kube"
)

const (
	// joinKeyLife is how long a key to join with can be used. Headscale keeps expired keys for ever, so it is not minutes.
	joinKeyLife = 6 * time.Hour
	// joinKeyRenew is when another is made: a node that has just read the old one has this long to use it.
	joinKeyRenew = joinKeyLife / 2

	// joinKeyLook is how often Headscale is asked whether it still has the key.
	joinKeyLook = time.Minute

	// joinKeyTimeout bounds the calls that it takes.
	joinKeyTimeout = 30 * time.Second

	// Annotations of the Secret: what its key is good for.
	joinExpires = kube.JoinExpires
	joinServer  = "headcni.io/server"
	joinTags    = "headcni.io/tags"
	// joinMinter tells API keys apart: a Headscale that was set up anew knows neither the old API key nor what it made.
	joinMinter = "headcni.io/made-with"
	// joinID is Headscale's number of the key.
	joinID = kube.JoinID
)

// joinKey makes sure that the Secret holds a key that nodes can join with, and returns when the one there expires, also with
// an error (the zero time: not known). api is nil where the credential is itself a pre-auth key.
//
// The key is made before the Secret is written: a leader that dies in between leaves a key that nobody knows, which
// expires by itself, and the old one stays good meanwhile.
func (c *Controller) joinKey(ctx context.Context, api *headscale.Client, credential secret.Secret) (time.Time, error) {
	ctx, cancel := context.WithTimeout(ctx, joinKeyTimeout)
	defer cancel()
	secrets := c.client.Secrets(c.namespace)
	have, err := secrets.Get(ctx, kube.JoinSecret, metav1.GetOptions{})
	missing := apierrors.IsNotFound(err)
	if err != nil && !missing {
		return time.Time{}, fmt.Errorf("read the join key: %w", err)
	}
	next := have.DeepCopy()
	if missing {
		next = &corev1.Secret{ObjectMeta: metav1.ObjectMeta{
			Name: kube.JoinSecret, Namespace: c.namespace, Labels: map[string]string{"app.kubernetes.io/managed-by": "headcni-controller"},
		}, Type: corev1.SecretTypeOpaque}
	}
	if next.Annotations == nil {
		next.Annotations = map[string]string{}
	}
	current, err := time.Parse(time.RFC3339, next.Annotations[joinExpires])
	expires := current
	key := string(next.Data[kube.JoinSecretKey])
	tags := strings.Join(c.cfg.Tailscale.Tags, ",")
	minter := fmt.Sprintf("%.8x", sha256.Sum256([]byte(credential.Reveal())))
	same := next.Annotations[joinServer] == c.cfg.Headscale.URL && next.Annotations[joinTags] == tags && next.Annotations[joinMinter] == minter
	switch {
	case api == nil:
		if key == credential.Reveal() && same {
			return time.Time{}, nil
		}
		key, expires = credential.Reveal(), time.Time{}
		delete(next.Annotations, joinExpires)
		delete(next.Annotations, joinID)
	case err == nil && key != "" && same && expires.Sub(c.now()) > joinKeyRenew && !c.joinKeyForgotten(ctx, api, next.Annotations[joinID], expires):
		return expires, nil
	default:
		expires = c.now().Add(joinKeyLife).UTC().Truncate(time.Second)
		made, err := api.CreatePreAuthKey(ctx, headscale.PreAuthKeyRequest{Tags: c.cfg.Tailscale.Tags, Expiration: expires, Reusable: true})
		if err != nil {
			return current, fmt.Errorf("make a join key: %w", err)
		}
		key = made.Key.Reveal()
		next.Annotations[joinExpires] = expires.Format(time.RFC3339)
		next.Annotations[joinID] = fmt.Sprint(made.ID)
	}
	next.Annotations[joinServer], next.Annotations[joinTags], next.Annotations[joinMinter] = c.cfg.Headscale.URL, tags, minter
	next.Data = map[string][]byte{kube.JoinSecretKey: []byte(key)}
	if missing {
		_, err = secrets.Create(ctx, next, metav1.CreateOptions{})
	} else {
		// With the version that was read: somebody who wrote meanwhile wins, and the next pass looks again.
		_, err = secrets.Update(ctx, next, metav1.UpdateOptions{})
	}
	if err != nil {
		return current, fmt.Errorf("write Secret %s/%s: %w", c.namespace, kube.JoinSecret, err)
	}
	c.log.Info("wrote the join key", "secret", kube.JoinSecret, "expires", expires)
	return expires, nil
}

// joinKeyForgotten reports whether Headscale no longer has the key with this number: somebody expired or deleted it, or
// restored Headscale from a backup that is older than the key. It asks once a minute; without an answer the key counts as good.
func (c *Controller) joinKeyForgotten(ctx context.Context, api *headscale.Client, number string, expires time.Time) bool {
	id, err := strconv.ParseUint(number, 10, 64)
	if err != nil || c.now().Sub(c.keyAt) < joinKeyLook {
		return false
	}
	known, err := api.KnowsPreAuthKey(ctx, headscale.ID(id), expires)
	if err != nil {
		c.log.Warn("look for the join key in Headscale", "err", err)
		return false
	}
	c.keyAt = c.now()
	if !known {
		c.log.Warn("Headscale no longer has the join key: it was expired or deleted there, or Headscale was restored from a backup; making another",
			"key", id)
	}
	return !known
}
