package daemon

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"github.com/headcni/headcni/internal/atomicfile"
	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/kube/nodeview"
	"github.com/headcni/headcni/pkg/networking/noderoutes"
	"github.com/headcni/headcni/pkg/pathmtu"
	"github.com/headcni/headcni/pkg/policy/subnets"
	"github.com/headcni/headcni/pkg/tailscale"
)

// state is what the daemon must remember over its own restarts and reboots: what uninstall puts back, and what lets it
// program the node before tailscaled or a control server answers. It is written before the change that it describes.
type state struct {
	// Mode is the one that auto settled on; it must not change because a tailscaled is being restarted.
	Mode string `json:"mode,omitempty"`
	// TunName was the tun's when it was last seen.
	TunName string `json:"tunName,omitempty"`
	// TunMTU was the tun's when it was last seen, in bytes.
	TunMTU int `json:"tunMTU,omitempty"`
	// Path was the one that carries least.
	Path pathmtu.Path `json:"path,omitzero"`
	// Advertised are the CIDRs that we put into AdvertiseRoutes.
	Advertised []netip.Prefix `json:"advertised,omitempty"`
	// Prefs are the tailscaled prefs that we change, as found.
	Prefs *tailscale.SavedPrefs `json:"prefs,omitempty"`
	// Host are the sysctls that we change, as found.
	Host noderoutes.Saved `json:"host"`
	// ConflistMode is the file mode of the conflist that we replaced, 0 = there was none.
	ConflistMode os.FileMode `json:"conflistMode,omitempty"`
	// TakenBack is the fingerprint of the configuration that cut this node off from TakenBackFor, a host:port.
	TakenBack    string `json:"takenBack,omitempty"`
	TakenBackFor string `json:"takenBackFor,omitempty"`
	// Hidden are the names of other CNIs' configurations that cni.exclusive has hidden.
	Hidden []string `json:"hidden,omitempty"`
	// Members are the IPv4 addresses of the tailnet's other members.
	Members []netip.Addr `json:"members,omitempty"`
	// Subnets are networks behind devices of the tailnet.
	Subnets subnets.Known `json:"subnets,omitzero"`
	// Kubernetes is what it last said.
	Kubernetes nodeview.LastKnown `json:"kubernetes,omitzero"`
}

func statePath() string { return filepath.Join(paths.StateDir, "daemon.json") }

// loadState reads the state; none is an empty one.
func loadState() (state, error) {
	var s state
	b, err := os.ReadFile(statePath())
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err != nil {
		return s, fmt.Errorf("read the daemon's state: %w", err)
	}
	if err := json.Unmarshal(b, &s); err != nil {
		return s, fmt.Errorf("read the daemon's state %s: %w; move the file away to start afresh (uninstall then cannot put the "+
			"host's own settings back)", statePath(), err)
	}
	return s, nil
}

// save writes the state if it differs from have.
func (s state) save(have state) error {
	b, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	old, err := json.MarshalIndent(have, "", "  ")
	if err == nil && string(old) == string(b) {
		return nil
	}
	return atomicfile.Write(statePath(), append(b, '\n'), 0o600)
}

// clone makes a copy that shares nothing.
func (s state) clone() state {
	s.Advertised, s.Hidden = slices.Clone(s.Advertised), slices.Clone(s.Hidden)
	if s.Prefs != nil {
		p := *s.Prefs
		s.Prefs = &p
	}
	return s
}

// Settled is the mode of tailscaled that the daemon on this node has settled on, "" where it has not, and the node's ranges as Kubernetes said last.
func Settled() (mode string, own []netip.Prefix, err error) {
	s, err := loadState()
	return s.Mode, s.Kubernetes.PodCIDRs, err
}
