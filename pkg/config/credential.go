package config

import (
	"fmt"
	"os"
	"strings"

	"github.com/headcni/headcni/pkg/config/secret"
	"github.com/headcni/headcni/pkg/findings"
)

// Credential is a Headscale API key or pre-auth key and where it was found.
type Credential struct {
	Key secret.Secret
	// Source names the variable, file or field.
	Source string
	// File holds the key, "" where it is in a variable or in the configuration file itself, of which Plain tells.
	File  string
	Plain bool
}

// ErrNoCredential means that no source holds a key.
var ErrNoCredential = findings.New(findings.NoKey, "no Headscale key: set HEADSCALE_API_KEY_FILE or headscale.apiKeyFile to a file that holds an API key or a pre-auth key")

// Variables that hold a key, and those that name a file which does, in the order in which they count.
const (
	apiKeyVariable      = "HEADSCALE_API_KEY"
	authKeyVariable     = "HEADCNI_AUTH_KEY"
	apiKeyFileVariable  = "HEADSCALE_API_KEY_FILE"
	authKeyFileVariable = "HEADCNI_AUTH_KEY_FILE"
)

// Credential finds the key. The order is the specification's: HEADSCALE_API_KEY, HEADCNI_AUTH_KEY,
// HEADSCALE_API_KEY_FILE, HEADCNI_AUTH_KEY_FILE, then headscale.apiKeyFile, headscale.authKeyFile and headscale.authKey.
// A source that is set but cannot be read is an error, never skipped: falling through would use a key nobody meant.
func (h Headscale) Credential(getenv func(string) string) (Credential, error) {
	for _, name := range []string{apiKeyVariable, authKeyVariable} {
		if v := strings.TrimSpace(getenv(name)); v != "" {
			return Credential{Key: secret.New(v), Source: name}, nil
		}
	}
	files := []struct{ source, path string }{
		{apiKeyFileVariable, getenv(apiKeyFileVariable)},
		{authKeyFileVariable, getenv(authKeyFileVariable)},
		{"headscale.apiKeyFile", h.APIKeyFile},
		{"headscale.authKeyFile", h.AuthKeyFile},
	}
	for _, f := range files {
		if f.path == "" {
			continue
		}
		key, err := readKey(f.path)
		if err != nil {
			return Credential{}, findings.Errorf(findings.NoKey, "%s: %w", f.source, err)
		}
		return Credential{Key: key, Source: f.source, File: f.path}, nil
	}
	if v := strings.TrimSpace(h.AuthKey.Reveal()); v != "" {
		return Credential{Key: secret.New(v), Source: "headscale.authKey", Plain: true}, nil
	}
	return Credential{}, ErrNoCredential
}

// Exposed returns an error, with the remedy, where every user of this machine can read the key. configFile may hold a plain key.
func (c Credential) Exposed(configFile string) error {
	path := c.File
	if c.Plain {
		path = configFile
	}
	info, err := os.Stat(path)
	if path == "" || err != nil || info.Mode().Perm()&0o004 == 0 {
		return nil // whoever reads the file gets the error
	}
	if c.Plain {
		return findings.Errorf(findings.KeyExposed, "%s: everybody can read %s (mode %04o), which holds the key: move it to a file of mode 0600 and name that in headscale.authKeyFile",
			c.Source, path, info.Mode().Perm())
	}
	return findings.Errorf(findings.KeyExposed, "%s: everybody can read %s (mode %04o): chmod 0600 %[2]s", c.Source, path, info.Mode().Perm())
}

// readKey reads a file of one line.
func readKey(path string) (secret.Secret, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return secret.Secret{}, fmt.Errorf("%w; write the key into it, mode 0600", err)
	}
	s := strings.TrimSpace(string(b))
	switch {
	case s == "":
		return secret.Secret{}, fmt.Errorf("%s is empty; write the key into it", path)
	case strings.ContainsAny(s, " \t\n"):
		return secret.Secret{}, fmt.Errorf("%s holds more than one word; it must hold the key alone", path)
	}
	return secret.New(s), nil
}
