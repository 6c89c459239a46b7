package conflist

import (
	"encoding/json"
	"errors"
	"reflect"
	"slices"
)

// keepOthers returns want with the plugins and keys that other programs have added to have, a conflist of ours: meshes append
// themselves to the list that is there, and pods that start without them would be outside their mesh, silently. Our entry is
// ours, the others' entries and the order of all are theirs.
func keepOthers(have, want []byte) ([]byte, error) {
	var theirs, ours map[string]json.RawMessage
	var haveList, wantList list
	if err := errors.Join(json.Unmarshal(have, &theirs), json.Unmarshal(have, &haveList), json.Unmarshal(want, &ours), json.Unmarshal(want, &wantList)); err != nil {
		return nil, err
	}
	var plugins []json.RawMessage
	placed, others := false, false
	for _, raw := range haveList.Plugins {
		var p struct {
			Type string `json:"type"`
		}
		switch err := json.Unmarshal(raw, &p); {
		case err == nil && p.Type != pluginType:
			plugins, others = append(plugins, raw), true
		case !placed:
			plugins, placed = append(plugins, wantList.Plugins...), true
		}
	}
	if !placed { // somebody took ours out
		plugins = slices.Concat(wantList.Plugins, plugins)
	}
	for key, v := range theirs {
		if _, known := ours[key]; !known {
			ours[key], others = v, true
		}
	}
	if !others {
		return want, nil
	}
	var err error
	if ours["plugins"], err = json.Marshal(plugins); err != nil {
		return nil, err
	}
	b, err := json.MarshalIndent(ours, "", "  ")
	return append(b, '\n'), err
}

// sameJSON reports whether two texts say the same, however they are written.
func sameJSON(a, b []byte) bool {
	var x, y any
	return json.Unmarshal(a, &x) == nil && json.Unmarshal(b, &y) == nil && reflect.DeepEqual(x, y)
}
