package jsonw

import (
	"encoding/json"
	"testing"
)

// TestAsEncodingJSON writes one document both ways.
func TestAsEncodingJSON(t *testing.T) {
	type inner struct {
		Name  string   `json:"name"`
		Index int      `json:"index,omitempty"`
		List  []string `json:"list,omitempty"`
		Text  string   `json:"text,omitempty"`
	}
	for _, s := range []string{"", "eth0", "a b", `"`, `\`, "\n\x00\x7f", "<&>", "ü", "\xff", "\u2028", "{", "[", ":", "},"} {
		want, err := json.Marshal([]inner{{Name: s, Index: -7, List: []string{s, ""}, Text: s}, {}})
		if err != nil {
			t.Fatal(err)
		}
		var w Writer
		w.Begin('[')
		for _, i := range []inner{{Name: s, Index: -7, List: []string{s, ""}, Text: s}, {}} {
			w.Begin('{')
			w.Key("name")
			w.String(i.Name)
			w.OptionalInt("index", int64(i.Index))
			w.OptionalStrings("list", i.List)
			w.OptionalString("text", i.Text)
			w.End('}')
		}
		w.End(']')
		if string(w.Bytes()) != string(want) {
			t.Errorf("got %s, want %s", w.Bytes(), want)
		}
	}
}
