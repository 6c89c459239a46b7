package jsonobj

import (
	"encoding/json"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestNullIsNotGiven(t *testing.T) {
	o, err := Parse([]byte(`{"a": null, "b": [null], "c": "null", "d": {"e": null}}`))
	want := Object{"a": nil, "b": json.RawMessage(`[null]`), "c": json.RawMessage(`"null"`), "d": json.RawMessage(`{"e": null}`)}
	if diff := cmp.Diff(want, o); err != nil || diff != "" {
		t.Errorf("%v %s", err, diff)
	}
	if _, ok := o["a"]; !ok {
		t.Error("that the key was there is lost")
	}
	var sets [][]Object
	if err := json.Unmarshal([]byte(`[[{"a": null, "b": 1}, null], null]`), &sets); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([][]Object{{{"a": nil, "b": json.RawMessage("1")}, nil}, nil}, sets); diff != "" {
		t.Error(diff)
	}
	if b, err := json.Marshal(o); err != nil || string(b) != `{"a":null,"b":[null],"c":"null","d":{"e":null}}` {
		t.Errorf("written again: %s, %v", b, err)
	}
}

func TestNoObject(t *testing.T) {
	if o, err := Parse([]byte("null")); err != nil || o != nil {
		t.Errorf("null: %v, %v", o, err)
	}
	for _, text := range []string{"", "{", "[]", "7", "{}{}"} {
		if o, err := Parse([]byte(text)); err == nil {
			t.Errorf("%q passes as %v", text, o)
		}
	}
}
