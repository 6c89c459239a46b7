package tailnet

import (
	"fmt"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
)

// minutes bounds what has to wait for the daemon's minute.
const minutes = 3 * time.Minute

// server is a world in which the control server changes its mind about nodes: one joined before the tests, the other later.
var server = labtest.OneByOne(func(t testing.TB) *lab.Lab {
	return labtest.New(t, lab.Options{Nodes: 2, Spare: 1, Modes: []string{host, daemon}, Bin: labtest.Programs(t)})
})

// Headscale is restored from a backup that is older than a node, and than the key with which the daemon had it join: the node
// joins again by itself, and its pods are reached. Somebody then takes the approval of each node's routes away: the daemon sees
// within a minute what Headscale does not tell the node, and has them approved again.
func TestServerForgets(t *testing.T) {
	l := server.Enter(t)
	old, late := l.Nodes[0], l.Nodes[1]
	restore := backup(t, l)
	labtest.Start(t, late, nil)
	labtest.Ready(t, late)
	a, b := labtest.AddPod(t, old, "a", lab.PodOptions{}), labtest.AddPod(t, late, "b", lab.PodOptions{})
	talk := func(what string) {
		t.Helper()
		labtest.WantTCP(t, what, a, labtest.Echo(b, false), a.Addr(false))
		labtest.WantTCP(t, what, b, labtest.Echo(a, true), b.Addr(true))
	}
	talk("before")
	restore()
	labtest.EventuallyWithin(t, minutes, late.Name+" is back", func() error {
		_, err := labtest.Registered(t, l, late)
		return err
	})
	labtest.Ready(t, late)
	talk("after the restore")

	flows := append(labtest.StartFlows(t, a, b), labtest.StartFlows(t, b, a)...)
	flows.WaitBack(t, time.Now())
	for _, n := range l.Nodes {
		node, err := labtest.Registered(t, l, n)
		if err != nil {
			t.Fatal(err)
		}
		labtest.Sh(t, l.Control.Machine, "headscale nodes approve-routes -i %s -r ''", node.ID)
	}
	for _, n := range l.Nodes {
		labtest.EventuallyWithin(t, minutes, n.Name+" has its routes", func() error {
			node, err := labtest.Registered(t, l, n)
			if err == nil && len(node.Primary) != len(n.PodCIDRs) {
				err = fmt.Errorf("Headscale has %+v", node)
			}
			return err
		})
		labtest.Ready(t, n)
	}
	flows.WaitBack(t, time.Now())
	flows.Stop()
	talk("after the approvals")
}

// backup stops Headscale, copies its database and starts it again. What it returns puts the copy back in the same way.
func backup(t *testing.T, l *lab.Lab) (restore func()) {
	t.Helper()
	dir := "/var/lib/headscale"
	move := func(script string) {
		t.Helper()
		labtest.Stop(t, l.Control.Headscale)
		labtest.Sh(t, l.Control.Machine, "cd %s && %s", dir, script)
		if err := l.Control.StartHeadscale(labtest.Within(t)); err != nil {
			t.Fatal(err)
		}
	}
	move("mkdir backup && cp db.sqlite* backup/")
	return func() { t.Helper(); move("rm db.sqlite* && cp backup/* .") }
}
