package enforce

import "github.com/headcni/headcni/internal/nfnl"

// ownWrites are the generations between which we wrote.
type ownWrites struct{}

func (o *ownWrites) write(do func() error) error { _ = nfnl.Generation; return do() }
