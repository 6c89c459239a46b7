package membership

import (
	"errors"
	"testing"
	"time"

	"github.com/headcni/headcni/pkg/config"
	"github.com/headcni/headcni/pkg/reconcile"
)

// A warning stands until the next look: Headscale is not asked with each pass.
func TestCheckKeepsWarnings(t *testing.T) {
	warned := reconcile.Warning{Err: errors.New("the API key expires")}
	m := &Member{cfg: config.Config{Headscale: config.Headscale{URL: "http://127.0.0.1:1"}}, checkedAt: time.Now(), warned: warned}
	if _, err := m.Check(t.Context(), Seen{}); !errors.Is(err, warned) {
		t.Errorf("%v, want %v", err, warned)
	}
}
