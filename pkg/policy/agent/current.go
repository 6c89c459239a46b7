package agent

import "github.com/headcni/headcni/pkg/policy"

// Current returns what the kernel was made to hold last, and what that was compiled of: nil before the first time. Nobody changes
// either any more.
func (a *Agent) Current() (*policy.Snapshot, *policy.Ruleset) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.snapshot, a.rules
}

// LogDenied has the kernel log what it denies, or not. That is so from the next pass on, which it asks for.
func (a *Agent) LogDenied(on bool) {
	a.logs.Store(on)
	a.Repair()
}

// options are those in force from now on.
func (a *Agent) options() policy.Options {
	opt := a.Options
	opt.Log = opt.Log || a.logs.Load()
	return opt
}
