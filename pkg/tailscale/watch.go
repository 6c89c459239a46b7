package tailscale

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"
)

// Bits of the bus's mask (ipn.NotifyWatchOpt). A tailscaled ignores those that it does not know.
const (
	notifyInitialState  = 1 << 1
	notifyInitialPrefs  = 1 << 2
	notifyInitialHealth = 1 << 7
	notifyPeerChanges   = 1 << 12 // 1.98
	// notifyPeerPatches keeps changes of endpoints and online state, which are many, from coming as whole peers.
	notifyPeerPatches   = 1 << 15
	notifyPeerWireGuard = 1 << 18 // 1.102
)

// Numbers of the backend states on the bus (ipn.State); the status has their names.
const (
	stateNeedsLogin       = 2
	stateNeedsMachineAuth = 3
	stateStarting         = 5
	stateRunning          = 6
)

var stateNames = []string{NoState, "InUseOtherUser", NeedsLogin, NeedsMachineAuth, Stopped, Starting, Running}

// reconnectDelay is between two tries to open the bus. A connect to a dead Unix socket costs microseconds, and a
// restarted tailscaled shall not wait for us.
const reconnectDelay = 50 * time.Millisecond

// notify is ipn.Notify as far as it is used.
type notify struct {
	ErrMessage   *string
	State        *int
	BrowseToURL  *string
	Prefs        present
	SelfChange   present
	PeersChanged present
	PeersRemoved present
	// PeerChangedPatch is what has changed of peers that are told of in part.
	PeerChangedPatch []wirePeerPatch
	// NetMap comes from tailscaled before 1.100 with every change.
	NetMap    present
	Health    *wireHealth
	PeerState map[string]wirePeerState
}

type wirePeerState struct {
	PeerWireGuardState   string
	PeerWireGuardStateAt time.Time
}

// wirePeerPatch is tailcfg.PeerChange as far as it is used.
type wirePeerPatch struct {
	Online *bool // nil where it did not change
}

// wireHealth is health.State as far as it is used.
type wireHealth struct {
	Warnings map[string]struct {
		Title, Text string
		Args        map[string]string
	}
}

// present is whether a field was there, without its value.
type present bool

// UnmarshalJSON implements json.Unmarshaler.
func (p *present) UnmarshalJSON(b []byte) error {
	*p = string(b) != "null"
	return nil
}

// bus is one open connection to the notifications.
type bus struct {
	body   io.Closer
	cancel context.CancelCauseFunc
	dec    *json.Decoder
}

// openBus subscribes. The bus lives until ctx ends or it is closed.
func (c *Client) openBus(ctx context.Context, mask int) (*bus, error) {
	// The header comes at once; the timer ends a tailscaled that accepts and then hangs.
	ctx, cancel := context.WithCancelCause(ctx)
	timer := time.AfterFunc(callTimeout, func() { cancel(errors.New("no answer in time")) })
	res, err := c.request(ctx, http.MethodGet, "watch-ipn-bus?mask="+strconv.Itoa(mask), nil)
	if err == nil && !timer.Stop() {
		res.Body.Close()
		err = context.Cause(ctx)
	}
	if err != nil {
		timer.Stop()
		cancel(nil)
		return nil, fmt.Errorf("watch tailscaled: %w", err)
	}
	return &bus{body: res.Body, cancel: cancel, dec: json.NewDecoder(res.Body)}, nil
}

func (b *bus) next() (notify, error) {
	var n notify
	if err := b.dec.Decode(&n); err != nil {
		return n, fmt.Errorf("read tailscaled's notifications: %w", err)
	}
	return n, nil
}

func (b *bus) close() {
	b.cancel(nil)
	_ = b.body.Close() // it is only read from
}

// follow keeps a bus open until ctx ends: opened is called with each new one, lost when it ends.
func (c *Client) follow(ctx context.Context, mask int, each func(first bool, n notify), lost func(error)) error {
	for {
		err := c.followOnce(ctx, mask, each)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		lost(err)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(reconnectDelay):
		}
	}
}

func (c *Client) followOnce(ctx context.Context, mask int, each func(first bool, n notify)) error {
	b, err := c.openBus(ctx, mask)
	if err != nil {
		return err
	}
	defer b.close()
	for first := true; ; first = false {
		n, err := b.next()
		if err != nil {
			return err
		}
		each(first, n)
	}
}

// Event is a change in tailscaled.
type Event struct {
	// Connected is true on the first event of a connection: everything may have changed.
	Connected bool
	// Lost is why there is no connection, nil while there is one. It comes once per loss.
	Lost error
	// State is the new backend state, "" where it did not change.
	State string
	// Prefs tells that the prefs changed.
	Prefs bool
	// Peers tells that peers came, went or changed, or this node itself did; not that their endpoints or their
	// online state did.
	Peers bool
}

// Watch calls each for every change in tailscaled until ctx ends, reconnecting by itself. It returns ctx's error. each
// must return soon: tailscaled closes a bus whose reader does not keep up.
func (c *Client) Watch(ctx context.Context, each func(Event)) error {
	down := false
	return c.follow(ctx, notifyInitialState|notifyInitialPrefs|notifyPeerChanges|notifyPeerPatches, func(first bool, n notify) {
		down = false
		e := Event{
			Connected: first, Prefs: bool(n.Prefs),
			Peers: bool(n.SelfChange || n.PeersChanged || n.PeersRemoved || n.NetMap),
		}
		if n.State != nil && *n.State >= 0 && *n.State < len(stateNames) {
			e.State = stateNames[*n.State]
		}
		if e != (Event{}) {
			each(e)
		}
	}, func(err error) {
		if !down {
			each(Event{Lost: err})
		}
		down = true
	})
}
