package lab

import (
	"context"
	"fmt"
)

// disk are the folders that outlive a machine's boot, relative to /.
var disk = []string{"etc/cni", "etc/headcni", "opt/cni", "var/lib/cni", "var/lib/headcni", "var/lib/tailscale"}

// Crash ends everything on the node at once, as a power cut does: its processes, its pods and all that its kernel knows.
// What is on its disk waits for Boot. The node's pods must not be used any more.
func (n *Node) Crash() error {
	routed := len(n.Routers) > 0
	if on, err := n.lab.framesOn(n); err == nil && !routed { // else they are not counted
		n.lab.gone.Add(on)
	}
	n.unplug()
	mounts := n.ns.mnt
	n.ns.mnt = nil // stop would close it, and with it goes the disk
	n.stop()
	n.disk = mounts
	if routed {
		return n.Routers[0].removeLinks(lanLink)
	}
	// The wire would vanish with the last handle on the node's network, some time later.
	return n.lab.Control.removeLinks(n.wireLinks()...)
}

// Boot starts a node that crashed: another boot, with an empty /run and a bare network, and with its disk. None of its
// programs is started.
func (n *Node) Boot(ctx context.Context) error {
	old := namespaces{mnt: n.disk}
	n.disk = nil
	defer old.close()
	saved, err := run(ctx, old, n.env, nil, "tar", append([]string{"-C", "/", "-c", "--ignore-failed-read"}, disk...)...)
	if err != nil {
		return fmt.Errorf("read the disk of %s: %w", n.Name, err)
	}
	m, err := newMachine(ctx, n.lab.Dir, n.Name, n.lab.hosts(n.lab.opt.site(n.index).Proxy), n.lab.opt.path(), n.lab.lock)
	if err != nil {
		return err
	}
	n.Machine = m
	if _, err := run(ctx, n.ns, n.env, saved, "tar", "-C", "/", "-x"); err != nil {
		return fmt.Errorf("write the disk of %s: %w", n.Name, err)
	}
	if len(n.Routers) > 0 {
		return n.plugIntoLAN()
	}
	return n.plug(ctx, n.lab.Control.Machine)
}
