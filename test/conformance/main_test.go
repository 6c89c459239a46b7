package conformance

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/pkg/ipam"
)

func TestMain(m *testing.M) { nstest.Main(m) }

// programs are what is tested as it ships, built once, into the private /run that goes with the test process.
var programs = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("/run", "conformance")
	if err != nil {
		return "", err
	}
	return dir, build(dir, "./cmd/headcni", "./cmd/headcni-ipam")
})

// build builds programs into dir. args may begin with further flags.
func build(dir string, args ...string) error {
	cmd := exec.Command("go", append([]string{"build", "-buildvcs=false", "-trimpath", "-ldflags=-s -w", "-o", dir}, args...)...)
	cmd.Dir = "../.."
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build: %w\n%s", err, out)
	}
	return nil
}

// node is a runtime's node: a network namespace, plugins, leases.
type node struct {
	t       *testing.T
	host    *nstest.NS
	path    []string // CNI_PATH
	dataDir string   // of IPAM plugins
	cache   string   // libcni's
	wrap    []string // a command that ends by running its last argument
	env     []string // variables of every plugin, besides CNI's
	during  func(plugin *os.Process, ended <-chan struct{})
	confine bool // plugins write to the private /run only

	mu    sync.Mutex
	calls []call // what libcni has run
}

func newNode(t *testing.T) *node {
	t.Helper()
	nstest.Require(t)
	dir, err := programs()
	if err != nil {
		t.Fatal(err)
	}
	n := &node{t: t, host: nstest.New(t), path: []string{dir}, dataDir: t.TempDir(), cache: t.TempDir()}
	for _, a := range []string{"192.0.2.1/32", "2001:db8::1/128"} {
		n.host.Run(t, "ip", "addr", "add", a, "dev", "lo")
	}
	return n
}

// call is one run of a plugin. What a command does not need may be empty.
type call struct {
	program, verb, id, ifName, netns, args, conf string

	out, stderr string
	exit        int
}

// fault is an error result (section 5, Error).
type fault struct {
	CNIVersion   string
	Code         uint
	Msg, Details string
}

func (f *fault) Error() string { return fmt.Sprintf("%d: %s; %s", f.Code, f.Msg, f.Details) }

// attach is a call of headcni for an attachment.
func attach(verb, id string, pod *nstest.NS, conf string) call {
	c := call{program: "headcni", verb: verb, id: id, ifName: "eth0", conf: conf}
	if pod != nil {
		c.netns = pod.Path
	}
	return c
}

func (c call) environ(path []string) []string {
	env := []string{"CNI_COMMAND=" + c.verb, "CNI_PATH=" + strings.Join(path, ":")}
	for name, value := range map[string]string{
		"CNI_CONTAINERID": c.id, "CNI_IFNAME": c.ifName, "CNI_NETNS": c.netns, "CNI_ARGS": c.args,
	} {
		if value != "" {
			env = append(env, name+"="+value)
		}
	}
	return env
}

// hang is how long a plugin may take. None waits for anything here but for the kernel.
const hang = 60 * time.Second

// exec runs a program in the node's namespace with a bare environment and the configuration on standard input.
func (n *node) exec(ctx context.Context, program string, stdin io.Reader, environ []string) (out, stderr string, exit int) {
	argv := append(slices.Clone(n.wrap), program)
	killed := ctx // by the test
	ctx, cancel := context.WithTimeout(ctx, hang)
	defer cancel()
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = slices.Concat([]string{"PATH=" + os.Getenv("PATH")}, n.env, environ)
	var o, e bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &o, &e
	var err error
	n.host.Do(n.t, func() error { // a child is born where its thread is
		if n.confine {
			if err := readOnlyRoot(); err != nil {
				return err
			}
		}
		err = cmd.Start()
		return nil
	})
	if err == nil {
		ended := make(chan struct{})
		var wg sync.WaitGroup
		if n.during != nil {
			wg.Go(func() { n.during(cmd.Process, ended) })
		}
		err = cmd.Wait()
		close(ended)
		wg.Wait()
	}
	if killed.Err() != nil && cmd.ProcessState == nil {
		return "", "", -1
	}
	var ended *exec.ExitError
	if err != nil && !errors.As(err, &ended) && killed.Err() == nil {
		n.t.Errorf("run %s: %v", program, err)
		return "", err.Error(), -1
	}
	if ctx.Err() != nil && killed.Err() == nil {
		n.t.Errorf("%s hangs: %v", program, environ)
	}
	return o.String(), e.String(), cmd.ProcessState.ExitCode()
}

// readOnlyRoot gives the thread a view of the file system in which / is read-only, and what is mounted on it is as it was.
func readOnlyRoot() error {
	var root unix.Statfs_t
	err := unix.Statfs("/", &root)
	if err == nil {
		err = unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS)
	}
	if err == nil {
		keep := uintptr(root.Flags) & (unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC) // an ordinary user may not take them off
		err = unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|keep, "")
	}
	if err != nil {
		return fmt.Errorf("make / read-only: %w", err)
	}
	return nil
}

// start runs a plugin without libcni.
func (n *node) start(ctx context.Context, c call) call {
	n.t.Helper()
	path, err := (&onNode{}).FindInPath(c.program, n.path)
	if err != nil {
		n.t.Error(err)
		return c
	}
	c.out, c.stderr, c.exit = n.exec(ctx, path, strings.NewReader(c.conf), c.environ(n.path))
	return c
}

// run is start, and holds what the specification says of every run: result or error on standard output and nothing else, exit
// code 0 or not, errors of the right form.
func (n *node) run(c call) (string, *fault) {
	n.t.Helper()
	return n.start(context.Background(), c).answer(n.t)
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func (c call) answer(t testing.TB) (string, *fault) {
	t.Helper()
	if c.exit == 0 {
		if silent := !slices.Contains([]string{"ADD", "VERSION"}, c.verb); silent && c.out != "" {
			t.Errorf("%s prints %q", c.verb, c.out)
		} else if err := oneObject(c.out, &struct{}{}); !silent && err != nil {
			t.Errorf("%s prints %q: %v", c.verb, c.out, err)
		}
		return c.out, nil
	}
	f := &fault{}
	if err := oneObject(c.out, f); err != nil {
		t.Errorf("%s fails with exit code %d and no error result: %v: %q, %q", c.verb, c.exit, err, c.out, c.stderr)
	}
	if c.exit < 0 || c.exit >= 126 {
		t.Errorf("%s was ended by a signal or never ran: exit code %d, %q", c.verb, c.exit, c.stderr)
	}
	if f.CNIVersion == "" || f.Code == 0 || f.Msg == "" || strings.ContainsFunc(f.Msg+f.Details, func(r rune) bool { return !unicode.IsPrint(r) }) {
		t.Errorf("%s: malformed error %q", c.verb, c.out)
	}
	if strings.Contains(c.stderr, "goroutine ") || strings.Contains(f.Error(), "internal fault") {
		t.Errorf("%s: panic: %s", c.verb, c.stderr)
	}
	return "", f
}

// oneObject decodes a text that is one JSON object and nothing else.
func oneObject(text string, to any) error {
	d := json.NewDecoder(strings.NewReader(text))
	if !strings.HasPrefix(strings.TrimSpace(text), "{") {
		return errors.New("not an object")
	}
	if err := d.Decode(to); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("more than one object")
	}
	return nil
}

func (n *node) must(c call) string {
	n.t.Helper()
	out, f := n.run(c)
	if f != nil {
		n.t.Fatalf("%s %s: %v", c.verb, c.id, f)
	}
	return out
}

// fails wants an error with the code and all of the words.
func (n *node) fails(c call, code uint, words ...string) {
	n.t.Helper()
	out, f := n.run(c)
	if f == nil {
		n.t.Errorf("%s %s %.200s: %q, want error %d", c.verb, c.id, c.conf, out, code)
		return
	}
	for _, w := range words {
		if !strings.Contains(f.Error(), w) {
			n.t.Errorf("%s %s: %v, want %q in it", c.verb, c.id, f, w)
		}
	}
	if f.Code != code {
		n.t.Errorf("%s %s: %v, want code %d", c.verb, c.id, f, code)
	}
}

// dual is the ipam object of a pool of both families.
func (n *node) dual() string { return n.pool("10.244.1.0/24", "fd00:244:1::/64") }

func (n *node) pool(subnets ...string) string {
	var sets []string
	for _, s := range subnets {
		sets = append(sets, fmt.Sprintf(`[{"subnet":%q}]`, s))
	}
	return fmt.Sprintf(`{"type":"headcni-ipam","dataDir":%q,"ranges":[%s]}`, n.dataDir, strings.Join(sets, ","))
}

// conf is a plugin configuration as a runtime derives it; keys are set in it, with null to leave one out.
func (n *node) conf(keys string) string {
	n.t.Helper()
	return n.with(fmt.Sprintf(`{"cniVersion":"1.1.0","name":"net","type":"headcni","mtu":1400,"ipam":%s}`, n.dual()), keys)
}

func (n *node) with(conf, keys string) string {
	n.t.Helper()
	m := map[string]json.RawMessage{}
	for _, s := range []string{conf, keys} {
		if s == "" {
			continue
		}
		if err := json.Unmarshal([]byte(s), &m); err != nil {
			n.t.Fatalf("%s: %v", s, err)
		}
	}
	for k, v := range m {
		if string(v) == "null" {
			delete(m, k)
		}
	}
	b, err := json.Marshal(m)
	if err != nil {
		n.t.Fatal(err)
	}
	return string(b)
}

func (n *node) previous(conf, result string) string {
	n.t.Helper()
	return n.with(conf, `{"prevResult":`+result+`}`)
}

// result is a result of any version from 0.3.0 on, with every key of 1.1.0.
type result struct {
	CNIVersion string
	Interfaces []link
	IPs        []struct {
		Version, Address, Gateway string
		Interface                 *int
	}
	Routes []struct {
		Dst, GW               string
		MTU, AdvMSS, Priority int
		Table, Scope          *int
	}
	DNS struct {
		Nameservers     []string
		Domain          string
		Search, Options []string
	}
}

type link struct {
	Name, Mac, Sandbox string
	Mtu                int
}

func parse(t testing.TB, out string) (r result) {
	t.Helper()
	if err := oneObject(out, &r); err != nil {
		t.Fatalf("%v in %s", err, out)
	}
	return r
}

func (r result) addrs() (list []netip.Addr) {
	for _, ip := range r.IPs {
		if p, err := netip.ParsePrefix(ip.Address); err == nil {
			list = append(list, p.Addr())
		}
	}
	return list
}

// leases are those of the in-process pool and of headcni-ipam in the network "net".
func (n *node) leases() []ipam.Lease {
	n.t.Helper()
	p, err := ipam.Open(ipam.Config{Network: "net", DataDir: n.dataDir})
	if err != nil {
		n.t.Fatal(err)
	}
	l, err := p.List(context.Background())
	if err != nil {
		n.t.Fatal(err)
	}
	return l
}

// links are the host's ends of pods.
func (n *node) links() (names []string) {
	n.t.Helper()
	for line := range strings.Lines(n.host.Run(n.t, "ip", "-br", "link", "show", "type", "veth")) {
		if name, _, _ := strings.Cut(line, "@"); strings.HasPrefix(name, "hc") {
			names = append(names, name)
		}
	}
	return names
}

// empty wants nothing left of any attachment.
func (n *node) empty() {
	n.t.Helper()
	if l := n.leases(); len(l) > 0 {
		n.t.Errorf("leases left: %+v", l)
	}
	if l := n.links(); len(l) > 0 {
		n.t.Errorf("links left: %s", l)
	}
	for _, family := range []string{"-4", "-6"} {
		for line := range strings.Lines(n.host.Run(n.t, "ip", family, "route")) {
			if strings.Contains(line, "dev hc") {
				n.t.Errorf("route left: %s", line)
			}
		}
	}
}

func ping(t testing.TB, from *nstest.NS, to ...netip.Addr) {
	t.Helper()
	for _, a := range to {
		from.Run(t, "ping", "-n", "-c", "1", "-W", "2", a.String())
	}
}
