package tailnet

import (
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/findings"
)

// cloned is a world in which a node comes up with a copy of another one's disk.
var cloned = labtest.OneByOne(func(t testing.TB) *lab.Lab {
	return labtest.New(t, lab.Options{Nodes: 3, Spare: 1, Modes: []string{daemon, host, daemon}, Bin: labtest.Programs(t)})
})

// A copy of a node's disk, another machine by its ID alone, does not take the original's place in the tailnet, starts no pod with an
// address of the original's, and says what to do; what is said makes it a node of its own. A disk that was moved for good is taken too.
func TestCopiedDisk(t *testing.T) {
	l := cloned.Enter(t)
	original, other, twin := l.Nodes[0], l.Nodes[1], l.Nodes[2]
	a, b := labtest.AddPod(t, original, "a", lab.PodOptions{}), labtest.AddPod(t, other, "b", lab.PodOptions{})
	flows := append(labtest.StartFlows(t, a, b), labtest.StartFlows(t, b, a)...)
	own := twin.PodCIDRs
	for _, dir := range []string{paths.StateDir, "/etc/cni/net.d"} {
		if err := os.CopyFS(twin.Path(dir), os.DirFS(original.Path(dir))); err != nil {
			t.Fatal(err)
		}
	}
	become(t, twin, "0123456789abcdef0123456789abcdef")
	twin.PodCIDRs = original.PodCIDRs
	if err := twin.ConfigureDaemon(nil); err != nil {
		t.Fatal(err)
	}
	if err := twin.StartTailscaled(); err != nil {
		t.Fatal(err)
	}
	if err := twin.StartDaemon(); err != nil {
		t.Fatal(err)
	}
	labtest.Eventually(t, "the copy says what it is", func() error {
		text := labtest.Sh(t, twin.Machine, "headcni-daemon status 2>&1 && echo it says that it is ready || :")
		if !strings.Contains(text, string(findings.OtherMachine)) || strings.Contains(text, "it says that it is ready") {
			return errors.New(text)
		}
		return nil
	})
	select {
	case <-twin.Tailscaled.Done():
	case <-labtest.Within(t).Done():
		t.Error("a second tailscaled runs with the original's state")
	}
	if p, err := twin.AddPod(labtest.Within(t), "early", lab.PodOptions{}); err == nil {
		t.Errorf("a pod has %v of the original's range", p.Addrs)
	}
	flows.NoneLost(t)

	labtest.Kill(t, twin.Daemon)
	labtest.Sh(t, twin.Machine, "rm -r %s/*", paths.StateDir)
	twin.PodCIDRs = own
	labtest.Start(t, twin, nil)
	labtest.Ready(t, twin)
	c := labtest.AddPod(t, twin, "c", lab.PodOptions{})
	for _, v6 := range []bool{false, true} {
		labtest.WantTCP(t, "from the new node to the original", c, labtest.Echo(a, v6), c.Addr(v6))
		labtest.WantTCP(t, "between the others", a, labtest.Echo(b, v6), a.Addr(v6))
	}

	// Moved: the machine around the disk is another, and there is no second one.
	labtest.Kill(t, twin.Daemon, twin.Tailscaled)
	become(t, twin, "ffff456789abcdef0123456789abcdef")
	labtest.Sh(t, twin.Machine, "rm %s/machine", paths.StateDir)
	labtest.StartTailscaled(t, twin)
	labtest.StartDaemon(t, twin)
	labtest.WantTCP(t, "after the move", c, labtest.Echo(a, false), c.Addr(false))
}

// become makes a machine another one by all that tells machines apart, also where this computer's hardware has numbers.
func become(t *testing.T, n *lab.Node, id string) {
	t.Helper()
	labtest.Sh(t, n.Machine, `rm /etc/machine-id; echo %[1]s > /etc/machine-id
for f in /sys/class/dmi/id/product_uuid /sys/firmware/devicetree/base/serial-number; do
	if [ -e $f ]; then mount --bind /etc/machine-id $f; fi
done`, id)
}
