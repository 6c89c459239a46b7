package config

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
)

// ReadEnvFile returns the variables of a systemd EnvironmentFile as NAME=VALUE (systemd.exec(5)): one in a line, perhaps in quotes,
// with comments. A missing file has none. It is an error where a key stands in a file that everybody can read.
func ReadEnvFile(path string) (environ []string, err error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the variables of the systemd units: %w; run as root", err)
	}
	environ = parseEnv(string(b))
	for _, v := range environ {
		if name, value, _ := strings.Cut(v, "="); slices.Contains([]string{apiKeyVariable, authKeyVariable}, name) && value != "" {
			err = Credential{Source: name, File: path}.Exposed("")
		}
	}
	return environ, err
}

// parseEnv reads the text of an EnvironmentFile.
func parseEnv(text string) (environ []string) {
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		name, value, ok := strings.Cut(line, "=")
		if !ok || strings.HasPrefix(line, "#") || strings.HasPrefix(line, ";") {
			continue
		}
		value = strings.TrimSpace(value)
		if n := len(value); n > 1 && strings.ContainsRune(`"'`, rune(value[0])) && value[n-1] == value[0] {
			value = value[1 : n-1]
		}
		environ = append(environ, strings.TrimSpace(name)+"="+value)
	}
	return environ
}
