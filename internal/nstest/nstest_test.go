package nstest_test

import (
	"os"
	"strings"
	"testing"

	"github.com/headcni/headcni/internal/nstest"
)

func TestMain(m *testing.M) { nstest.Main(m) }

func TestNamespacesAreApart(t *testing.T) {
	a, b := nstest.New(t), nstest.New(t)
	a.Run(t, "ip", "link", "add", "one", "type", "veth", "peer", "name", "two")
	if out := b.Run(t, "ip", "-o", "link"); strings.Contains(out, "one") {
		t.Errorf("b sees a's link:\n%s", out)
	}
	if _, err := a.Handle.LinkByName("one"); err != nil {
		t.Errorf("handle: %v", err)
	}
	a.Do(t, func() error {
		_, err := os.Stat("/proc/sys/net/ipv4/conf/one")
		return err
	})
}
