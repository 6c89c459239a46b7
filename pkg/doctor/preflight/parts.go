package preflight

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/procfs"
)

// part is something of nf_tables that rules of ours use, as a rule in a chain of a family, and the module that has it.
type part struct{ module, family, chain, rule string }

const (
	early = "type filter hook prerouting priority 0"
	late  = "type filter hook forward priority 0"
	nat   = "type nat hook prerouting priority -100"
)

// parts are those of a node's rules and of NetworkPolicies. What stands first is needed by what follows.
var parts = []part{
	{"nf_tables", "inet", late, "accept"},
	{"nft_ct", "ip", late, "ct state established accept"},
	{"nft_ct", "ip6", late, "ct state established accept"},
	{"nft_fib_ipv4", "ip", early, "fib saddr . iif oif missing drop"},
	{"nft_fib_ipv6", "ip6", early, "fib saddr . iif oif missing drop"},
	{"nft_limit", "ip", late, "limit rate 10/second accept"},
	{"nft_reject_ipv4", "ip", late, "reject"},
	{"nft_reject_ipv6", "ip6", late, "reject"},
	{"nft_reject_inet", "inet", late, "reject"},
	{"nft_log", "inet", late, "log group 4278"},
	{"nft_chain_nat", "ip", nat, "accept"},
	{"nft_nat", "ip", nat, "dnat to 192.0.2.1"},
	{"nft_redir", "ip", nat, "redirect"},
	{"nft_masq", "ip", "type nat hook postrouting priority 100", "masquerade"},
}

// needed are the parts of the families that the node has: without IPv6 no rule of that family is written.
func needed(ipv6 bool) []part {
	return slices.DeleteFunc(slices.Clone(parts), func(p part) bool { return p.family == "ip6" && !ipv6 })
}

// lacking names the modules of those parts that the kernel does not take, as one that has neither them nor a way to load them.
func lacking(ctx context.Context) (modules []string, err error) {
	ipv6 := procfs.HasIPv6()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		// The thread is never unlocked: it ends with this function, and the namespace with it.
		runtime.LockOSThread()
		if err = unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return
		}
		for _, p := range needed(ipv6) {
			if slices.Contains(modules, p.module) {
				continue
			}
			cmd := exec.CommandContext(ctx, "nft", "--check", "--file", "-")
			cmd.Stdin = strings.NewReader(fmt.Sprintf("table %s headcni-try { chain try { %s; %s; }; }", p.family, p.chain, p.rule))
			var exit *exec.ExitError
			if bad := cmd.Run(); errors.As(bad, &exit) && ctx.Err() == nil {
				modules = append(modules, p.module)
			} else if bad != nil {
				err = bad
				return
			}
		}
	}()
	<-ended
	return modules, err
}
