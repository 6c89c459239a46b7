package explain_test

import (
	"errors"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/headcni/headcni/internal/daemontest"
	"github.com/headcni/headcni/pkg/nodestatus"
	"github.com/headcni/headcni/pkg/policy/explain"
	"github.com/headcni/headcni/pkg/policy/report"
)

// serve answers on a socket.
func serve(t *testing.T, d *explain.Drops) (socket string) {
	t.Helper()
	return daemontest.Serve(t, nodestatus.Answers{Others: d.Handlers()})
}

func TestOverTheSocket(t *testing.T) {
	x := explainer(state(shop(t)), shop(t))
	socket := serve(t, &explain.Drops{Explainer: x})
	same := cmpopts.EquateComparable(netip.Addr{})
	want, err := x.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if got, err := report.AskList(t.Context(), socket); err != nil || !cmp.Equal(*want, got, same) {
		t.Errorf("list: %v\n%s", err, cmp.Diff(*want, got, same))
	}
	q := report.Question{Namespace: "shop", Pod: "web", From: "edge/gw", Port: "http"}
	answer, err := x.Explain(t.Context(), q)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := report.AskExplain(t.Context(), socket, q); err != nil || !cmp.Equal(*answer, got, same) {
		t.Errorf("explain: %v\n%s", err, cmp.Diff(*answer, got, same))
	}
	q.Pod = "wbe"
	if _, err := report.AskExplain(t.Context(), socket, q); err == nil || err.Error() != "there is no pod shop/wbe: is shop/web meant?" {
		t.Errorf("an error arrives as %v", err)
	}
	x.State = func() (*explain.State, error) { return nil, errors.New("off") }
	if _, err := report.AskList(t.Context(), socket); err == nil || err.Error() != "off" {
		t.Errorf("an error arrives as %v", err)
	}
}

func TestNobodyAnswers(t *testing.T) {
	if _, err := report.AskList(t.Context(), filepath.Join(t.TempDir(), "none.sock")); err == nil || !strings.Contains(err.Error(), "is headcni-daemon running?") {
		t.Errorf("%v", err)
	}
	other := serve(t, &explain.Drops{})
	if _, err := nodestatus.Get(t.Context(), other, "/policy/else"); err == nil || !strings.Contains(err.Error(), "another version: restart it") {
		t.Errorf("%v", err)
	}
}

func waitFor(t *testing.T, what string, done func() bool) {
	t.Helper()
	for until := time.Now().Add(10 * time.Second); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(until) {
			t.Fatalf("waited for %s", what)
		}
	}
}
