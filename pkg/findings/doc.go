package findings

import (
	"fmt"
	"strings"
)

// groups are the first digits of ids.
var groups = []struct {
	Digit byte
	Title string
}{
	{'1', "The node and its configuration"},
	{'2', "The tailnet, Headscale and approvals"},
	{'3', "Headscale's policy"},
	{'4', "Paths between nodes"},
	{'5', "Names"},
	{'6', "NetworkPolicies"},
	{'7', "Services for the tailnet"},
	{'8', "What headcnictl connectivity test and perf try"},
	{'9', "HeadCNI itself"},
}

// Markdown is docs/errors.md.
func Markdown() string {
	var b strings.Builder
	b.WriteString(`# Findings

Everything that HeadCNI finds to be wrong has an id. ` + "`headcnictl status`, `headcnictl doctor`, `headcni-daemon status`" + `, /readyz, Events and
the log name it; an id never changes its meaning. ` + "`headcnictl doctor --explain HC201`" + ` prints what is here. *fail*: something does not work;
*warn*: everything works, and somebody should change something. This file is made from [pkg/findings](../pkg/findings/table.go):
` + "`go test ./pkg/findings -update`" + ` writes it.
`)
	for _, g := range groups {
		fmt.Fprintf(&b, "\n## %cxx: %s\n", g.Digit, g.Title)
		for _, f := range Table {
			if f.ID[2] == g.Digit {
				fmt.Fprintf(&b, "\n### %s\n\n*%s*: %s.\n\n%s\n\n**What to do:** %s\n", f.ID, f.Severity, f.Title, f.Cause, f.Remedy)
			}
		}
	}
	return b.String()
}
