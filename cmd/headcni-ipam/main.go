// Command headcni-ipam is the CNI IPAM plugin for use under bridge, macvlan, ptp and others. Under headcni the same
// package runs in process.
package main

import (
	"os"

	"github.com/headcni/headcni/internal/cnimain"
	"github.com/headcni/headcni/internal/version"
)

// supported are the versions whose configuration and result we speak.
var supported = []string{"0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"}

func main() {
	v := verbs{out: os.Stdout}
	commands := cnimain.Commands{Add: v.add, Del: v.del, Check: v.check, GC: v.gc, Status: v.status}
	about := "headcni-ipam " + version.Version + ": CNI IPAM plugin of HeadCNI"
	os.Exit(cnimain.Run(commands, supported, about))
}
