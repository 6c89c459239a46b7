package tailscale

import (
	"encoding/json"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestMergeRoutes(t *testing.T) {
	for name, tt := range map[string]struct{ have, add, drop, want []netip.Prefix }{
		"nothing":                  {},
		"first":                    {add: prefixes("10.244.1.0/24"), want: prefixes("10.244.1.0/24")},
		"there already":            {have: prefixes("10.244.1.0/24"), add: prefixes("10.244.1.0/24")},
		"the user's stays first":   {have: prefixes("0.0.0.0/0", "::/0"), add: prefixes("10.244.1.0/24"), want: prefixes("0.0.0.0/0", "::/0", "10.244.1.0/24")},
		"stale goes":               {have: prefixes("10.244.1.0/24", "192.168.0.0/24"), add: prefixes("10.244.2.0/24"), drop: prefixes("10.244.1.0/24"), want: prefixes("192.168.0.0/24", "10.244.2.0/24")},
		"wanted wins over dropped": {have: prefixes("10.244.1.0/24"), add: prefixes("10.244.1.0/24"), drop: prefixes("10.244.1.0/24")},
		"emptied is not unchanged": {have: prefixes("10.244.1.0/24"), drop: prefixes("10.244.1.0/24"), want: []netip.Prefix{}},
		"dropped was not there":    {have: prefixes("192.168.0.0/24"), drop: prefixes("10.244.1.0/24")},
		"a narrower one is not it": {have: prefixes("10.244.1.0/25"), drop: prefixes("10.244.1.0/24")},
	} {
		t.Run(name, func(t *testing.T) {
			got := mergeRoutes(tt.have, tt.add, tt.drop)
			if diff := cmp.Diff(tt.want, got, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestPlanPrefs(t *testing.T) {
	yes, no := true, false
	good := Prefs{RouteAll: true, NoSNAT: true, NoStatefulFiltering: &yes, CorpDNS: true}
	for name, tt := range map[string]struct {
		have Prefs
		spec PrefsSpec
		want string
	}{
		"all right":               {good, PrefsSpec{}, `null`},
		"fresh":                   {Prefs{}, PrefsSpec{}, `{"NoSNAT":true,"NoSNATSet":true,"NoStatefulFiltering":true,"NoStatefulFilteringSet":true,"RouteAll":true,"RouteAllSet":true}`},
		"explicitly stateful":     {Prefs{RouteAll: true, NoSNAT: true, NoStatefulFiltering: &no}, PrefsSpec{}, `{"NoStatefulFiltering":true,"NoStatefulFilteringSet":true}`},
		"accept-dns left alone":   {good, PrefsSpec{CorpDNS: nil}, `null`},
		"accept-dns switched off": {good, PrefsSpec{CorpDNS: &no}, `{"CorpDNS":false,"CorpDNSSet":true}`},
		"accept-dns as wanted":    {good, PrefsSpec{CorpDNS: &yes}, `null`},
		"route":                   {good, PrefsSpec{AdvertiseRoutes: prefixes("10.244.1.0/24")}, `{"AdvertiseRoutes":["10.244.1.0/24"],"AdvertiseRoutesSet":true}`},
	} {
		t.Run(name, func(t *testing.T) {
			e := planPrefs(tt.have, tt.spec)
			got, err := json.Marshal(e.fields)
			if err != nil || string(got) != tt.want {
				t.Errorf("got %s, %v\nwant %s", got, err, tt.want)
			}
			if (len(e.changes) == 0) != (tt.want == "null") {
				t.Errorf("changes: %q", e.changes)
			}
		})
	}
}

// TestRestore applies what we want and takes it back: the prefs must be as found.
func TestRestore(t *testing.T) {
	yes, no := true, false
	spec := PrefsSpec{AdvertiseRoutes: prefixes("10.244.1.0/24"), CorpDNS: &no}
	for name, found := range map[string]Prefs{
		"fresh":          {CorpDNS: true, NoStatefulFiltering: &yes},
		"unset":          {},
		"subnet router":  {RouteAll: true, NoStatefulFiltering: &no, AdvertiseRoutes: prefixes("192.168.0.0/24")},
		"the same route": {AdvertiseRoutes: prefixes("10.244.1.0/24", "192.168.0.0/24")},
		"as we want":     {RouteAll: true, NoSNAT: true, NoStatefulFiltering: &yes},
	} {
		t.Run(name, func(t *testing.T) {
			now := applyEdit(t, found, planPrefs(found, spec))
			if e := planPrefs(now, spec); len(e.changes) != 0 {
				t.Errorf("not stable: %q", e.changes)
			}
			b, err := json.Marshal(found.Saved(spec)) // the daemon keeps it on disk
			if err != nil {
				t.Fatal(err)
			}
			var saved SavedPrefs
			if err := json.Unmarshal(b, &saved); err != nil {
				t.Fatal(err)
			}
			after := applyEdit(t, now, planRestore(now, saved, spec.AdvertiseRoutes))
			if len(after.AdvertiseRoutes) == 0 {
				after.AdvertiseRoutes = nil
			}
			if diff := cmp.Diff(found, after, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// applyEdit is what tailscaled does with masked prefs.
func applyEdit(t *testing.T, p Prefs, e *edit) Prefs {
	t.Helper()
	b, err := json.Marshal(e.fields)
	if err != nil {
		t.Fatal(err)
	}
	if p.NoStatefulFiltering != nil {
		v := *p.NoStatefulFiltering
		p.NoStatefulFiltering = &v // decoding writes through the pointer
	}
	if err := json.Unmarshal(b, &p); err != nil {
		t.Fatal(err)
	}
	return p
}

func TestSavedExitNode(t *testing.T) {
	if !(Prefs{ExitNodeIP: "100.64.0.9"}).Saved(PrefsSpec{}).ExitNode || (Prefs{}).Saved(PrefsSpec{}).ExitNode {
		t.Error("exit node")
	}
}
