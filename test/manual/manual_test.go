package manual

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/pkg/config"
)

func TestMain(m *testing.M) { nstest.Main(m) }

// TestByHand follows docs/install-by-hand.md on two machines: on one with `make install` and a tailscaled of the host's own, on the
// other with the lines for doing it by hand and the dedicated tailscaled.
func TestByHand(t *testing.T) {
	nstest.Require(t)
	w := newWorld(t, diskImage(t))
	ok := t.Run("install", w.install)
	for _, part := range []struct {
		name string
		test func(*testing.T)
	}{
		{"pods", w.attach}, {"look around", w.lookAround}, {"podman", w.podman}, {"restart", w.restart}, {"firewall", w.firewall}, {"reboot", w.reboot}, {"power cut", w.cut},
		{"journal", w.journal}, {"kill", w.kill}, {"uninstall", w.uninstall},
	} {
		ok = ok && t.Run(part.name, part.test)
	}
	if ok {
		w.manual.all()
	}
}

// world is the lab with two machines in it.
type world struct {
	*lab.Lab
	manual       *page
	host, daemon *machine
	secrets      map[string]string
	// before is what the machines were like before there was anything of ours.
	before map[*machine][]string
}

func newWorld(t *testing.T, image string) *world {
	t.Helper()
	bin := labtest.Programs(t)
	w := &world{manual: open(t, "install-by-hand.md", ""), secrets: map[string]string{}, before: map[*machine][]string{}}
	w.Lab = labtest.New(t, lab.Options{
		Bin: bin, Nodes: 2, Spare: 2, Modes: []string{config.ModeHost, config.ModeDaemon}, ServerURL: serverURL,
		Policy: func(p map[string]any) { w.policy(t, p) },
	})
	cert := w.serveTLS(t)
	w.secrets["API key"] = w.Control.APIKey
	out, err := w.Control.Run(labtest.Within(t), "headscale", "preauthkeys", "create", "--tags", lab.Tag, "--expiration", "24h")
	if err != nil {
		t.Fatal(err)
	}
	words := strings.Fields(out)
	w.secrets["pre-auth key"] = words[len(words)-1]
	base := newBase(t, image, filepath.Join(bin, "headcnictl"), cert)
	w.host, w.daemon = newMachine(t, w.Nodes[0], base), newMachine(t, w.Nodes[1], base)
	withTailscale(t, w.host, "/usr/bin", "/usr/sbin")
	withTailscale(t, w.daemon, "/usr/local/bin", "/usr/local/bin")
	withUnit(t, w.host)
	withGo(t, w.host, w.daemon)
	for _, m := range w.both() {
		withSource(t, m)
		withHosts(t, m)
		began := time.Now()
		m.boot()
		t.Logf("%s has booted in %v", m.Name, time.Since(began).Round(time.Second/10))
	}
	return w
}

func (w *world) both() []*machine { return []*machine{w.host, w.daemon} }

// on prepares the page's examples for a machine. They are of IPv4; the machines have both families.
func (w *world) on(m *machine) *page {
	w.manual.replace = strings.NewReplacer(
		"10.244.1.0/24", fmt.Sprintf(`%s, "%s"`, m.PodCIDRs[0], m.PodCIDRs[1]),
		"10.244.0.0/16", fmt.Sprintf(`%s, "%s"`, lab.ClusterCIDRs[0], lab.ClusterCIDRs[1]),
		"YOUR_AUTH_KEY", w.secrets["pre-auth key"])
	return w.manual
}

// follow carries out steps of the page as a user who may call sudo.
func (w *world) follow(m *machine, parts ...string) {
	m.t.Helper()
	for _, part := range parts {
		began := time.Now()
		out := m.run(admin, w.on(m).step(part))
		m.t.Logf("%s, %v: %s\n%s", m.Name, time.Since(began).Round(time.Second/10), part, out)
	}
}

// status is the page's look at the node, which fails until the node is ready.
func (w *world) status(m *machine) {
	m.t.Helper()
	labtest.Eventually(m.t, "headcni-daemon status", func() error {
		out, err := m.try(m.t.Context(), admin, w.on(m).step("status"))
		m.t.Logf("%s: status: %s", m.Name, out)
		return err
	})
}

func (w *world) install(t *testing.T) {
	w.host.t, w.daemon.t = t, t
	yaml := func(m *machine) { m.write("/etc/headcni/daemon.yaml", w.on(m).step("podCIDRs"), 0o644) }

	w.host.write("/etc/headcni/api-key", w.Control.APIKey, 0o600)
	w.follow(w.host, "tailscale up", "make build")
	w.before[w.host] = w.host.state()
	yaml(w.host)
	w.follow(w.host, "make install", "config validate", "enable --now headcni-daemon")
	w.status(w.host)

	w.follow(w.daemon, "make build")
	w.before[w.daemon] = w.daemon.state()
	w.follow(w.daemon, "sudo cp ")
	w.alone(w.daemon)
	yaml(w.daemon)
	w.daemon.write("/etc/headcni/env", "HEADSCALE_API_KEY="+w.Control.APIKey, 0o600)
	w.follow(w.daemon, "config validate", "enable --now headcni-tailscaled", "enable --now headcni-daemon")
	w.status(w.daemon)
	w.ready(t)
}

// alone attaches pods by the shipped conflist, without the daemon: they get addresses and a way to their node.
func (w *world) alone(m *machine) {
	m.t.Helper()
	m.root("systemctl start kubelet")
	labtest.Eventually(m.t, "wait for a pod without the daemon", func() error {
		pods, err := m.running()
		if err == nil && (len(pods) == 0 || len(pods[0].addrs) != 1 || !shipped.Contains(pods[0].addrs[0])) {
			err = fmt.Errorf("want one with an address of %s: %+v", shipped, pods)
		}
		if err == nil {
			_, err = m.try(m.t.Context(), "root", fmt.Sprintf("ping -q -c 1 -W 5 %s", pods[0].addrs[0]))
		}
		return err
	})
	m.root("systemctl stop kubelet")
}

// ready waits until the daemons say that all is right.
func (w *world) ready(t *testing.T) {
	t.Helper()
	for _, m := range w.both() {
		labtest.Eventually(t, "wait until "+m.Name+" is ready", func() error {
			_, err := m.try(labtest.Within(t), "root", "/opt/cni/bin/headcni-daemon health")
			return err
		})
	}
}

// pod is a container of a machine that the kubelet of ours keeps alive.
type pod struct {
	*lab.Net
	name  string
	addrs []netip.Addr // IPv4 first
	pid   int          // on its machine
	on    *machine
}

// shipped is the range of the conflist that is in the repository.
var shipped = netip.MustParsePrefix("10.244.0.0/24")

var (
	taskLine = regexp.MustCompile(`(?m)^(\S+)\s+(\d+)\s+RUNNING`)
	inetLine = regexp.MustCompile(`inet6? ([0-9a-f.:]+)/`)
)

// running are the pods of a machine as they are now.
func (m *machine) running() (pods []*pod, err error) {
	for _, task := range taskLine.FindAllStringSubmatch(m.root("ctr task ls"), -1) {
		p := &pod{name: m.Name + "/" + task[1], on: m}
		if _, err := fmt.Sscan(task[2], &p.pid); err != nil {
			return nil, err
		}
		out, err := m.try(m.t.Context(), "root", fmt.Sprintf("nsenter -t %d -n ip -o addr show dev eth0 scope global", p.pid))
		if err != nil {
			return nil, err
		}
		for _, a := range inetLine.FindAllStringSubmatch(out, -1) {
			p.addrs = append(p.addrs, netip.MustParseAddr(a[1]))
		}
		pods = append(pods, p)
	}
	return pods, nil
}

// pods are those of both machines, once each runs and has its addresses.
func (w *world) pods(t *testing.T) (pods []*pod) {
	t.Helper()
	for _, m := range w.both() {
		labtest.Eventually(t, "wait for the pods of "+m.Name, func() error {
			now, err := m.running()
			if err != nil {
				return err
			}
			for _, p := range now {
				if len(p.addrs) != 2 {
					return fmt.Errorf("%s has the addresses %v", p.name, p.addrs)
				}
			}
			if len(now) != podsEach {
				return fmt.Errorf("%d pods run\n%s", len(now), m.root("journalctl -u kubelet -n 5 --no-pager"))
			}
			pods = append(pods, now...)
			return nil
		})
	}
	for _, p := range pods {
		var err error
		if p.Net, err = lab.NetAt(fmt.Sprintf("/proc/%d/root/proc/%d/ns/net", p.on.init, p.pid)); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(p.Close)
	}
	return pods
}

// reach has every pod connect to and ping every other one, which must see its real address.
func reach(t *testing.T, pods []*pod) {
	t.Helper()
	for _, from := range pods {
		for _, to := range pods {
			for i, addr := range to.addrs {
				if from == to {
					continue
				}
				what := fmt.Sprintf("from %s to %s at %s", from.name, to.name, addr)
				labtest.Eventually(t, what, func() error {
					seen, err := lab.Ask(t.Context(), from, netip.AddrPortFrom(addr, lab.EchoPort))
					if err == nil && seen != from.addrs[i] {
						t.Errorf("%s: came from %s, want %s", what, seen, from.addrs[i])
					}
					if err == nil {
						_, err = from.on.try(t.Context(), "root", fmt.Sprintf("nsenter -t %d -n ping -q -c 1 -W 5 %s", from.pid, addr))
					}
					return err
				})
			}
		}
	}
}

func (w *world) attach(t *testing.T) {
	w.host.t, w.daemon.t = t, t
	for _, m := range w.both() {
		if out := m.root("systemd-analyze verify headcni-daemon.service headcni-tailscaled.service 2>&1"); out != "" {
			t.Errorf("systemd on %s says of our units:\n%s", m.Name, out)
		}
		m.root("systemctl enable --now --quiet kubelet")
	}
	pods := w.pods(t)
	for _, p := range pods {
		for i, a := range p.addrs {
			if !p.on.PodCIDRs[i].Contains(a) {
				t.Errorf("%s has %s, not of %s", p.name, a, p.on.PodCIDRs[i])
			}
		}
	}
	reach(t, pods)
}

// refusals is the documents' line for what a runtime says when it gets no network.
const refusals = "journalctl -u kubelet | grep headcni"

// lookAround runs what the documents say of looking at a node.
func (w *world) lookAround(t *testing.T) {
	w.host.t, w.daemon.t = t, t
	for _, m := range w.both() {
		for _, p := range []*page{open(t, "operations.md", "Monitoring"), open(t, "troubleshooting.md", "Look at a node")} {
			for _, s := range p.steps {
				for line := range strings.Lines(s.Text) {
					line = strings.TrimSpace(line)
					other := m == w.host && strings.Contains(line, "/run/headcni/") || m == w.daemon && line == "tailscale status"
					if strings.HasPrefix(line, "#") || other || line == refusals { // there are none yet
						continue
					}
					out, err := m.try(labtest.Within(t), admin, line)
					if err != nil {
						t.Error(err)
					}
					t.Logf("%s: %s\n%s", m.Name, line, out[:min(len(out), 1200)])
				}
			}
		}
	}
}

// undisturbed streams between pods of both machines in both directions and families while do is done, and loses nothing.
func (w *world) undisturbed(t *testing.T, pods []*pod, do func()) {
	t.Helper()
	streams := w.streams(t, pods)
	do()
	for _, s := range streams {
		if r := s.Stop(); r.Lost > 0 {
			t.Errorf("%s: %+v", s.Name, r)
		}
	}
}

// streams are between the first pods of the machines, and reach them.
func (w *world) streams(t *testing.T, pods []*pod) (streams []*lab.Stream) {
	t.Helper()
	a, b := pods[0], pods[podsEach]
	for _, way := range [][2]*pod{{a, b}, {b, a}} {
		for _, addr := range way[1].addrs {
			s, err := lab.StartStream(t.Context(), fmt.Sprintf("from %s to %s", way[0].name, addr), way[0], way[1], addr)
			if err != nil {
				t.Fatal(err)
			}
			streams = append(streams, s)
		}
	}
	for _, s := range streams {
		if _, err := s.WaitBack(labtest.Within(t), time.Now()); err != nil {
			t.Fatal(err)
		}
	}
	return streams
}

// property is what systemd has of a unit.
func (m *machine) property(unit, name string) string {
	m.t.Helper()
	return strings.TrimSpace(m.root(fmt.Sprintf("systemctl show --value -p %s %s", name, unit)))
}

// restart restarts the daemons, on one machine after an upgrade.
func (w *world) restart(t *testing.T) {
	w.host.t, w.daemon.t = t, t
	w.undisturbed(t, w.pods(t), func() {
		w.follow(w.host, "make install")
		for _, m := range w.both() {
			m.root("systemctl restart headcni-daemon")
		}
		w.ready(t)
	})
}

// firewall has the user's own firewall start anew, which with Debian's unit takes everybody's tables away.
func (w *world) firewall(t *testing.T) {
	w.host.t, w.daemon.t = t, t
	capture := w.capture(t)
	w.undisturbed(t, w.pods(t), func() {
		for _, m := range w.both() {
			m.root("systemctl restart nftables")
			labtest.Eventually(t, "wait for the tables on "+m.Name, func() error {
				_, err := m.try(t.Context(), "root", "nft list table ip headcni && nft list table ip6 headcni")
				return err
			})
		}
		w.ready(t)
	})
	w.nothingClear(t, capture)
}

// kill ends what carries the node without a word, and systemd puts it up again.
func (w *world) kill(t *testing.T) {
	w.host.t, w.daemon.t = t, t
	pods := w.pods(t)
	killed := func(m *machine, unit string) {
		t.Helper()
		before := m.property(unit, "MainPID")
		m.root("kill -9 " + before)
		labtest.Eventually(t, unit+" on "+m.Name+" is up again", func() error {
			if now := m.property(unit, "MainPID"); now == "0" || now == before || m.property(unit, "ActiveState") != "active" {
				return fmt.Errorf("its process was %s, now %s", before, now)
			}
			return nil
		})
	}
	w.undisturbed(t, pods, func() {
		killed(w.host, "headcni-daemon")
		killed(w.daemon, "headcni-daemon")
		w.ready(t)
	})
	capture := w.capture(t)
	killed(w.daemon, "headcni-tailscaled")
	killed(w.host, "tailscaled")
	w.ready(t)
	reach(t, pods)
	w.nothingClear(t, capture)
}

func (w *world) capture(t *testing.T) *lab.Capture {
	t.Helper()
	c, err := w.CaptureUnderlay()
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func (w *world) nothingClear(t *testing.T, c *lab.Capture) {
	t.Helper()
	before := c.Clear()
	// The proof that one would have been seen.
	if err := w.SendClear(w.host.Node, w.host.PodCIDRs[0].Addr(), w.daemon.PodCIDRs[0].Addr()); err != nil {
		t.Fatal(err)
	}
	labtest.Eventually(t, "wait for the packet of ours in clear", func() error {
		if c.Clear() == before {
			return errors.New("the capture does not see it")
		}
		return nil
	})
	r, err := c.Stop()
	if err != nil {
		t.Fatal(err)
	}
	if before > 0 {
		t.Errorf("%d packets in clear on the underlay: %+v", before, r)
	}
}

// reboot boots one machine after the other, while pods of the other keep sending to its pods.
func (w *world) reboot(t *testing.T) {
	w.host.t, w.daemon.t = t, t
	for _, m := range w.both() {
		streams := w.streams(t, w.pods(t))
		capture := w.capture(t)
		began := time.Now()
		m.reboot()
		t.Logf("%s is up again after %v", m.Name, time.Since(began).Round(time.Second/10))
		w.ordered(m)
		reach(t, w.pods(t))
		t.Logf("all pods reach each other %v after the reboot began", time.Since(began).Round(time.Second/10))
		for _, s := range streams {
			s.Stop()
		}
		w.nothingClear(t, capture)
	}
}

// ordered says that what must be up first was started first in this boot, and not by luck.
func (w *world) ordered(m *machine) {
	m.t.Helper()
	tailscaled := "tailscaled"
	if m == w.daemon {
		tailscaled = "headcni-tailscaled"
	}
	for _, order := range [][2]string{
		{"nftables.service", "network-pre.target"}, {"network-pre.target", tailscaled + ".service"},
		{tailscaled + ".service", "headcni-daemon.service"}, {"headcni-daemon.service", "kubelet.service"},
	} {
		if after := strings.Fields(m.property(order[1], "After")); !slices.Contains(after, order[0]) {
			m.t.Errorf("systemd on %s starts %s after %v, which lacks %s", m.Name, order[1], after, order[0])
		}
	}
	var last uint64
	for _, at := range []struct{ unit, when string }{
		{"network-pre.target", "ActiveEnterTimestampMonotonic"}, {tailscaled, "ActiveEnterTimestampMonotonic"},
		{"headcni-daemon", "ExecMainStartTimestampMonotonic"}, {"headcni-daemon", "ActiveEnterTimestampMonotonic"},
		{"kubelet", "ExecMainStartTimestampMonotonic"},
	} {
		var now uint64
		if _, err := fmt.Sscan(m.property(at.unit, at.when), &now); err != nil || now == 0 {
			m.t.Errorf("%s of %s on %s: %d, %v", at.when, at.unit, m.Name, now, err)
		}
		if now < last {
			m.t.Errorf("%s was started before what it is to come after on %s", at.unit, m.Name)
		}
		last = now
	}
}

// cut boots a machine after a power cut without the daemon: no pod may start before it has made the node safe.
func (w *world) cut(t *testing.T) {
	w.host.t, w.daemon.t = t, t
	m := w.daemon
	m.root("systemctl disable --quiet headcni-daemon")
	capture := w.capture(t)
	m.cut()
	open(t, "troubleshooting.md", "Look at a node").step(refusals) // it is there
	labtest.Eventually(t, "wait until the runtime is told that the node is not safe", func() error {
		out, err := m.try(labtest.Within(t), admin, refusals)
		if err == nil && !strings.Contains(out, "node network is not programmed") {
			err = fmt.Errorf("the kubelet of ours says:\n%s", out)
		}
		return err
	})
	if tasks := m.root("ctr task ls"); taskLine.MatchString(tasks) {
		t.Errorf("pods run on a node that is not safe:\n%s", tasks)
	}
	m.root("systemctl enable --now --quiet headcni-daemon")
	w.ready(t)
	reach(t, w.pods(t))
	w.nothingClear(t, capture)
}

// journal looks for errors and secrets in what our units have logged, and for secrets in what all can see of processes.
func (w *world) journal(t *testing.T) {
	w.host.t, w.daemon.t = t, t
	trouble := regexp.MustCompile(`(?m)^.*(level=(ERROR|WARN)|panic:|Failed with result|headcni.*(timed out|exited)).*$`)
	for _, m := range w.both() {
		log := m.root("journalctl --no-pager -o short-precise -u headcni-daemon -u headcni-tailscaled")
		if !strings.Contains(log, "level=INFO") {
			t.Errorf("%s: the journal has nothing of the daemon:\n%s", m.Name, log)
		}
		for _, line := range trouble.FindAllString(log, -1) {
			t.Errorf("%s: %s", m.Name, line)
		}
		processes := m.root("ps axww -o args")
		for what, key := range w.secrets {
			if strings.Contains(log, key) {
				t.Errorf("%s: the %s is in the journal", m.Name, what)
			}
			if strings.Contains(processes, key) {
				t.Errorf("%s: the %s is in a process's arguments", m.Name, what)
			}
		}
	}
}

// left is what uninstall leaves: what the user wrote, and folders that belong to everybody.
var left = regexp.MustCompile(`^file (/etc/headcni(/(daemon\.yaml|api-key|env))?|/opt/cni(/bin)?|/usr/lib/cni|/etc/cni(/net\.d)?|/usr/local/lib/systemd(/system)?|` +
	`/usr/local/share/(man/man[18]|bash-completion(/completions)?|zsh(/site-functions)?|fish(/vendor_completions\.d)?)) `)

func (w *world) uninstall(t *testing.T) {
	w.host.t, w.daemon.t = t, t
	for _, m := range w.both() {
		m.root("systemctl disable --now --quiet kubelet")
		w.follow(m, "make uninstall")
		after := m.state()
		for _, line := range after {
			if !slices.Contains(w.before[m], line) && !left.MatchString(line) {
				t.Errorf("left on %s: %s", m.Name, line)
			}
		}
		for _, line := range w.before[m] {
			if !slices.Contains(after, line) {
				t.Errorf("gone from %s: %s", m.Name, line)
			}
		}
		if failed := m.root("systemctl --failed --no-legend --plain"); failed != "" {
			t.Errorf("failed units on %s:\n%s", m.Name, failed)
		}
	}
}

// stateScript prints what a machine has that HeadCNI might change, a line for each, but not what is another program's
// affair: caches, logs, tailscaled's routes to peers, and what any tailscaled leaves behind: the empty chains of iptables
// and src_valid_mark.
const stateScript = `
prune='/home /root /srv /tmp /var/cache /var/lib/cni /var/lib/containerd /var/lib/systemd /var/lib/tailscale /var/log /var/tmp'
find / -xdev \( $(printf -- '-path %s -o ' $prune) -false \) -prune -o -type d -printf 'file %p %M %U\n' -o -printf 'file %p %M %U %s\n'
find /run/headcni* /run/systemd/generator* -printf 'file %p\n' 2>/dev/null || true
nft list ruleset | sed 's/counter packets [0-9]* bytes [0-9]*/counter/' | awk '
	/^table/ { table = $2 " " $3; iptables = table ~ /^ip6? (filter|nat|mangle)$/ }
	iptables && /^table|^}|^$|^\tchain [A-Z]+ {|^\t}|policy accept;$/ { next }
	{ print "nft", table, $0 }'
for f in -4 -6; do
	ip $f rule | sed "s/^/rule $f /"
	ip $f route show table all | grep -v -e 'table 52' -e fe80 -e 'ff00::' | sed "s/^/route $f /"
done
ip -br link | sed 's/[@ ].*//; s/^/link /'
sysctl -a -r '^net\.ipv[46]\.(conf|ip_forward)' 2>/dev/null | grep -v -e stable_secret -e src_valid_mark | sed 's/^/sysctl /'
systemctl list-unit-files --no-legend --plain | grep -v ' transient' | awk '{ print "unit", $1, $2 }'
! systemctl is-active --quiet tailscaled || tailscale debug prefs | sed '/"Config"/,/}/d; s/\[\]/null/; s/^/prefs /'
`

func (m *machine) state() []string {
	m.t.Helper()
	return strings.Split(strings.TrimSpace(m.root(stateScript)), "\n")
}
