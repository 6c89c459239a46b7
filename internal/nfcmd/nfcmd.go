// Package nfcmd runs the programs that write the host's packet filter, nft and iptables, and says what to do about what they
// and the kernel answer.
package nfcmd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"sigs.k8s.io/knftables"
)

// timeout bounds one run of nft or iptables: milliseconds, but seconds where another program has huge tables.
const timeout = 30 * time.Second

// NFT is the nft program. The zero value works.
type NFT struct {
	// Modules are the kernel's modules to name where it lacks a part, and a list of most if there are none.
	Modules string
	found   knftables.Interface // nil until the program was found and may be used
}

// Open finds the program. It is looked for again at each need, since an admin may install it in the meantime.
func (n *NFT) Open() error {
	if n.found != nil {
		return nil
	}
	found, err := knftables.New("", "", knftables.NoObjectCommentEmulation)
	if err != nil {
		return n.Explain(err)
	}
	n.found = found
	return nil
}

// Write runs one transaction, which fill makes: all of it or nothing.
func (n *NFT) Write(ctx context.Context, fill func(tx *knftables.Transaction)) error {
	return n.run(ctx, fill, knftables.Interface.Run)
}

// Check tells whether the kernel would take a transaction, and changes nothing.
func (n *NFT) Check(ctx context.Context, fill func(tx *knftables.Transaction)) error {
	return n.run(ctx, fill, knftables.Interface.Check)
}

// Lacks reports whether Check failed since the kernel has no such thing, nor a module with it: another time it will not do either.
func Lacks(err error) bool {
	return err != nil && (strings.Contains(err.Error(), "Could not process rule: No such file or directory") || strings.Contains(err.Error(), "Operation not supported"))
}

func (n *NFT) run(ctx context.Context, fill func(tx *knftables.Transaction), do func(knftables.Interface, context.Context, *knftables.Transaction) error) error {
	if err := n.Open(); err != nil {
		return err
	}
	tx := n.found.NewTransaction()
	fill(tx)
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	if err := do(n.found, ctx, tx); err != nil {
		if errors.Is(err, exec.ErrNotFound) || errors.Is(err, os.ErrNotExist) {
			n.found = nil // it went away
		}
		return n.Explain(err)
	}
	return nil
}

// Run returns what another program printed. Its error has what it said on standard error.
func Run(ctx context.Context, stdin []byte, name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdin = bytes.NewReader(stdin)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("run %s: %w", name, oneLine{fmt.Errorf("%w: %s", err, bytes.TrimSpace(stderr.Bytes()))})
	}
	return string(out), nil
}

// Explain makes one line of an error of nft, or of the kernel's nf_tables, and says what to do about it, once.
func Explain(err error) error { return new(NFT).Explain(err) }

// Explain is the function, and names the modules that are needed here.
func (n *NFT) Explain(err error) error {
	if err == nil {
		return nil
	}
	if errors.As(err, new(advised)) {
		return err
	}
	if todo := n.advice(err); todo != "" {
		return advised{oneLine{err}, todo}
	}
	return oneLine{err}
}

// advice is "" where nothing is known to do.
func (n *NFT) advice(err error) string {
	text := err.Error()
	has := func(s string) bool { return strings.Contains(text, s) }
	switch {
	case errors.Is(err, exec.ErrNotFound), has("executable file not found"):
		return "the program nft is missing: install the package nftables, version 1.0.1 or later"
	case errors.Is(err, unix.EPERM), has("Operation not permitted"):
		return "run as root or with CAP_NET_ADMIN"
	case errors.Is(err, unix.EPROTONOSUPPORT):
		return "this kernel has no nf_tables: load the module nf_tables"
	case has("must be v1.0.1 or later"):
		return "upgrade the package nftables"
	case errors.Is(err, unix.EOPNOTSUPP), has("Operation not supported"), has("Could not process rule: No such file or directory"):
		modules := n.Modules
		if modules == "" {
			modules = "nf_tables, nft_ct, nft_fib_ipv4, nft_fib_ipv6, nft_limit, nft_reject_ipv4, nft_reject_ipv6, nft_chain_nat, nft_nat, nft_redir and nft_masq"
		}
		return "the kernel may lack a part: load the modules " + modules
	}
	return ""
}

// advised is an error with what to do about it.
type advised struct {
	error
	todo string
}

func (e advised) Unwrap() error { return e.error }

func (e advised) Error() string { return e.error.Error() + ": " + e.todo }

// oneLine prints an error's lines as one, without nft's underlining.
type oneLine struct{ error }

func (e oneLine) Unwrap() error { return e.error }

func (e oneLine) Error() string {
	var parts []string
	for l := range strings.Lines(e.error.Error()) {
		if l = strings.TrimSpace(l); strings.Trim(l, "^~ ") != "" {
			parts = append(parts, l)
		}
		if len(parts) == 2 { // what is wrong, and with which command: more of them say the same
			break
		}
	}
	return strings.Join(parts, ": ")
}
