// Command headcni is the CNI plugin. A container runtime runs it with the command in CNI_COMMAND and the network
// configuration on standard input (CNI specification 1.1.0).
package main

import (
	"context"
	"os"
	"time"

	"github.com/headcni/headcni/internal/cnimain"
	"github.com/headcni/headcni/internal/version"
	"github.com/headcni/headcni/pkg/plugin"
)

func main() {
	p := plugin.New(time.Now())
	with := func(f func(context.Context, cnimain.Call) error) func(cnimain.Call) error {
		return func(a cnimain.Call) error { return f(context.Background(), a) }
	}
	commands := cnimain.Commands{
		Add: with(p.Add), Del: with(p.Del), Check: with(p.Check), GC: with(p.GC), Status: with(p.Status),
	}
	os.Exit(cnimain.Run(commands, cnimain.Versions(), "CNI plugin headcni "+version.Version))
}
