package tailscale

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/headcni/headcni/pkg/findings"
)

// Prefs are the tailscaled prefs that concern us (ipn.Prefs).
type Prefs struct {
	ControlURL      string
	RouteAll        bool
	CorpDNS         bool
	WantRunning     bool
	LoggedOut       bool
	Hostname        string
	AdvertiseRoutes []netip.Prefix
	NoSNAT          bool
	// NoStatefulFiltering is an opt.Bool: true, false or null, which means unset.
	NoStatefulFiltering *bool
	// ShieldsUp has tailscaled drop whatever peers begin, also towards pods. It is the user's own wish, and never changed.
	ShieldsUp  bool
	ExitNodeID string
	// ExitNodeIP is "" or an address.
	ExitNodeIP string
}

// PrefsSpec is what we want of tailscaled's prefs. RouteAll, NoSNAT and NoStatefulFiltering are always wanted true:
// without the first there are no routes to other nodes' pods, without the second pods lose their source address, without
// the third what pods send to remote pods is dropped.
type PrefsSpec struct {
	// AdvertiseRoutes are our own prefixes, merged into what the user advertises.
	AdvertiseRoutes []netip.Prefix
	// DropRoutes are prefixes that we advertised before. They go, unless they are in AdvertiseRoutes.
	DropRoutes []netip.Prefix
	// CorpDNS is accept-dns; nil leaves it as it is.
	CorpDNS *bool
}

// SavedPrefs are the prefs that EnsurePrefs changes, as found before the first change, for RestorePrefs.
type SavedPrefs struct {
	RouteAll            bool  `json:"routeAll"`
	NoSNAT              bool  `json:"noSNAT"`
	NoStatefulFiltering *bool `json:"noStatefulFiltering"`
	// CorpDNS is nil where we do not set it.
	CorpDNS *bool `json:"corpDNS,omitempty"`
	// ExitNode tells that an exit node was chosen. It is for the caller's decisions; we never change it.
	ExitNode bool `json:"exitNode,omitempty"`
	// Routes are those of AdvertiseRoutes that the user advertised too, so that they stay when we go.
	Routes []netip.Prefix `json:"routes,omitempty"`
}

// Saved picks what RestorePrefs needs after spec has been applied to p.
func (p Prefs) Saved(spec PrefsSpec) SavedPrefs {
	s := SavedPrefs{
		RouteAll: p.RouteAll, NoSNAT: p.NoSNAT, NoStatefulFiltering: p.NoStatefulFiltering,
		ExitNode: p.ExitNodeID != "" || p.ExitNodeIP != "",
	}
	if spec.CorpDNS != nil {
		s.CorpDNS = &p.CorpDNS
	}
	for _, r := range spec.AdvertiseRoutes {
		if slices.Contains(p.AdvertiseRoutes, r) {
			s.Routes = append(s.Routes, r)
		}
	}
	return s
}

// Prefs reads tailscaled's prefs.
func (c *Client) Prefs(ctx context.Context) (Prefs, error) {
	var p Prefs
	if err := c.call(ctx, "GET", "prefs", nil, &p); err != nil {
		return p, fmt.Errorf("read tailscaled's prefs: %w", err)
	}
	return p, nil
}

// EnsurePrefs reads the prefs, merges ours in and writes only what differs. It says what it changed, such as
// "RouteAll=true". Shields that are up are an error. It works before the login too. Two writers at once can undo each other's routes, as with every client of
// tailscaled; the next pass sees it.
func (c *Client) EnsurePrefs(ctx context.Context, spec PrefsSpec) (changed []string, err error) {
	have, err := c.Prefs(ctx)
	if err != nil {
		return nil, err
	}
	e := planPrefs(have, spec)
	if err := c.edit(ctx, e); err != nil {
		return nil, fmt.Errorf("set tailscaled's prefs %s: %w", strings.Join(e.changes, ", "), err)
	}
	if have.ShieldsUp {
		return e.changes, errShieldsUp
	}
	return e.changes, nil
}

var errShieldsUp = findings.New(findings.ShieldsUp, "tailscaled's shields are up: it drops what other nodes' pods begin towards pods of this node; "+
	"run `tailscale set --shields-up=false`")

// RestorePrefs puts saved back and takes own out of AdvertiseRoutes, but for those that the user advertised too. What
// the user has changed since then in a pref that we set is not ours to know: the saved value wins.
func (c *Client) RestorePrefs(ctx context.Context, saved SavedPrefs, own []netip.Prefix) error {
	have, err := c.Prefs(ctx)
	if err != nil {
		return err
	}
	e := planRestore(have, saved, own)
	if err := c.edit(ctx, e); err != nil {
		return fmt.Errorf("put tailscaled's prefs back: %s: %w", strings.Join(e.changes, ", "), err)
	}
	return nil
}

// edit writes a plan; one without changes is not sent.
func (c *Client) edit(ctx context.Context, e *edit) error {
	if len(e.changes) == 0 {
		return nil
	}
	return c.call(ctx, "PATCH", "prefs", e.fields, nil)
}

// edit is an ipn.MaskedPrefs: fields that have their <name>Set beside them are written, all others stay.
type edit struct {
	fields  map[string]any
	changes []string
}

func (e *edit) set(name string, v any) {
	if e.fields == nil {
		e.fields = map[string]any{}
	}
	e.fields[name], e.fields[name+"Set"] = v, true
	text, _ := json.Marshal(v) // plain values only
	e.changes = append(e.changes, name+"="+string(text))
}

// planPrefs says what to write so that have satisfies spec. It does no I/O.
func planPrefs(have Prefs, spec PrefsSpec) *edit {
	e := &edit{}
	if routes := mergeRoutes(have.AdvertiseRoutes, spec.AdvertiseRoutes, spec.DropRoutes); routes != nil {
		e.set("AdvertiseRoutes", routes)
	}
	if !have.RouteAll {
		e.set("RouteAll", true)
	}
	if !have.NoSNAT {
		e.set("NoSNAT", true)
	}
	if have.NoStatefulFiltering == nil || !*have.NoStatefulFiltering {
		e.set("NoStatefulFiltering", true)
	}
	if spec.CorpDNS != nil && have.CorpDNS != *spec.CorpDNS {
		e.set("CorpDNS", *spec.CorpDNS)
	}
	return e
}

// planRestore says what to write so that have is as it was found. It does no I/O.
func planRestore(have Prefs, saved SavedPrefs, own []netip.Prefix) *edit {
	e := &edit{}
	if routes := mergeRoutes(have.AdvertiseRoutes, saved.Routes, own); routes != nil {
		e.set("AdvertiseRoutes", routes)
	}
	if have.RouteAll != saved.RouteAll {
		e.set("RouteAll", saved.RouteAll)
	}
	if have.NoSNAT != saved.NoSNAT {
		e.set("NoSNAT", saved.NoSNAT)
	}
	if h, s := have.NoStatefulFiltering, saved.NoStatefulFiltering; (h == nil) != (s == nil) || h != nil && *h != *s {
		e.set("NoStatefulFiltering", s)
	}
	if saved.CorpDNS != nil && have.CorpDNS != *saved.CorpDNS {
		e.set("CorpDNS", *saved.CorpDNS)
	}
	return e
}

// mergeRoutes adds add to have and takes drop away, keeping the user's own and their order. It returns nil where nothing
// changes, so an emptied list is not nil.
func mergeRoutes(have, add, drop []netip.Prefix) []netip.Prefix {
	out := make([]netip.Prefix, 0, len(have)+len(add))
	for _, r := range have {
		if !slices.Contains(drop, r) || slices.Contains(add, r) {
			out = append(out, r)
		}
	}
	for _, r := range add {
		if !slices.Contains(out, r) {
			out = append(out, r)
		}
	}
	if slices.Equal(out, have) {
		return nil
	}
	return out
}
