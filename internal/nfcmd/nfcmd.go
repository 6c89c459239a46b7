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
	found knftables.Interface // nil until the program was found and may be used
}

// Open finds the program. It is looked for again at each need, since an admin may install it in the meantime.
func (n *NFT) Open() error {
	if n.found != nil {
		return nil
	}
	found, err := knftables.New("", "", knftables.NoObjectCommentEmulation)
	if err != nil {
		return Explain(err)
	}
	n.found = found
	return nil
}

// Write runs one transaction, which fill makes: all of it or nothing.
func (n *NFT) Write(ctx context.Context, fill func(tx *knftables.Transaction)) error {
	if err := n.Open(); err != nil {
		return err
	}
	tx := n.found.NewTransaction()
	fill(tx)
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	if err := n.found.Run(ctx, tx); err != nil {
		if errors.Is(err, exec.ErrNotFound) || errors.Is(err, os.ErrNotExist) {
			n.found = nil // it went away
		}
		return Explain(err)
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

// Explain makes one line of an error of nft and says what to do about it.
func Explain(err error) error {
	if err == nil {
		return nil
	}
	text := err.Error()
	has := func(s string) bool { return strings.Contains(text, s) }
	switch {
	case errors.Is(err, exec.ErrNotFound), has("executable file not found"):
		return fmt.Errorf("the program nft is missing (%w): install the package nftables, version 1.0.1 or later", oneLine{err})
	case errors.Is(err, unix.EPERM), has("Operation not permitted"):
		return fmt.Errorf("%w: run as root or with CAP_NET_ADMIN", oneLine{err})
	case errors.Is(err, unix.EPROTONOSUPPORT):
		return fmt.Errorf("%w: this kernel has no nf_tables: load the module nf_tables", oneLine{err})
	case has("must be v1.0.1 or later"):
		return fmt.Errorf("%w: upgrade the package nftables", oneLine{err})
	case has("Operation not supported"), has("Could not process rule: No such file or directory"):
		return fmt.Errorf("%w: the kernel may lack a part: load the modules nf_tables, nft_fib_ipv4, nft_fib_ipv6, "+
			"nft_chain_nat, nft_masq and nft_nat", oneLine{err})
	}
	return oneLine{err}
}

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
