package chart

import (
	"encoding/json"
	"maps"
	"os"
	"path"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"sigs.k8s.io/yaml"

	"github.com/headcni/headcni/internal/golden"
	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/config/secret"
)

type schema map[string]any

// allowed are the keys of config.* with few values, as Validate has them; TestSchemaAgreesWithValidate holds both together.
var allowed = map[string][]any{
	"tailscale.mode":                 {"auto", "host", "daemon"},
	"network.tailnetEgress":          {"masquerade", "preserve", "deny"},
	"network.tailnetSubnets":         {"deny", "allow"},
	"network.policyStartup":          {"strict", "open"},
	"network.fastPath":               {"auto", "off"},
	"network.peerMTU":                {"auto", "off"},
	"ipam.strategy":                  {"sequential", "random", "dense-pack"},
	"network.advertiseServices.only": {"", "named"},
	"logging.level":                  {"debug", "info", "warn", "error"},
	"logging.format":                 {"text", "json"},
}

// free are the parts of values.yaml outside config that are Kubernetes' own types, or the user's own keys.
var free = []string{
	"security.*", "*.nodeSelector", "*.affinity", "*.resources", "monitoring.*.labels",
}

func isFree(key string) bool {
	return slices.ContainsFunc(free, func(pattern string) bool {
		ok, err := path.Match(strings.ReplaceAll(pattern, ".", "/"), strings.ReplaceAll(key, ".", "/"))
		return err == nil && ok
	})
}

// manifold are values that may be of several types.
var manifold = map[string]schema{
	"podLabels":              {"type": "object", "additionalProperties": schema{"type": "string"}},
	"podAnnotations":         {"type": "object", "additionalProperties": schema{"type": "string"}},
	"daemon.maxUnavailable":  {"type": []string{"integer", "string"}},
	"kubernetes.servicePort": {"type": []string{"integer", "string"}},
	"controller.replicas":    {"type": []string{"integer", "null"}, "minimum": 0},
	"image.pullPolicy":       {"enum": []any{"Always", "IfNotPresent", "Never"}},
}

// ofType is the schema of daemon.yaml's Go type.
func ofType(key string, t reflect.Type) schema {
	if values, ok := allowed[key]; ok {
		return schema{"enum": values}
	}
	switch {
	case t == reflect.TypeFor[secret.Secret]():
		return schema{"type": "string"}
	case t == reflect.TypeFor[config.Tristate]():
		return schema{"enum": []any{"auto", "true", "false", true, false}}
	case t.Kind() == reflect.Struct:
		properties := schema{}
		for i := range t.NumField() {
			name, _, _ := strings.Cut(t.Field(i).Tag.Get("json"), ",")
			properties[name] = ofType(strings.TrimPrefix(key+"."+name, "."), t.Field(i).Type)
		}
		return object(properties)
	case t.Kind() == reflect.Slice:
		return schema{"type": "array", "items": ofType(key, t.Elem())}
	case t.Kind() == reflect.Map:
		return schema{"type": "object", "additionalProperties": ofType(key, t.Elem())}
	case t.Kind() == reflect.Bool:
		return schema{"type": "boolean"}
	case t.Kind() == reflect.Int:
		return schema{"type": "integer", "minimum": 0, "maximum": 65535}
	case t.Kind() == reflect.String:
		return schema{"type": "string"}
	}
	panic("config." + key + ": no schema for " + t.String())
}

// ofValue is the schema of what values.yaml has outside config.
func ofValue(key string, v any) schema {
	if s, ok := manifold[key]; ok {
		return s
	}
	switch v := v.(type) {
	case map[string]any:
		if isFree(key) {
			return schema{"type": "object"}
		}
		properties := schema{}
		for name, inner := range v {
			properties[name] = ofValue(strings.TrimPrefix(key+"."+name, "."), inner)
		}
		return object(properties)
	case []any:
		return schema{"type": "array", "items": schema{"type": "object"}}
	case bool:
		return schema{"type": "boolean"}
	case string:
		return schema{"type": "string"}
	}
	panic("values.yaml: " + key + ": no schema for its type")
}

// object is a block, of which anything may be null: the templates put the default in.
func object(properties schema) schema {
	for name, p := range properties {
		properties[name] = orNull(p.(schema))
	}
	return schema{"type": "object", "properties": properties, "additionalProperties": false}
}

func orNull(s schema) schema {
	out := maps.Clone(s)
	switch t := s["type"].(type) {
	case string:
		out["type"] = []string{t, "null"}
	case []string:
		out["type"] = slices.Compact(append(slices.Clone(t), "null"))
	}
	if values, ok := s["enum"].([]any); ok {
		out["enum"] = append(slices.Clone(values), nil)
	}
	return out
}

func TestSchema(t *testing.T) {
	values := readValues(t)
	delete(values, "config")
	whole := ofValue("", values)
	properties := whole["properties"].(schema)
	properties["config"] = orNull(ofType("", reflect.TypeFor[config.Config]()))
	properties["global"] = schema{"type": "object"} // Helm's own
	whole["$schema"] = "http://json-schema.org/draft-07/schema#"
	whole["title"] = "Values of the HeadCNI chart; config.* is daemon.yaml"
	b, err := json.MarshalIndent(whole, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	golden.Check(t, chartDir+"/values.schema.json", string(b)+"\n")
}

// TestSchemaAgreesWithValidate: what the schema lets through of the keys with few values is what the daemon takes.
func TestSchemaAgreesWithValidate(t *testing.T) {
	for key, values := range allowed {
		for _, v := range append(slices.Clone(values), "no such thing") {
			c := config.Default()
			if err := c.Set(key, v.(string)); err != nil {
				t.Fatal(err)
			}
			if err := c.Validate(); (err == nil) != (v != "no such thing") {
				t.Errorf("%s=%s: %v", key, v, err)
			}
		}
	}
}

// TestValuesAreTheDefaults: values.yaml has every key of daemon.yaml with the daemon's default, but where it says so.
func TestValuesAreTheDefaults(t *testing.T) {
	values := readValues(t)
	b, err := yaml.Marshal(values["config"])
	if err != nil {
		t.Fatal(err)
	}
	var tree map[string]any
	if err := yaml.Unmarshal(b, &tree); err != nil {
		t.Fatal(err)
	}
	for _, key := range config.Keys() {
		if !has(tree, strings.Split(key, ".")) {
			t.Errorf("values.yaml lacks config.%s", key)
		}
	}
	got := config.Config{}
	if err := yaml.UnmarshalStrict(b, &got); err != nil {
		t.Fatal(err)
	}
	want := config.Default()
	want.Monitoring.Listen = ":9669"
	if diff := cmp.Diff(strings.ReplaceAll(want.String(), ": null", ": []"), got.String()); diff != "" {
		t.Errorf("config in values.yaml (-daemon +chart):\n%s", diff)
	}
	text, err := os.ReadFile(chartDir + "/values.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(text), "# Not the daemon's default"); n != 1 {
		t.Errorf("%d values are said to differ from the daemon's, want 1", n)
	}
}

func has(tree map[string]any, key []string) bool {
	v, ok := tree[key[0]]
	if !ok || len(key) == 1 {
		return ok
	}
	inner, ok := v.(map[string]any)
	return ok && has(inner, key[1:])
}
