package nfcmd

import (
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestExplain(t *testing.T) {
	stderr := "/dev/stdin:4:1-30: Error: Could not process rule: %s\nadd chain ip headcni guard\n^^^^^^^^^^^^\n/dev/stdin:5:1-3: Error: more\n"
	for want, err := range map[string]error{
		"install the package nftables":    fmt.Errorf("could not find nftables binary: %w", exec.ErrNotFound),
		"CAP_NET_ADMIN":                   fmt.Errorf(stderr, "Operation not permitted"),
		"run as root":                     fmt.Errorf("list: %w", unix.EPERM),
		"upgrade the package nftables":    errors.New("nft version must be v1.0.1 or later (got nftables v0.9.8)"),
		"load the modules nf_tables":      fmt.Errorf(stderr, "No such file or directory"),
		"load the module nf_tables":       fmt.Errorf("ask: %w", unix.EPROTONOSUPPORT),
		"rule: Device or resource busy: ": fmt.Errorf(stderr, "Device or resource busy"),
	} {
		got := Explain(err).Error()
		if !strings.Contains(got, want) || strings.ContainsAny(got, "\n^") || strings.Contains(got, "more") {
			t.Errorf("%q: want one line with %q", got, want)
		}
		if !errors.Is(Explain(err), err) {
			t.Errorf("%q does not wrap", got)
		}
	}
	if Explain(nil) != nil {
		t.Error("an error out of none")
	}
}
