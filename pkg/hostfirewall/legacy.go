package hostfirewall

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

	"github.com/headcni/headcni/internal/nfcmd"
	"github.com/headcni/headcni/pkg/config/names"
)

// legacyFamily is iptables-legacy in one family.
type legacyFamily struct {
	family knftables.Family
	// tables lists the tables that iptables-legacy has in use. Its program makes the table that it is asked about, so
	// this must be read first. thread-self, because /proc/net is the process's main thread's.
	tables string
	// program is the name where both backends are installed, plain the one of systems that only know legacy.
	program, plain string
}

var legacyFamilies = []legacyFamily{
	{knftables.IPv4Family, "/proc/thread-self/net/ip_tables_names", "iptables-legacy", "iptables"},
	{knftables.IPv6Family, "/proc/thread-self/net/ip6_tables_names", "ip6tables-legacy", "ip6tables"},
}

// legacyWait is for how many seconds iptables waits for another iptables.
const legacyWait = "5"

// iptables is the rule as `iptables -S` prints it.
func (a accept) iptables() string {
	flag := "-i"
	if a.out {
		flag = "-o"
	}
	link := a.link
	if p, ok := strings.CutSuffix(link, "*"); ok {
		link = p + "+"
	}
	return fmt.Sprintf("-A %s %s %s -m comment --comment %s -j ACCEPT", forwardChain, flag, link, names.RuleComment)
}

// syncLegacy does for iptables-legacy what syncForward does for iptables-nft. A host without it costs one file read.
func syncLegacy(ctx context.Context, want []accept) ([]string, error) {
	var texts, done []string
	for _, a := range want {
		texts = append(texts, a.iptables())
	}
	var errs []error
	for _, f := range legacyFamilies {
		more, err := f.sync(ctx, texts)
		done = append(done, more...)
		if err != nil {
			errs = append(errs, fmt.Errorf("keep accepts in chain %s of iptables-legacy (%s): %w", forwardChain, f.family, err))
		}
	}
	return done, errors.Join(errs...)
}

func (f legacyFamily) sync(ctx context.Context, want []string) ([]string, error) {
	inUse, err := f.inUse()
	if err != nil || !inUse {
		return nil, err
	}
	program, err := f.find(ctx)
	if err != nil {
		return nil, err
	}
	out, err := nfcmd.Run(ctx, nil, program, "-w", legacyWait, "-S", forwardChain)
	if err != nil {
		return nil, err
	}
	insert, remove := planAccepts(parseLegacy(out), want)
	if len(insert)+len(remove) == 0 {
		return nil, nil
	}
	// One commit. Old ones go by their content, never by number, which might have become somebody else's; hence before
	// the new ones, of which they may be equals.
	var in bytes.Buffer
	fmt.Fprintf(&in, "*%s\n", filterTable)
	for _, r := range remove {
		fmt.Fprintf(&in, "-D %s\n", strings.TrimPrefix(r.text, "-A "))
	}
	for i, r := range insert {
		fmt.Fprintf(&in, "-I %s %d %s\n", forwardChain, i+1, strings.TrimPrefix(r, "-A "+forwardChain+" "))
	}
	fmt.Fprintln(&in, "COMMIT")
	if _, err := nfcmd.Run(ctx, in.Bytes(), program+"-restore", "--noflush", "--wait", legacyWait); err != nil {
		return nil, err
	}
	return describeAccepts(forwardChain+" of "+program, insert, remove), nil
}

// inUse says whether anybody has made the legacy filter table.
func (f legacyFamily) inUse() (bool, error) {
	b, err := os.ReadFile(f.tables)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil // the kernel has no legacy tables at all
	}
	if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) {
		return false, fmt.Errorf("%w: run as root", err)
	}
	if err != nil {
		return false, err
	}
	for name := range strings.Lines(string(b)) {
		if strings.TrimSpace(name) == filterTable {
			return true, nil
		}
	}
	return false, nil
}

// legacyPoll is how often legacyChains is asked for changes. Where iptables-legacy is not in use it reads two small files.
const legacyPoll = 5 * time.Second

// legacyChains is what the FORWARD chains of iptables-legacy hold, "" where it is not in use. Errors are Sync's to tell.
func legacyChains(ctx context.Context) string {
	var all strings.Builder
	for _, f := range legacyFamilies {
		if inUse, err := f.inUse(); err != nil || !inUse {
			continue
		}
		program, err := f.find(ctx)
		if err != nil {
			continue
		}
		if out, err := nfcmd.Run(ctx, nil, program, "-w", legacyWait, "-S", forwardChain); err == nil {
			all.WriteString(program + "\n" + out)
		}
	}
	return all.String()
}

// pollLegacy signals changes of the FORWARD chains of iptables-legacy, of which the kernel tells nobody.
func pollLegacy(ctx context.Context, out chan<- struct{}) {
	tick := time.NewTicker(legacyPoll)
	defer tick.Stop()
	last := legacyChains(ctx)
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if now := legacyChains(ctx); now != last && ctx.Err() == nil {
			last = now
			signal(out)
		}
	}
}

// find returns the program that speaks to the legacy tables.
func (f legacyFamily) find(ctx context.Context) (string, error) {
	if _, err := exec.LookPath(f.program); err == nil {
		return f.program, nil
	}
	if out, err := nfcmd.Run(ctx, nil, f.plain, "--version"); err == nil && !strings.Contains(out, "nf_tables") {
		return f.plain, nil
	}
	return "", fmt.Errorf("the host's FORWARD chain is in iptables-legacy and the program %s is missing: "+
		"install the package iptables", f.program)
}

// parseLegacy reads `iptables -S FORWARD`.
func parseLegacy(out string) forward {
	f := forward{exists: true}
	for line := range strings.Lines(out) {
		line = strings.TrimSpace(line)
		switch {
		case strings.HasPrefix(line, "-P "):
			f.drops = strings.HasSuffix(line, " DROP")
		case strings.HasPrefix(line, "-A "):
			mark := " --comment " + names.RuleComment + " "
			f.rules = append(f.rules, forwardRule{ours: strings.Contains(line+" ", mark), text: line})
		}
	}
	return f
}
