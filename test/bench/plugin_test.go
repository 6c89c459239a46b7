package bench

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nstest"
)

// A contender is a CNI configuration that is run as a container runtime runs it: one process per command.
type contender struct {
	name, plugin, conf string
}

// contenders have a /16 each, so that no run comes near its end, and their leases on the same file system.
var contenders = []contender{
	{"headcni", "headcni", `{"cniVersion":"1.0.0","name":"bench-headcni","type":"headcni","mtu":1280,
		"ipam":{"type":"headcni-ipam","subnet":"10.1.0.0/16"}}`},
	{"ptp+host-local", "ptp", `{"cniVersion":"1.0.0","name":"bench-ptp","type":"ptp","mtu":1280,
		"ipam":{"type":"host-local","dataDir":"/var/lib/headcni/host-local","subnet":"10.2.0.0/16","routes":[{"dst":"0.0.0.0/0"}]}}`},
	{"bridge+host-local", "bridge", `{"cniVersion":"1.0.0","name":"bench-bridge","type":"bridge","bridge":"bench0","isGateway":true,
		"ipam":{"type":"host-local","dataDir":"/var/lib/headcni/host-local","subnet":"10.3.0.0/16","routes":[{"dst":"0.0.0.0/0"}]}}`},
}

// runner runs plugins from the folders of our programs and of the pinned real parts.
type runner struct {
	path  string // for the plugins' own look-up of IPAM plugins
	count int
}

func newRunner(b *testing.B) *runner {
	nstest.Require(b)
	ours, tools := os.Getenv("HEADCNI_BIN"), os.Getenv("HEADCNI_TOOLS")
	if ours == "" || tools == "" {
		nstest.Skip(b, "no programs to measure: run `sudo make bench`")
	}
	return &runner{path: ours + ":" + tools}
}

func (r *runner) find(name string) (string, error) {
	for _, dir := range filepath.SplitList(r.path) {
		path := filepath.Join(dir, name)
		if _, err := os.Stat(path); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("no %s in %s", name, r.path)
}

// command runs one CNI command and returns how long the process took.
func (r *runner) command(c contender, command, id, netns string) (time.Duration, error) {
	path, err := r.find(c.plugin)
	if err != nil {
		return 0, err
	}
	cmd := exec.Command(path)
	cmd.Stdin = bytes.NewBufferString(c.conf)
	cmd.Env = []string{
		"CNI_COMMAND=" + command, "CNI_CONTAINERID=" + id, "CNI_NETNS=" + netns, "CNI_IFNAME=eth0", "CNI_PATH=" + r.path,
		"PATH=" + os.Getenv("PATH"),
	}
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	began := time.Now()
	err = cmd.Run()
	took := time.Since(began)
	if err != nil {
		return 0, fmt.Errorf("%s %s: %w: %s%s", c.name, command, err, out.Bytes(), errOut.Bytes())
	}
	return took, nil
}

// sandbox is a network namespace as a runtime has it.
type sandbox struct{ id, netns string }

func (r *runner) sandboxes(n int) ([]sandbox, error) {
	var all []sandbox
	for range n {
		r.count++
		s := sandbox{id: fmt.Sprintf("bench%d", r.count)}
		s.netns = filepath.Join("/run/netns", s.id)
		if err := nstest.Create(s.netns); err != nil {
			return all, err
		}
		all = append(all, s)
	}
	return all, nil
}

func remove(all []sandbox) error {
	for _, s := range all {
		if err := unix.Unmount(s.netns, unix.MNT_DETACH); err != nil {
			return err
		}
		if err := os.Remove(s.netns); err != nil {
			return err
		}
	}
	return nil
}

// together runs one command for all sandboxes at once and returns how long it took until the last was done.
func (r *runner) together(c contender, command string, all []sandbox) (time.Duration, error) {
	errs := make([]error, len(all))
	var wg sync.WaitGroup
	began := time.Now()
	for i, s := range all {
		wg.Go(func() { _, errs[i] = r.command(c, command, s.id, s.netns) })
	}
	wg.Wait()
	took := time.Since(began)
	for _, err := range errs {
		if err != nil {
			return 0, err
		}
	}
	return took, nil
}

// round is one ADD and one DEL of n sandboxes at once for every contender, in an order that turns with the rounds: what
// else the machine does meets all alike.
func (r *runner) round(number, n int, add, del map[string][]float64) error {
	for i := range contenders {
		c := contenders[(i+number)%len(contenders)]
		all, err := r.sandboxes(n)
		if err != nil {
			return err
		}
		a, err := r.together(c, "ADD", all)
		if err != nil {
			return err
		}
		d, err := r.together(c, "DEL", all)
		if err != nil {
			return err
		}
		if err := remove(all); err != nil {
			return err
		}
		add[c.name] = append(add[c.name], a.Seconds()*1e3)
		del[c.name] = append(del[c.name], d.Seconds()*1e3)
	}
	return nil
}

// BenchmarkPlugin compares whole plugin processes, 1 and 30 at once.
func BenchmarkPlugin(b *testing.B) {
	for _, n := range []int{1, 30} {
		b.Run(fmt.Sprintf("at-once=%d", n), func(b *testing.B) {
			r := newRunner(b)
			rounds := 60
			if n > 1 {
				rounds = 15
			}
			add, del := map[string][]float64{}, map[string][]float64{}
			if err := r.round(0, n, map[string][]float64{}, map[string][]float64{}); err != nil { // warm caches
				b.Fatal(err)
			}
			for i := range rounds {
				if err := r.round(i, n, add, del); err != nil {
					b.Fatal(err)
				}
			}
			for _, other := range contenders[1:] {
				row(b, fmt.Sprintf("ADD, %d at once, ms", n), "headcni", other.name, add["headcni"], add[other.name])
				row(b, fmt.Sprintf("DEL, %d at once, ms", n), "headcni", other.name, del["headcni"], del[other.name])
			}
		})
	}
}
