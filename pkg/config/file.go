package config

import (
	"errors"
	"fmt"
	"reflect"
	"regexp"
	"strings"

	yaml3 "go.yaml.in/yaml/v3"
	"sigs.k8s.io/yaml"

	"github.com/headcni/headcni/internal/nearest"
)

// everyKey says where every key is explained.
const everyKey = "https://github.com/headcni/headcni/blob/main/docs/daemon.yaml has every key"

// decodeFile reads the YAML of the file at path over c. Each fault names its line and key, and what was probably meant.
func decodeFile(path string, b []byte, c *Config) error {
	if severalDocuments(b) {
		return fmt.Errorf("read %s: more than one YAML document, of which only the first would count; keep one", path)
	}
	// A second look at the text, for its lines alone. What it cannot read, the decoder refuses.
	var doc yaml3.Node
	lines := map[string]int{}
	if yaml3.Unmarshal(b, &doc) == nil && len(doc.Content) > 0 {
		if unknown := readKeys(doc.Content[0], reflect.TypeFor[Config](), "", lines); len(unknown) > 0 {
			for i, err := range unknown {
				unknown[i] = fmt.Errorf("%s: %w", path, err)
			}
			return fmt.Errorf("%w; %s", errors.Join(unknown...), everyKey)
		}
	}
	if err := yaml.UnmarshalStrict(b, c); err != nil {
		return fmt.Errorf("read %s: %s; %s", path, withLine(plain(err), lines), everyKey)
	}
	return nil
}

// readKeys notes the lines of all keys of a mapping and returns an error for each that the struct t lacks.
func readKeys(n *yaml3.Node, t reflect.Type, prefix string, lines map[string]int) (unknown []error) {
	if n.Kind == yaml3.AliasNode {
		n = n.Alias
	}
	if n.Kind != yaml3.MappingNode || t.Kind() != reflect.Struct {
		return nil // the decoder says what is wrong with it
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		field, names := fieldOf(t, key.Value)
		switch {
		case key.Value == "<<":
			unknown = append(unknown, readKeys(value, t, prefix, lines)...)
		case field == nil:
			unknown = append(unknown, fmt.Errorf("line %d: %s%s: no such key%s", key.Line, prefix, key.Value, didYouMean(key.Value, names)))
		default:
			lines[prefix+key.Value] = key.Line
			unknown = append(unknown, readKeys(value, field, prefix+key.Value+".", lines)...)
		}
	}
	return unknown
}

// fieldOf finds the type of a key, in any case as the decoder does, and the names of all keys of t.
func fieldOf(t reflect.Type, key string) (found reflect.Type, names []string) {
	for f := range t.NumField() {
		name, _, _ := strings.Cut(t.Field(f).Tag.Get("json"), ",")
		if names = append(names, name); strings.EqualFold(name, key) {
			found = t.Field(f).Type
		}
	}
	return found, names
}

func didYouMean(mistyped string, known []string) string {
	if key := nearest.Key(mistyped, known); key != "" {
		return "; did you mean " + key + "?"
	}
	return "; the keys here are " + strings.Join(known, ", ")
}

// wrongType is what encoding/json says of a value: of which Go type it is, and for which key.
var wrongType = regexp.MustCompile(`^cannot unmarshal (\S+)(?: \S+)? into Go struct field \w+\.(\S+) of type (\S+)`)

// withLine puts the line and the key before the decoder's message about a value.
func withLine(text string, lines map[string]int) string {
	m := wrongType.FindStringSubmatch(text)
	if m == nil {
		return text
	}
	article := "a"
	if strings.ContainsRune("ao", rune(m[1][0])) { // array, object
		article = "an"
	}
	text = fmt.Sprintf("%s: is %s %s, want %s", m[2], article, m[1], plainType(m[3]))
	if line := lines[m[2]]; line > 0 {
		text = fmt.Sprintf("line %d: %s", line, text)
	}
	return text
}

func plainType(t string) string {
	switch {
	case t == "int":
		return "a whole number"
	case t == "bool":
		return "true or false"
	case t == "string":
		return "a string"
	case strings.HasPrefix(t, "[]"), t == "config.CIDRs":
		return "a list"
	}
	return "other keys below it"
}

// severalDocuments reports whether a line of three dashes comes after content (YAML 1.2, section 9.2).
func severalDocuments(b []byte) bool {
	content := false
	for line := range strings.Lines(string(b)) {
		switch line = strings.TrimRight(line, " \t\r\n"); {
		case line == "---" || strings.HasPrefix(line, "--- "):
			if content {
				return true
			}
		case line != "" && line[0] != '#' && line[0] != '%':
			content = true
		}
	}
	return false
}

// plain removes the prefixes that the YAML library puts before its errors.
func plain(err error) string {
	s := err.Error()
	for _, p := range []string{"error unmarshaling JSON: ", "while decoding JSON: ", "error converting YAML to JSON: ", "json: "} {
		s = strings.TrimPrefix(s, p)
	}
	return s
}
