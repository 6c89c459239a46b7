// Package secret holds values that must never be printed.
package secret

import (
	"encoding/json"
	"fmt"
	"log/slog"
)

const mask = "***"

// Secret is a string that prints as *** through fmt, JSON, YAML and slog. The zero value is an empty secret.
type Secret struct{ value string }

// New wraps value.
func New(value string) Secret { return Secret{value} }

// Reveal yields the value. Call it only where the value is used.
func (s Secret) Reveal() string { return s.value }

// Empty reports whether there is no value.
func (s Secret) Empty() bool { return s.value == "" }

func (s Secret) masked() string {
	if s.value == "" {
		return ""
	}
	return mask
}

// String, GoString and Format keep the value out of every fmt verb.
func (s Secret) String() string   { return s.masked() }
func (s Secret) GoString() string { return s.masked() }

// Format implements fmt.Formatter.
func (s Secret) Format(f fmt.State, _ rune) { fmt.Fprint(f, s.masked()) }

// LogValue implements slog.LogValuer.
func (s Secret) LogValue() slog.Value { return slog.StringValue(s.masked()) }

// MarshalJSON writes the mask. YAML goes through JSON.
func (s Secret) MarshalJSON() ([]byte, error) { return json.Marshal(s.masked()) }

// UnmarshalJSON reads a string. The error does not repeat the input.
func (s *Secret) UnmarshalJSON(b []byte) error {
	if json.Unmarshal(b, &s.value) != nil {
		return fmt.Errorf("a secret must be a string")
	}
	return nil
}
