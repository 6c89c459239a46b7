package tailscale

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"time"

	"github.com/headcni/headcni/pkg/config/secret"
	"github.com/headcni/headcni/pkg/findings"
)

const (
	// loginTimeout bounds Login where the caller's context does not. Joining takes 1-4 s.
	loginTimeout = 30 * time.Second
	// loginPatience is how long Login lets tailscaled try a control server that does not answer. tailscaled goes on by
	// itself afterwards.
	loginPatience = 8 * time.Second
	// defaultControlURL is what an empty ControlURL means to tailscaled.
	defaultControlURL = "https://controlplane.tailscale.com"
)

// What Login's errors are to be told apart by.
var (
	// ErrKeyRefused means that the control server does not take the key.
	ErrKeyRefused = findings.New(findings.JoinKeyRefused, "the control server refuses the key")
	// ErrControl means that the control server cannot be reached or fails.
	ErrControl = findings.New(findings.HeadscaleUnreached, "the control server does not answer")
	// ErrNeedsKey means that tailscaled is not logged in and there is no key to do it with.
	ErrNeedsKey = findings.New(findings.NoKey, "tailscaled is not logged in and there is no key to join with")
	// ErrOtherControl means that tailscaled is logged in somewhere else.
	ErrOtherControl = findings.New(findings.OtherControl, "tailscaled is logged in to another control server")
)

// LoginOptions say how to join.
type LoginOptions struct {
	// ControlURL of Headscale, such as https://headscale.example.com.
	ControlURL string
	// AuthKey is a pre-auth key. It may be empty where tailscaled is logged in.
	AuthKey secret.Secret
	// Hostname is the wanted name in the tailnet; "" leaves tailscaled's own choice.
	Hostname string
	// Move takes over a tailscaled that is logged in to another ControlURL: Headscale has moved. It needs a key. Only for
	// a tailscaled that is ours; without Move that is ErrOtherControl.
	Move bool
	// Again joins although tailscaled says that it is in: the control server has forgotten the node.
	Again bool
}

// Login makes tailscaled a running member of the tailnet at ControlURL. One that is already does not notice. A
// tailscaled that was stopped (tailscale down) is started.
//
// A refusal by the control server is returned as soon as it is known, an unreachable one after some seconds, while
// tailscaled goes on trying with what it was given. The key goes through the socket, never through arguments or logs.
func (c *Client) Login(ctx context.Context, o LoginOptions) error {
	ctx, cancel := context.WithTimeout(ctx, loginTimeout)
	defer cancel()
	if err := c.login(ctx, o); err != nil {
		return fmt.Errorf("join the tailnet at %s: %w", o.ControlURL, redact(err, o.AuthKey))
	}
	return nil
}

func (c *Client) login(ctx context.Context, o LoginOptions) error {
	st, err := c.StatusWithoutPeers(ctx)
	if err != nil {
		return err
	}
	prefs, err := c.Prefs(ctx)
	if err != nil {
		return err
	}
	step, err := planLogin(st, prefs, o)
	if err != nil || step == loginNone {
		return err
	}
	// The bus first, or a quick answer could pass unseen.
	watch, stop := context.WithCancel(ctx)
	defer stop()
	bus, err := c.openBus(watch, notifyInitialState|notifyInitialHealth)
	if err != nil {
		return err
	}
	defer bus.close()
	if step == loginUp {
		err = c.edit(ctx, loginPrefs(prefs, o))
	} else {
		err = c.start(ctx, o)
	}
	if err != nil {
		return err
	}
	// A tailscaled that has been in a tailnet says Running at once, from its old network map. A new start makes a new
	// node key, and the map that has it is a new one.
	oldKey := ""
	if step == loginStart && st.HaveNodeKey {
		oldKey = st.Self.NodeKey
	}
	return c.awaitRunning(ctx, bus, oldKey)
}

// start gives tailscaled a new control client with the key. The prefs go along with it, as `tailscale up` does it:
// written beforehand, WantRunning would make the old client ask for an interactive login.
func (c *Client) start(ctx context.Context, o LoginOptions) error {
	var all map[string]json.RawMessage
	if err := c.call(ctx, "GET", "prefs", nil, &all); err != nil {
		return err
	}
	b, err := json.Marshal(all)
	if err != nil {
		return err
	}
	var have Prefs
	if err := json.Unmarshal(b, &have); err != nil {
		return fmt.Errorf("decode tailscaled's prefs: %w", err)
	}
	for name, v := range loginPrefs(have, o).fields {
		if _, mask := strings.CutSuffix(name, "Set"); mask {
			continue
		}
		if all[name], err = json.Marshal(v); err != nil {
			return err
		}
	}
	delete(all, "Config") // the keys: tailscaled keeps its own
	opts := map[string]any{"AuthKey": o.AuthKey.Reveal(), "UpdatePrefs": all}
	if err := c.call(ctx, "POST", "start", opts, nil); err != nil {
		return err
	}
	// start alone leaves a node that was logged out, or never in, waiting.
	return c.call(ctx, "POST", "login-interactive", nil, nil)
}

// Logout leaves the tailnet: the control server lets the node key expire, and tailscaled forgets it. One that is not logged
// in does not notice. Where the control server does not answer, tailscaled stays logged out and keeps its keys.
func (c *Client) Logout(ctx context.Context) error {
	if err := c.call(ctx, "POST", "logout", nil, nil); err != nil {
		return fmt.Errorf("log out of the tailnet: %w", err)
	}
	return nil
}

type loginStep int

const (
	loginNone  loginStep = iota // it is in
	loginUp                     // only WantRunning is missing
	loginStart                  // a new start of its control client
)

// planLogin says what it takes to be logged in. It does no I/O.
func planLogin(st Status, p Prefs, o LoginOptions) (loginStep, error) {
	known := st.HaveNodeKey && !p.LoggedOut
	same := sameControl(p.ControlURL, o.ControlURL)
	switch {
	case known && !same && !o.Move:
		return 0, fmt.Errorf("%w: %s; set headscale.url to it, or run `tailscale logout` first", ErrOtherControl, orDefault(p.ControlURL))
	case o.Again && !o.AuthKey.Empty():
		return loginStart, nil
	case known && same && p.WantRunning && (st.State == Running || st.State == Starting || st.State == NoState):
		return loginNone, nil
	case known && same && st.State == Stopped:
		return loginUp, nil
	case o.AuthKey.Empty():
		return 0, fmt.Errorf("%w: set HEADCNI_AUTH_KEY_FILE to a file with a pre-auth key (headscale preauthkeys create --reusable "+
			"--tags tag:headcni), or HEADSCALE_API_KEY_FILE so that one is made", ErrNeedsKey)
	}
	return loginStart, nil
}

func loginPrefs(have Prefs, o LoginOptions) *edit {
	e := &edit{}
	if !sameControl(have.ControlURL, o.ControlURL) || have.ControlURL == "" {
		e.set("ControlURL", o.ControlURL)
	}
	if o.Hostname != "" && have.Hostname != o.Hostname {
		e.set("Hostname", o.Hostname)
	}
	if !have.WantRunning {
		e.set("WantRunning", true)
	}
	if have.LoggedOut {
		e.set("LoggedOut", false)
	}
	return e
}

// awaitRunning follows the bus until tailscaled is in the tailnet with another node key than oldKey, or it is clear that
// it will not be.
func (c *Client) awaitRunning(ctx context.Context, bus *bus, oldKey string) error {
	messages, done := make(chan message), make(chan struct{})
	defer close(done)
	go bus.pump(messages, done)
	patience := time.NewTimer(loginPatience)
	defer patience.Stop()
	look := time.NewTicker(100 * time.Millisecond)
	defer look.Stop()
	last, running := "", false
	// The first message holds the state and the health from before the start.
	for first := true; ; {
		select {
		case m := <-messages:
			if m.err != nil {
				return c.loginGaveUp(ctx, last, m.err)
			}
			if done, err := judge(m.n, first, &last); done {
				return err
			}
			if m.n.State != nil && !first {
				running = *m.n.State == stateRunning
			}
			if running && oldKey == "" {
				return nil
			}
			first = false
		case <-look.C:
			if !running {
				continue
			}
			if st, err := c.StatusWithoutPeers(ctx); err == nil && st.State == Running && st.Self.NodeKey != oldKey {
				return nil
			}
		case <-patience.C:
			return c.patienceEnds(ctx, last, oldKey)
		case <-ctx.Done():
			return c.loginGaveUp(ctx, last, ctx.Err())
		}
	}
}

type message struct {
	n   notify
	err error
}

// pump passes the bus's messages on until its end, which is the last one, or until done.
func (b *bus) pump(to chan<- message, done <-chan struct{}) {
	for {
		n, err := b.next()
		select {
		case to <- message{n, err}:
		case <-done:
			return
		}
		if err != nil {
			return
		}
	}
}

// judge looks for a refusal in one message and keeps the last complaint.
func judge(n notify, first bool, last *string) (bool, error) {
	if n.ErrMessage != nil && *n.ErrMessage != "" && !first {
		return true, refused(*n.ErrMessage)
	}
	if n.State != nil && *n.State == stateNeedsMachineAuth {
		return true, errors.New("the node waits to be approved in the control server")
	}
	if n.BrowseToURL != nil && *n.BrowseToURL != "" && !first {
		return true, fmt.Errorf("%w: it asks for an interactive login instead; make a pre-auth key (headscale preauthkeys create)", ErrKeyRefused)
	}
	if n.Health == nil || first {
		return false, nil
	}
	text := n.Health.loginError()
	if text == "" {
		return false, nil
	}
	*last = text
	if isRefusal(text) {
		return true, refused(text)
	}
	return false, nil
}

// isRefusal tells an answer of the control server to the registration from a failure to get one.
func isRefusal(text string) bool {
	return strings.Contains(text, "register request: http 4")
}

func refused(text string) error {
	return fmt.Errorf("%w: %s; make another with `headscale preauthkeys create --reusable --tags tag:headcni` (or check that it "+
		"belongs to this server)", ErrKeyRefused, strings.TrimSpace(text))
}

// patienceEnds asks once more, because a trimmed tailscaled may tell less on the bus.
func (c *Client) patienceEnds(ctx context.Context, last, oldKey string) error {
	st, err := c.StatusWithoutPeers(ctx)
	if err != nil {
		return err
	}
	if st.State == Running && st.Self.NodeKey != oldKey {
		return nil
	}
	if text := loginErrorIn(st.Health); text != "" {
		last = text
	}
	if isRefusal(last) {
		return refused(last)
	}
	return c.loginGaveUp(ctx, last, fmt.Errorf("tailscaled is still %s after %s", st.State, loginPatience))
}

func (c *Client) loginGaveUp(ctx context.Context, last string, err error) error {
	if errors.Is(ctx.Err(), context.Canceled) {
		return context.Canceled
	}
	if last != "" {
		err = errors.New(last)
	}
	advice := "check headscale.url and that Headscale runs and can be reached from this host"
	if strings.Contains(last, "TLS forced") {
		advice = "to an http:// address that is not private tailscaled connects once in two minutes only: give Headscale a certificate " +
			"and an https:// URL, or a private address"
	}
	return fmt.Errorf("%w: %w; %s; tailscaled goes on trying", ErrControl, err, advice)
}

const lastLoginError = "The last login error was: "

// loginErrorIn finds the error of the last login among the texts of a status.
func loginErrorIn(health []string) string {
	for _, h := range health {
		if _, text, ok := strings.Cut(h, lastLoginError); ok {
			return text
		}
	}
	return ""
}

// loginError finds the error of the last login.
func (h *wireHealth) loginError() string {
	w := h.Warnings["login-state"]
	if w.Args["error"] != "" {
		return w.Args["error"]
	}
	return loginErrorIn([]string{w.Text})
}

func orDefault(u string) string {
	if u == "" {
		return defaultControlURL
	}
	return u
}

// sameControl compares control URLs as far as spelling goes.
func sameControl(a, b string) bool { return canonical(a) == canonical(b) }

func canonical(s string) string {
	u, err := url.Parse(orDefault(s))
	if err != nil {
		return s
	}
	host := strings.ToLower(u.Hostname())
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
	}
	return u.Scheme + "://" + host + ":" + port + strings.TrimSuffix(u.Path, "/")
}

// redact keeps the key out of what others have put into an error.
func redact(err error, key secret.Secret) error {
	if key.Empty() || !strings.Contains(err.Error(), key.Reveal()) {
		return err
	}
	return redacted{text: strings.ReplaceAll(err.Error(), key.Reveal(), "***"), err: err}
}

// redacted hides the text of err but not what it is.
type redacted struct {
	text string
	err  error
}

func (r redacted) Error() string        { return r.text }
func (r redacted) Is(target error) bool { return errors.Is(r.err, target) }
