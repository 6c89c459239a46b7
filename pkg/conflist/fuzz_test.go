package conflist

import (
	"encoding/json"
	"testing"
)

// FuzzKeepOthers: whatever stands in the file, the result is refused or it is a list with our plugin in it once, as we want it.
func FuzzKeepOthers(f *testing.F) {
	want := []byte(`{"cniVersion":"1.1.0","name":"headcni","plugins":[{"type":"headcni","gate":{"podCIDRs":["10.244.1.0/24"]}}]}`)
	for _, s := range []string{string(want), `{}`, `{"plugins":[]}`, `{"plugins":[{"type":"istio-cni"},{"type":"headcni"},{"type":"headcni"},null,7]}`, `{"plugins":null}`, `{"name":"x","more":[1]}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, have []byte) {
		b, err := keepOthers(have, want)
		if err != nil {
			return
		}
		var l list
		if err := json.Unmarshal(b, &l); err != nil {
			t.Fatalf("%v: %s", err, b)
		}
		ours := 0
		for _, raw := range l.Plugins {
			var p struct {
				Type string `json:"type"`
			}
			if json.Unmarshal(raw, &p) == nil && p.Type == pluginType {
				ours++
			}
		}
		if ours != 1 {
			t.Errorf("our plugin stands there %d times: %s", ours, b)
		}
		if again, err := keepOthers(b, want); err != nil || !sameJSON(again, b) {
			t.Errorf("not the same the second time: %v\n%s\n%s", err, b, again)
		}
	})
}
