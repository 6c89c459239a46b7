// Command headcni-ipam is the CNI IPAM plugin for use under bridge, macvlan, ptp and others. Under headcni the same
// package runs in process.
package main

import (
	"os"

	"github.com/headcni/headcni/internal/cnimain"
	"github.com/headcni/headcni/internal/version"
)

func main() {
	v := verbs{out: os.Stdout}
	commands := cnimain.Commands{Add: v.add, Del: v.del, Check: v.check, GC: v.gc, Status: v.status}
	about := "headcni-ipam " + version.Version + ": CNI IPAM plugin of HeadCNI"
	os.Exit(cnimain.Run(commands, cnimain.Versions(), about))
}
