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
	for line := range strings.Lines(string(b)) {
		line = strings.TrimSpace(line)
		name, value, ok := strings.Cut(line, "=")
		if !ok || strings.HasPrefix(line, "#") || strings.HasPrefix(line, ";") {
			continue
		}
		value = strings.TrimSpace(value)
		if n := len(value); n > 1 && strings.ContainsRune(`"'`, rune(value[0])) && value[n-1] == value[0] {
			value = value[1 : n-1]
		}
		name = strings.TrimSpace(name)
		environ = append(environ, name+"="+value)
		if slices.Contains([]string{apiKeyVariable, authKeyVariable}, name) && value != "" {
			err = Credential{Source: name, File: path}.Exposed("")
		}
	}
	return environ, err
}
