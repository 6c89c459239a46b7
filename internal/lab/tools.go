package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

const (
	// ToolsEnv holds the folders with Headscale, tailscaled and the reference plugins, as test/tools/ensure prints them.
	ToolsEnv = "HEADCNI_TOOLS"
	// BinEnv holds the folder with our own programs.
	BinEnv = "HEADCNI_BIN"
)

// ErrMissing marks what the lab cannot do without.
var ErrMissing = errors.New("the lab lacks")

var (
	ourPrograms = []string{"headcni", "headcni-ipam", "headcni-daemon", "headcnictl"}
	realParts   = []string{"headscale", "tailscaled", "tailscale"}
	// sbin holds what an ordinary user's PATH often lacks.
	sbin = []string{"/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/local/bin", "/usr/bin", "/bin"}
)

// Check says what is missing to run a lab: an ErrMissing that names it and how to get it.
func (o Options) Check() error {
	o = o.withDefaults()
	if missing := haveAll(o.Bin, ourPrograms...); len(missing) > 0 {
		return fmt.Errorf("%w %s in %q; run `make build` and set %s to its bin folder", ErrMissing, strings.Join(missing, ", "), o.Bin, BinEnv)
	}
	return o.checkTools()
}

func (o Options) checkTools() error {
	if missing := haveAll(o.path(), slices.Concat(realParts, o.Plugins)...); len(missing) > 0 {
		return fmt.Errorf("%w %s; `make` has them built; by hand, set %s to what test/tools/ensure prints", ErrMissing, strings.Join(missing, ", "), ToolsEnv)
	}
	if len(o.Derpers) > 0 && len(haveAll(o.path(), "derper")) > 0 {
		return fmt.Errorf("%w derper; set %s to what `test/tools/ensure derper` prints beside the other tools", ErrMissing, ToolsEnv)
	}
	if slices.ContainsFunc(o.Sites, func(s Site) bool { return s.Proxy }) && len(haveAll(o.path(), proxyProgram)) > 0 {
		return fmt.Errorf("%w %s; put the folder with it that `test/tools/packages unpack tinyproxy-bin` prints on PATH", ErrMissing, proxyProgram)
	}
	if slices.ContainsFunc(o.Sites, Site.maps) && len(haveAll(o.path(), mapperProgram)) > 0 {
		return fmt.Errorf("%w %s; put the folder with it that `test/tools/packages unpack miniupnpd-nftables` prints on PATH", ErrMissing, mapperProgram)
	}
	if missing := haveAll(o.path(), "bash", "ip", "nft", "mount", "find"); len(missing) > 0 {
		return fmt.Errorf("%w %s; install iproute2, nftables, mount and findutils", ErrMissing, strings.Join(missing, ", "))
	}
	f, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("%w the tun device: %w", ErrMissing, err)
	}
	return f.Close()
}

// path is the PATH of every machine.
func (o Options) path() string {
	dirs := append(filepath.SplitList(o.Tools), o.Bin)
	dirs = append(dirs, filepath.SplitList(os.Getenv("PATH"))...)
	return strings.Join(append(dirs, sbin...), string(filepath.ListSeparator))
}

// Build compiles our programs into a folder, for tests that were not started by make.
func Build(ctx context.Context, dir string) error {
	root, err := moduleRoot()
	if err != nil {
		return err
	}
	for _, p := range []string{"headcni", "headcni-ipam", "headcni-daemon", "cli"} {
		name := p
		if p == "cli" {
			name = "headcnictl"
		}
		cmd := exec.CommandContext(ctx, "go", "build", "-o", filepath.Join(dir, name), "./cmd/"+p)
		cmd.Dir = root
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("build %s: %w\n%s", name, err, out)
		}
	}
	return nil
}

// moduleRoot is the folder of go.mod above the working directory.
func moduleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", errors.New("no go.mod above the working directory")
		}
	}
}

// ours is the path of one of our programs.
func (l *Lab) ours(name string) string { return filepath.Join(l.opt.Bin, name) }

// dedicatedTailscaled is the build that daemon mode ships, where it is at hand.
func (l *Lab) dedicatedTailscaled() string {
	m := Machine{env: []string{"PATH=" + l.opt.path()}}
	if p := m.find("tailscaled-trimmed"); strings.Contains(p, "/") {
		return p
	}
	return m.find("tailscaled")
}

// plugins maps the names in a CNI folder to the programs.
func (l *Lab) plugins() map[string]string {
	out := map[string]string{"headcni": l.ours("headcni"), "headcni-ipam": l.ours("headcni-ipam")}
	m := Machine{env: []string{"PATH=" + l.opt.path()}}
	for _, name := range l.opt.Plugins {
		out[name] = m.find(name)
	}
	return out
}
