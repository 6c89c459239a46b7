package headscale

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"slices"
	"time"

	"github.com/headcni/headcni/pkg/config/secret"
)

// defaultUser owns the pre-auth keys that we make where the server wants an owner.
const defaultUser = "headcni"

// How long before its expiry a key is warned about, or its expiry is disabled.
const (
	// NodeKeyWarning is for a node key: when it expires, the node's network ends.
	NodeKeyWarning = 7 * 24 * time.Hour
	// NodeKeyRescue is when the controller disables the expiry of a node that joined for us.
	NodeKeyRescue = 24 * time.Hour
	// APIKeyWarning is for an API key; Headscale's expire after 90 days.
	APIKeyWarning = 14 * 24 * time.Hour
)

// PreAuthKey is a key that nodes join with.
type PreAuthKey struct {
	ID         ID
	Key        secret.Secret
	User       User
	Expiration time.Time
	CreatedAt  time.Time
	ACLTags    []string
}

// keyForm is that of every key that Headscale has made so far.
var keyForm = regexp.MustCompile(`^[A-Za-z0-9_-]{16,256}$`)

// User owns nodes and keys.
type User struct {
	ID   ID
	Name string
}

// PreAuthKeyRequest says what key to make.
type PreAuthKeyRequest struct {
	Reusable bool
	// Expiration must be in the future.
	Expiration time.Time
	// Tags such as tag:headcni: a tagged node's key never expires.
	Tags []string
}

// CreatePreAuthKey makes a key: without owner, which 0.28 and later give where there are tags, else for the user headcni, who
// is made where he is missing.
func (c *Client) CreatePreAuthKey(ctx context.Context, r PreAuthKeyRequest) (PreAuthKey, error) {
	k, err := c.createPreAuthKey(ctx, r, 0)
	var e *Error
	if err == nil || !errors.As(err, &e) || errors.Is(err, ErrUnauthorized) {
		return k, wrap(err, "make a pre-auth key")
	}
	u, err := c.ensureUser(ctx, defaultUser)
	if err != nil {
		return PreAuthKey{}, fmt.Errorf("make a pre-auth key: %w", err)
	}
	k, err = c.createPreAuthKey(ctx, r, u.ID)
	return k, wrap(err, "make a pre-auth key for user %s", defaultUser)
}

func (c *Client) createPreAuthKey(ctx context.Context, r PreAuthKeyRequest, user ID) (PreAuthKey, error) {
	body := map[string]any{
		"reusable": r.Reusable, "expiration": r.Expiration.UTC().Format(time.RFC3339), "aclTags": r.Tags,
	}
	if user != 0 {
		body["user"] = user
	}
	var key PreAuthKey
	err := c.do(ctx, call{method: "POST", path: "/api/v1/preauthkey", body: body, field: "preAuthKey", out: &key, sendOnce: true})
	if err == nil && (key.ID == 0 || !keyForm.MatchString(key.Key.Reveal())) {
		err = c.unexpected(errors.New("the answer holds no key"))
	}
	if err != nil {
		return PreAuthKey{}, err
	}
	return key, nil
}

// KnowsPreAuthKey reports whether the server still has a key of ours that can be used until the given time, to the second. It has
// not where somebody expired or deleted it, or the server was restored from a backup that is older: then another key may bear
// the same ID.
func (c *Client) KnowsPreAuthKey(ctx context.Context, id ID, expires time.Time) (bool, error) {
	keys, err := c.PreAuthKeys(ctx)
	return slices.ContainsFunc(keys, func(k PreAuthKey) bool {
		return k.ID == id && k.Expiration.Sub(expires).Abs() < time.Second
	}), wrap(err, "look for pre-auth key %d", id)
}

// PreAuthKeys lists the keys that nodes can or could join with: all of them, up to 0.27 those of the user headcni.
func (c *Client) PreAuthKeys(ctx context.Context) ([]PreAuthKey, error) {
	list := func(query string) (keys []PreAuthKey, err error) {
		err = c.do(ctx, call{method: "GET", path: "/api/v1/preauthkey" + query, field: "preAuthKeys", out: &keys, list: true})
		return keys, wrap(err, "list Headscale's pre-auth keys")
	}
	keys, err := list("")
	if len(keys) > 0 || err != nil && !errors.As(err, new(*Error)) {
		return keys, err
	}
	// Up to 0.27 the server lists the keys of one user.
	u, userErr := c.user(ctx, defaultUser)
	switch {
	case errors.Is(userErr, ErrNotFound):
		return nil, err
	case userErr != nil:
		return nil, userErr
	}
	return list(fmt.Sprintf("?user=%d", u.ID))
}

// ExpirePreAuthKey ends a key that PreAuthKeys has listed. Nodes that joined with it stay.
func (c *Client) ExpirePreAuthKey(ctx context.Context, k PreAuthKey) error {
	// Since 0.28 the number counts, before that the user and the key itself.
	body := map[string]any{"id": k.ID, "user": k.User.ID, "key": k.Key.Reveal()}
	return wrap(c.do(ctx, call{method: "POST", path: "/api/v1/preauthkey/expire", body: body}), "expire pre-auth key %s", k.ID)
}

// ensureUser finds a user or makes it.
func (c *Client) ensureUser(ctx context.Context, name string) (User, error) {
	u, err := c.user(ctx, name)
	if !errors.Is(err, ErrNotFound) {
		return u, err
	}
	err = c.do(ctx, call{method: "POST", path: "/api/v1/user", body: map[string]string{"name": name}, field: "user", out: &u, sendOnce: true})
	if err == nil && (u.ID == 0 || u.Name != name) {
		err = c.unexpected(errors.New("the answer holds no such user"))
	}
	var refused *Error
	if errors.As(err, &refused) {
		// Another node that joins at the same time may have been faster.
		if u, found := c.user(ctx, name); found == nil {
			return u, nil
		}
	}
	return u, wrap(err, "make user %s", name)
}

// user finds a user by name. ErrNotFound.
func (c *Client) user(ctx context.Context, name string) (User, error) {
	var users []User
	if err := c.do(ctx, call{method: "GET", path: "/api/v1/user?name=" + url.QueryEscape(name), field: "users", out: &users, list: true}); err != nil {
		return User{}, fmt.Errorf("find user %s: %w", name, err)
	}
	for _, u := range users {
		if u.Name == name {
			return u, nil
		}
	}
	return User{}, fmt.Errorf("find user %s: %w", name, ErrNotFound)
}
