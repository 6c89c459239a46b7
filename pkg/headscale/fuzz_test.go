package headscale

import (
	"strings"
	"testing"
	"unicode"

	"github.com/headcni/headcni/pkg/config/secret"
)

// FuzzAnswer: whatever comes back with a 200, it is an error or it is what was asked for.
func FuzzAnswer(f *testing.F) {
	for _, s := range []string{`{"nodes":[]}`, `{"node":{"id":"1","nodeKey":"nodekey:a","ipAddresses":["100.64.0.1"],"approvedRoutes":["10.0.0.0/8"],"expiry":null}}`,
		`{"policy":"{}"}`, `{"node":null}`, `{"node":{"id":-1}}`, `[]`, `{"node":{"id":"18446744073709551616"}}`, "{\"node\":7}"} {
		f.Add([]byte(s))
	}
	c := &Client{base: "http://hs"}
	f.Fuzz(func(t *testing.T, b []byte) {
		var w wireNode
		if c.decode(b, call{field: "node", out: &w}) == nil {
			if n, err := w.node(); err == nil && (n.ID == 0 || n.NodeKey == "") {
				t.Errorf("%+v", n)
			}
		}
		var list []wireNode
		if c.decode(b, call{field: "nodes", out: &list}) == nil && !strings.Contains(strings.ToLower(string(b)), "nodes") && !strings.Contains(string(b), `\u`) {
			t.Errorf("nodes out of %s", b)
		}
	})
}

// FuzzRefusal: whatever comes back with another status is an error of one line that people can be shown, without the key.
func FuzzRefusal(f *testing.F) {
	f.Add(404, []byte(`{"code":5,"message":"node not found"}`), false)
	f.Add(500, []byte("Unauthorized"), false)
	f.Add(422, []byte(`{"title":"a","detail":"b\u001b[2J","errors":[{"message":"c","location":"d"}]}`), true)
	f.Add(400, []byte("\x1b]0;x\x07<html>\n"+testKey), true)
	c := &Client{base: "http://hs", key: secret.New(testKey)}
	f.Fuzz(func(t *testing.T, status int, b []byte, list bool) {
		err := c.refusal(status, b, list)
		if err == nil {
			t.Fatal("no error")
		}
		text := err.Error()
		if strings.Contains(text, testKey) || len(text) > 1000 || strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) }) {
			t.Errorf("%q", text)
		}
	})
}
