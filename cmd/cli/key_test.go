package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/headscaletest"
	"github.com/headcni/headcni/pkg/config/secret"
	"github.com/headcni/headcni/pkg/headscale"
)

// keyWorld is a Headscale with two keys, with which two and one nodes joined, and a node of a person's.
func keyWorld(t *testing.T) (*headscaletest.Server, *headscale.Client, []headscale.PreAuthKey) {
	t.Helper()
	s := headscaletest.New(t)
	api, err := headscale.New(headscale.Options{URL: s.URL, Key: secret.New(s.APIKey())})
	if err != nil {
		t.Fatal(err)
	}
	var keys []headscale.PreAuthKey
	for _, names := range [][]string{{"good", "stolen"}, {"other"}} {
		k, err := api.CreatePreAuthKey(t.Context(), headscale.PreAuthKeyRequest{Reusable: true, Expiration: time.Now().Add(time.Hour), Tags: []string{"tag:headcni"}})
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, k)
		for _, name := range names {
			if _, err := s.Join(k.Key.Reveal(), name); err != nil {
				t.Fatal(err)
			}
		}
	}
	s.AddNode(headscaletest.Node{GivenName: "laptop"})
	return s, api, keys
}

func TestKeyJoined(t *testing.T) {
	_, api, keys := keyWorld(t)
	var out bytes.Buffer
	if err := listJoined(t.Context(), api, &out, time.Now()); err != nil {
		t.Fatal(err)
	}
	var lines []string
	for line := range strings.Lines(out.String()) {
		lines = append(lines, strings.Join(strings.Fields(line), " "))
	}
	if len(lines) != 4 || !strings.HasPrefix(lines[1], "2 20") || !strings.Contains(lines[1], " other ") || !strings.HasPrefix(lines[2], "1 20") ||
		!strings.Contains(lines[2], " good ") || !strings.HasPrefix(lines[3], "2 stolen ") {
		t.Errorf("listed:\n%s", out.String())
	}
	for _, k := range keys {
		if strings.Contains(out.String(), k.Key.Reveal()) {
			t.Error("the key itself is shown")
		}
	}
}

func TestKeyRevoke(t *testing.T) {
	s, api, keys := keyWorld(t)
	names := func() (out []string) {
		for _, n := range s.Nodes() {
			out = append(out, n.GivenName)
		}
		return out
	}
	var out bytes.Buffer
	for what, err := range map[string]error{
		"no such key":   revoke(t.Context(), api, 99, false, false, &out),
		"nodes unasked": revoke(t.Context(), api, keys[0].ID, true, false, &out),
	} {
		if err == nil {
			t.Errorf("%s: no error", what)
		}
	}
	if !strings.Contains(out.String(), "would remove node 2 (stolen)") || len(s.Nodes()) != 4 {
		t.Errorf("%s, left: %v", &out, names())
	}
	if _, err := s.Join(keys[0].Key.Reveal(), "late"); err != nil {
		t.Fatal("the key has ended already:", err)
	}
	if err := revoke(t.Context(), api, keys[0].ID, true, true, &out); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(names(), " "); got != "other laptop" {
		t.Errorf("left: %s", got)
	}
	if _, err := s.Join(keys[0].Key.Reveal(), "stolen"); err == nil {
		t.Error("it joins again with the key")
	}
	if _, err := s.Join(keys[1].Key.Reveal(), "next"); err != nil {
		t.Errorf("the other key: %v", err)
	}
	// The nodes are listed by the key's number also where Headscale lists the key no more.
	if err := revoke(t.Context(), api, keys[1].ID, false, false, &out); err != nil || len(s.Nodes()) != 3 {
		t.Errorf("%v, left: %v", err, names())
	}
}

// TestKeyConnect: what is missing is named.
func TestKeyConnect(t *testing.T) {
	file := filepath.Join(t.TempDir(), "daemon.yaml")
	for text, says := range map[string]string{"{}": "headscale.url is empty", "headscale: {url: http://127.0.0.1:1}": "HEADSCALE_API_KEY"} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		t.Setenv("HEADSCALE_API_KEY_FILE", "")
		t.Setenv("HEADSCALE_API_KEY", "")
		if _, err := connectAPI(context.Background(), file); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v", text, err)
		}
	}
}

// TestKeyRotate: on a node the file is replaced when Headscale takes the new key, and not else; no key is printed.
func TestKeyRotate(t *testing.T) {
	noCluster(t)
	for _, name := range []string{"HEADSCALE_API_KEY", "HEADCNI_AUTH_KEY", "HEADSCALE_API_KEY_FILE", "HEADCNI_AUTH_KEY_FILE"} {
		t.Setenv(name, "")
	}
	s := headscaletest.New(t)
	dir := t.TempDir()
	file := func(name, text string) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	old, next := s.APIKeyUntil(time.Now().Add(time.Hour)), s.APIKeyUntil(time.Now().Add(90*24*time.Hour))
	place := file("key", old+"\n")
	yaml := file("daemon.yaml", "headscale: {url: "+s.URL+", apiKeyFile: "+place+"}\n")
	key := func(code exitCode, want string, args ...string) {
		t.Helper()
		out, err := headcnictl(t, append([]string{"key", "--config", yaml}, args...)...)
		var got exitCode
		if err != nil && !errors.As(err, &got) || got != code || !strings.Contains(out, want) {
			t.Errorf("%v: %v, want exit code %d and %q in\n%s", args, err, code, want, out)
		}
		for _, secret := range []string{old, next} {
			if strings.Contains(out, secret) || strings.Contains(out, secret[len(secret)-20:]) {
				t.Errorf("%v: a key is printed", args)
			}
		}
	}
	holds := func(want string) {
		t.Helper()
		if b, err := os.ReadFile(place); err != nil || strings.TrimSpace(string(b)) != want {
			t.Errorf("another key is in use than should be (%v)", err)
		}
	}
	key(1, "key rotate --from-file FILE", "show") // it ends within an hour
	key(1, "nothing was changed", "rotate", "--from-file", file("wrong", "hskey-api-wrongwrongwr-"+strings.Repeat("w", 64)))
	key(1, "it is a pre-auth key", "rotate", "--from-file", file("preauth", "hskey-auth-abcdefabcdef-"+strings.Repeat("0", 64)))
	key(2, "must hold the key alone", "rotate", "--from-file", file("two", old+" "+next))
	key(2, "no such file", "rotate", "--from-file", filepath.Join(dir, "none"))
	key(2, "give --from-file FILE", "rotate")
	key(2, "without Kubernetes there is no join key", "rotate", "--join")
	holds(old)
	if out, err := headcnictl(t, "key", "--config", yaml, "rotate", "--from-file", file("same", old)); err != nil || !strings.Contains(out, "written to "+place) || strings.Contains(out, "expire") {
		t.Errorf("the same key again: %v, want it written, and not ended, in\n%s", err, out)
	}
	holds(old)
	key(0, "headscale apikeys expire --prefix "+strings.Split(old, "-")[2]+"`\n", "rotate", "--from-file", file("next", next+"\n"))
	holds(next)
	if info, err := os.Stat(place); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	key(0, "ends 20", "show")
	t.Setenv("HEADSCALE_API_KEY", next)
	key(2, "HEADSCALE_API_KEY holds a key", "rotate", "--from-file", file("back", s.APIKey()))
	t.Setenv("HEADSCALE_API_KEY", "")
	s.Kill()
	key(2, "nothing was changed: ", "rotate", "--from-file", file("back", old))
	key(1, "cannot reach Headscale", "show")
	holds(next)
}
