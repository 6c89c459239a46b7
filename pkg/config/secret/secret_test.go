package secret_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"github.com/headcni/headcni/pkg/config/secret"
)

func TestNeverPrinted(t *testing.T) {
	const value = "hskey-api-abcdef"
	type holder struct {
		Key secret.Secret `json:"key"`
		Ptr *secret.Secret
	}
	s := secret.New(value)
	h := holder{Key: s, Ptr: &s}
	var out bytes.Buffer
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d", "%T"} {
		fmt.Fprintf(&out, verb, s)
		fmt.Fprintf(&out, verb, h)
		fmt.Fprintf(&out, verb, &h)
	}
	for _, hd := range []slog.Handler{slog.NewTextHandler(&out, nil), slog.NewJSONHandler(&out, nil)} {
		slog.New(hd).Info("x", "secret", s, "holder", h, "ptr", &h)
	}
	j, err := json.Marshal(h)
	if err != nil {
		t.Fatal(err)
	}
	y, err := yaml.Marshal(h)
	if err != nil {
		t.Fatal(err)
	}
	out.Write(j)
	out.Write(y)
	if strings.Contains(out.String(), value) || strings.Contains(out.String(), fmt.Sprintf("%x", value)) {
		t.Errorf("the value was printed:\n%s", out.String())
	}
	if !strings.Contains(out.String(), "***") {
		t.Errorf("no mask in:\n%s", out.String())
	}
}

func TestUnmarshal(t *testing.T) {
	var s secret.Secret
	if err := json.Unmarshal([]byte(`"abc"`), &s); err != nil || s.Reveal() != "abc" || s.Empty() {
		t.Errorf("got %q, %v", s.Reveal(), err)
	}
	if err := json.Unmarshal([]byte(`["hidden"]`), &s); err == nil || strings.Contains(err.Error(), "hidden") {
		t.Errorf("want an error without the input, got %v", err)
	}
}
