package plugin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/types/create"

	"github.com/headcni/headcni/internal/cnimain"
	"github.com/headcni/headcni/internal/printable"
	"github.com/headcni/headcni/pkg/config/netconf"
)

const (
	// delegateWait bounds an IPAM plugin. The DHCP plugin may take tens of seconds.
	delegateWait = 2 * time.Minute
	// A plugin that is being replaced is busy for a moment (ETXTBSY).
	busyTries, busyWait = 10, 20 * time.Millisecond

	// outputMax is how much a plugin may print in bytes, on standard output and as much on standard error: results have some hundred
	// bytes. Of what it prints on standard error wordsMax bytes are handed on.
	outputMax = 1 << 20
	wordsMax  = 64 << 10
)

// errNoDelegate: the program is not there.
var errNoDelegate = errors.New("plugin not found")

// delegate is a plugin that is a program of its own (specification section 4): IPAM, or portmap. The CNI project's package
// invoke does the same, but links OpenTelemetry and net/http, which would double the plugin's size and start time.
type delegate struct {
	name, path string
	r          *Request
	stdin      []byte
	env        []string // instead of what the runtime has given
}

// newDelegate finds the plugin that a key of the configuration asks for. It is given stdin.
func newDelegate(r *Request, key, name string, stdin []byte) (*delegate, error) {
	var passed []string
	for _, dir := range filepath.SplitList(r.Path) {
		path := filepath.Join(dir, name)
		if !filepath.IsAbs(path) {
			continue // it would be run from whatever folder we were started in
		}
		info, err := os.Stat(path)
		if err != nil || !info.Mode().IsRegular() {
			continue
		}
		if open := othersWrite(dir, info); open != "" {
			passed = append(passed, open)
			continue
		}
		if self, err := os.Stat("/proc/self/exe"); err == nil && os.SameFile(info, self) {
			// It would run itself without end.
			return nil, fmt.Errorf("%w: %s: %q is this plugin itself; want %s, host-local or another IPAM plugin",
				netconf.ErrInvalid, key, name, netconf.IPAMType)
		}
		return &delegate{name: name, path: path, r: r, stdin: stdin}, nil
	}
	if passed != nil {
		return nil, fmt.Errorf("%w: %q, for %s: anybody may write %s, so it is not run as root; chmod o-w it",
			errNoDelegate, name, key, strings.Join(passed, ", "))
	}
	return nil, fmt.Errorf("%w: %q, for %s, is in none of the folders of CNI_PATH (%s); install it there", errNoDelegate, name, key,
		printable.Cut(r.Path, 500))
}

// othersWrite names what everybody may write of a program and its folder; "" where that is neither.
func othersWrite(dir string, program fs.FileInfo) string {
	const others = 0o002
	if program.Mode()&others != 0 {
		return filepath.Join(dir, program.Name())
	}
	if folder, err := os.Stat(dir); err == nil && folder.Mode()&others != 0 {
		return dir
	}
	return ""
}

// run executes the plugin in our environment, except for the command.
func (d *delegate) run(ctx context.Context, command string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, delegateWait)
	defer cancel()
	var inherited []*os.File
	if d.r.locked != nil {
		inherited = append(inherited, d.r.locked)
	}
	stdout, stderr := &bounded{keep: outputMax, stop: cancel}, &bounded{keep: wordsMax, stop: cancel}
	var err error
	for try := 1; ; try++ {
		cmd := exec.CommandContext(ctx, d.path)
		cmd.Env = append(delegateEnv(os.Environ(), command), d.env...)
		cmd.Stdin, cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = bytes.NewReader(d.stdin), stdout, stderr, inherited
		// A grandchild that keeps the pipes open must not hold us.
		cmd.WaitDelay = time.Second
		if err = cmd.Run(); !errors.Is(err, syscall.ETXTBSY) || try == busyTries {
			break
		}
		time.Sleep(busyWait)
	}
	if words := stderr.head; len(words) > 0 {
		// The specification wants it on our own standard error.
		if stderr.printed > len(words) {
			words = fmt.Appendf(words, "...\nheadcni: plugin %s printed more than that\n", d.name)
		}
		_, _ = os.Stderr.Write(words)
	}
	for stream, b := range map[string]*bounded{"output": stdout, "error": stderr} {
		if b.printed > outputMax {
			return nil, fmt.Errorf("plugin %s printed more than %d MiB on standard %s at %s, which no answer has, and was ended; see what it is: %s",
				d.name, outputMax>>20, stream, command, d.path)
		}
	}
	if err == nil {
		return stdout.head, nil
	}
	var answer types.Error
	if json.Unmarshal(stdout.head, &answer) == nil && answer.Msg != "" {
		msg, details := fmt.Sprintf("plugin %s: %s", d.name, printable.Cut(answer.Msg, cnimain.TextMax/4)), printable.Cut(answer.Details, cnimain.TextMax/2)
		if answer.Code == 0 { // no error code (specification, section 5), so it gets one of ours
			return nil, errors.New(strings.TrimSuffix(msg+"; "+details, "; "))
		}
		return nil, types.NewError(answer.Code, msg, details)
	}
	return nil, fmt.Errorf("run plugin %s: %w", d.path, err)
}

// bounded keeps the beginning of what a program prints, and ends the program where that is too much.
type bounded struct {
	keep, printed int // bytes
	head          []byte
	stop          func()
}

func (b *bounded) Write(p []byte) (int, error) {
	if b.printed += len(p); b.printed > outputMax {
		b.stop()
		return 0, fs.ErrInvalid // the pipe is closed, which ends those that the program has started
	}
	b.head = append(b.head, p[:min(len(p), b.keep-len(b.head))]...)
	return len(p), nil
}

func delegateEnv(env []string, command string) []string {
	var out []string
	for _, kv := range env {
		if !strings.HasPrefix(kv, "CNI_COMMAND=") {
			out = append(out, kv)
		}
	}
	return append(out, "CNI_COMMAND="+command)
}

func (d *delegate) Add(ctx context.Context) (IPAMResult, error) {
	out, err := d.run(ctx, "ADD")
	if err != nil {
		return IPAMResult{}, err
	}
	result, err := parseResult(out, d.r.Config.CNIVersion)
	if err != nil {
		return IPAMResult{}, fmt.Errorf("read result of IPAM plugin %s: %w", d.name, err)
	}
	assigned, err := readIPAMResult(result)
	if err != nil {
		return IPAMResult{}, fmt.Errorf("IPAM plugin %s: %w", d.name, err)
	}
	return assigned, nil
}

// parseResult reads a result of any version. IPAM plugins may leave the version out.
func parseResult(b []byte, version string) (*types100.Result, error) {
	var head struct {
		CNIVersion string `json:"cniVersion"`
	}
	if err := json.Unmarshal(b, &head); err != nil {
		return nil, errors.New("not a JSON object")
	}
	if head.CNIVersion != "" {
		version = head.CNIVersion
	}
	created, err := create.Create(version, withVersion(b, version))
	if err != nil {
		return nil, err
	}
	result, err := types100.NewResultFromResult(created)
	if err != nil {
		return nil, err
	}
	if slices.Contains(result.Interfaces, nil) || slices.Contains(result.IPs, nil) || slices.Contains(result.Routes, nil) {
		return nil, errors.New("interfaces, ips and routes must not hold null")
	}
	// Passed on, they would be the word <nil>, which nobody can read.
	if slices.ContainsFunc(result.IPs, func(i *types100.IPConfig) bool { return i.Address.IP == nil }) ||
		slices.ContainsFunc(result.Routes, func(r *types.Route) bool { return r.Dst.IP == nil }) {
		return nil, errors.New("each of ips needs an address, and each of routes a dst")
	}
	return result, nil
}

func withVersion(b []byte, version string) []byte {
	var m map[string]json.RawMessage
	if json.Unmarshal(b, &m) != nil || m == nil {
		return b
	}
	m["cniVersion"], _ = json.Marshal(version) // a string always can be
	out, err := json.Marshal(m)
	if err != nil {
		return b
	}
	return out
}

// Del does not learn from the plugin what was given back.
func (d *delegate) Del(ctx context.Context) ([]netip.Addr, error) {
	_, err := d.run(ctx, "DEL")
	return nil, err
}

// Check leaves the comparison to the plugin, which gets prevResult with the rest.
func (d *delegate) Check(ctx context.Context, _ []netip.Addr) error {
	_, err := d.run(ctx, "CHECK")
	return err
}

// GC hands the list on: the plugin reads cni.dev/valid-attachments itself.
func (d *delegate) GC(ctx context.Context, _ func(containerID, ifName string) bool) error {
	_, err := d.run(ctx, "GC")
	return err
}

func (d *delegate) Status(ctx context.Context) error { _, err := d.run(ctx, "STATUS"); return err }
