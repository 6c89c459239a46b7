package main

import (
	"bytes"
	"context"
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
