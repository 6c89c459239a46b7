package tailnet

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
	"github.com/headcni/headcni/pkg/findings"
	"github.com/headcni/headcni/pkg/why"
	"github.com/headcni/headcni/pkg/why/live"
)

// Who reaches whom, as tailscaled finds by pings: a peer that is there, and one that has gone.
func TestPeers(t *testing.T) {
	l := labtest.New(t, lab.Options{Nodes: 2, Bin: labtest.Programs(t)})
	a, b := l.Nodes[0], l.Nodes[1]
	path := func(want, code string) {
		t.Helper()
		labtest.Eventually(t, want, func() error {
			out, got := ctl(t, a, "peers -o json --strict")
			var m why.Mesh
			if err := json.Unmarshal([]byte(out), &m); err != nil || len(m.Nodes) != 1 || len(m.Nodes[0].Peers.Peers) != 1 {
				return fmt.Errorf("exit code %s, %v: %s", got, err, out)
			}
			p := m.Nodes[0].Peers.Peers[0]
			if p.Path != want || got != code || p.Name != "node-2" || (p.Millis > 0) != (want == "direct") {
				return fmt.Errorf("exit code %s of %s", got, out)
			}
			text, _ := ctl(t, a, "peers")
			if !strings.Contains(text, "node-2") || !strings.Contains(text, want) {
				return fmt.Errorf("the text does not say it:\n%s", text)
			}
			t.Log(text)
			return nil
		})
	}
	path("direct", "0")
	labtest.Stop(t, b.Tailscaled)
	path("offline", "3")
	labtest.Stop(t, a.Tailscaled)
	if out, code := ctl(t, a, "peers"); code != "2" || !strings.Contains(out, "no tailscaled answers") {
		t.Errorf("without tailscaled: exit code %s of %s", code, out)
	}
}

// ask has one node run commands on another, as ssh would, by a script: with what they read and write as it comes. It returns the script's path.
func ask(t *testing.T, from, other *lab.Node) string {
	t.Helper()
	l := labtest.Listen(t, from, netip.MustParseAddrPort("127.0.0.1:0"))
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return // closed
			}
			go serve(t, c, other)
		}
	}()
	script := fmt.Sprintf("#!/bin/bash\nexec 3<>/dev/tcp/127.0.0.1/%d\necho \"$@\" >&3\n{ cat; echo end; } >&3 &\ncat <&3\n", netip.MustParseAddrPort(l.Addr().String()).Port())
	if err := os.WriteFile(from.Path("/run/ask"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	return "/run/ask"
}

// serve runs what the first line says. The command's input ends with a line "end".
func serve(t *testing.T, c net.Conn, n *lab.Node) {
	defer c.Close()
	lines := bufio.NewScanner(c)
	lines.Scan()
	words := strings.Fields(lines.Text())
	if len(words) < 2 || words[0] != n.Name {
		return
	}
	args := append([]string{"-t", strconv.Itoa(n.PID()), "-m", "-n", "-u", "-i", "-p", n.Find(words[1])}, words[2:]...)
	cmd := exec.CommandContext(labtest.Within(t), "nsenter", args...)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Error(err)
		return
	}
	cmd.Stdout = c
	go func() {
		for lines.Scan() && lines.Text() != "end" {
			fmt.Fprintln(in, lines.Text())
		}
		in.Close()
	}()
	if err := cmd.Run(); err != nil {
		t.Log(n.Name, words, err)
	}
}

// whyWorld are two nodes with the pods web and beside on the first, db on the other, and what runs a command on that from the first.
func whyWorld(t *testing.T) (l *lab.Lab, via string, web, db *lab.Pod) {
	t.Helper()
	l = labtest.New(t, lab.Options{Nodes: 2, Bin: labtest.Programs(t)})
	a, b := l.Nodes[0], l.Nodes[1]
	via = ask(t, a, b)
	web, db = labtest.AddPod(t, a, "web", lab.PodOptions{}), labtest.AddPod(t, b, "db", lab.PodOptions{})
	labtest.AddPod(t, a, "beside", lab.PodOptions{})
	return l, via, web, db
}

// Step by step from one node's pod to another's: yes where all is well, and for each thing that is broken the step, the finding and what
// mends it.
func TestWhy(t *testing.T) {
	l, via, web, db := whyWorld(t)
	a, b := l.Nodes[0], l.Nodes[1]
	answer := func(args string) (why.Report, string, string) {
		t.Helper()
		out, code := ctl(t, a, "why -o json "+args)
		var r why.Report
		if err := json.Unmarshal([]byte(out), &r); err != nil {
			return r, out, code
		}
		text, _ := ctl(t, a, "why "+args)
		return r, text, code
	}
	yes := func(what, args string, steps int) {
		t.Helper()
		labtest.Eventually(t, what, func() error {
			r, text, code := answer(args)
			if code != "0" || r.Verdict != why.Yes || len(r.Findings) > 0 || len(r.Steps) != steps || !strings.HasSuffix(text, "\nYES\n") {
				return fmt.Errorf("exit code %s, %d steps, of\n%s", code, len(r.Steps), text)
			}
			t.Logf("%s:\n%s", what, text)
			return nil
		})
	}
	// no wants a step's name and place, the finding, and a word of the remedy.
	no := func(what, args, step, where string, id findings.ID, remedy string) {
		t.Helper()
		labtest.Eventually(t, what, func() error {
			r, text, code := answer(args)
			if code != "1" || r.Verdict != why.NoWay || r.Step == 0 {
				return fmt.Errorf("exit code %s of\n%s", code, text)
			}
			s := r.Steps[r.Step-1]
			if s.Name != step || s.Where != where || s.Findings[0].ID != id || !strings.Contains(s.Findings[0].Remedy, remedy) {
				return fmt.Errorf("step %d, %s of %s: %+v\n%s", r.Step, s.Name, s.Where, s.Findings, text)
			}
			t.Logf("%s:\n%s", what, text)
			return nil
		})
	}
	const port = " --port 80"
	far := "--via '" + via + " {}'"
	toDB := fmt.Sprintf("lab/web %s %s", db.Addr(false), far)
	yes("a pod of another node", toDB+port, 9)
	yes("the same by IPv6", fmt.Sprintf("lab/web %s %s", db.Addr(true), far)+port, 9)
	yes("UDP", toDB+" --port 7/udp", 9)
	yes("ICMP", toDB, 9)
	yes("a pod of the same node", "lab/web lab/beside"+port, 6)
	yes("from the node", fmt.Sprintf("node %s %s", db.Addr(false), far)+port, 8)
	ping := fmt.Sprintf("ping lab/web %s -c 3", db.Addr(false))
	if out, code := ctl(t, a, ping); code != "0" || !strings.Contains(out, "lab/web -> ") || !strings.Contains(out, "3 of 3 answered") || !strings.Contains(out, "node-2 direct") {
		t.Errorf("ping: exit code %s of\n%s", code, out)
	}
	if out, code := ctl(t, a, ping+" --size 1500"); code != "1" || !strings.Contains(out, "0 of 3 answered") || !strings.Contains(out, "more than the link or the path carries") {
		t.Errorf("ping with more than the tunnel's MTU: exit code %s of\n%s", code, out)
	}
	no("a port that nobody listens on", toDB+" --port 81", "pod", "node-2", findings.NobodyListens, "listens")
	no("of a pod beside", "lab/web lab/beside --port 81", "pod", "node-1", findings.NobodyListens, "listens")
	if out, code := ctl(t, a, fmt.Sprintf("why lab/web %s --port 80", db.Addr(false))); code != "2" || !strings.Contains(out, "COULD NOT LOOK") || !strings.Contains(out, "--via") {
		t.Errorf("without a way to the other node: exit code %s of\n%s", code, out)
	}
	if out, code := ctl(t, a, "why lab/nobody 192.0.2.1"); code != "2" || !strings.Contains(out, "no pod of this node (lab/beside, lab/web)") {
		t.Errorf("an unknown pod: exit code %s of\n%s", code, out)
	}
	no("an address that no pod has", fmt.Sprintf("lab/web %s %s", b.PodCIDRs[0].Addr().Next().Next().Next().Next().Next().Next().Next(), far)+port, "pod", "node-2", findings.PodNoLink, "kubectl describe pod")

	labtest.Stop(t, b.Tailscaled)
	no("the other's tailscaled has ended", toDB+port, "tailnet", "node-2", findings.TailscaledSilent, "systemctl start headcni-tailscaled")
	labtest.StartTailscaled(t, b)
	yes("it runs again", toDB+port, 9)
	labtest.Stop(t, a.Tailscaled)
	no("this node's has", toDB+port, "tailnet", "node-1", findings.TailscaledSilent, "systemctl start tailscaled")
	labtest.StartTailscaled(t, a)
	yes("it runs again", toDB+port, 9)

	// The daemon would mend what follows.
	labtest.Stop(t, a.Daemon)
	labtest.Sh(t, a.Machine, "ip route flush table 52")
	no("tailscaled's routes are flushed", toDB+port, "rules", "node-1", findings.TunnelRoutes, "restart tailscaled")
	labtest.Sh(t, a.Machine, "nft delete table ip headcni")
	labtest.StartDaemon(t, a)
	yes("the daemon runs again", toDB+port, 9)
	labtest.Stop(t, a.Daemon)
	labtest.Sh(t, a.Machine, "nft delete table ip headcni")
	if r, text, code := answer(toDB + port); code != "0" || r.Verdict != why.Yes || len(r.Findings) != 1 || r.Findings[0].ID != findings.FirewallRules {
		t.Errorf("without our nftables, which keep nothing that is in the tunnel: exit code %s of\n%s", code, text)
	}
	labtest.StartDaemon(t, a)

	labtest.Stop(t, b.Daemon)
	api := labtest.Headscale(t, l)
	node, err := labtest.Registered(t, l, b)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := api.ApproveRoutes(t.Context(), node, nil, node.Approved); err != nil {
		t.Fatal(err)
	}
	no("the route is not approved", toDB+port, "Headscale", "node-2", findings.NotApproved, "headscale nodes approve-routes -i "+node.ID.String())
	labtest.StartDaemon(t, b)
	yes("it is approved", toDB+port, 9)

	path := l.Control.Path("/etc/headscale/policy.hujson")
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	policy := func(text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := l.Control.Headscale.Signal(syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
	}
	const owners = `{"tagOwners": {"tag:headcni": ["lab@"]}, "acls": [`
	policy(owners + `{"action": "accept", "src": ["tag:headcni"], "dst": ["tag:headcni:*"]}]}`)
	no("the policy lacks the pods' ranges", toDB+port, "Headscale", "node-2", findings.PolicyLacksRanges, `"10.244.2.0/24:*"`)
	policy(owners + `{"action": "accept", "src": ["tag:headcni", "10.244.0.0/16"], "dst": ["tag:headcni:*", "10.244.0.0/16:443"]}]}`)
	no("it has another port", toDB+port, "Headscale", "node-2", findings.PolicyRefuses, "add the port")
	policy(string(before))
	yes("with the right policy", toDB+port, 9)

	if _, err := db.Run(t.Context(), "ip", "link", "set", "eth0", "down"); err != nil {
		t.Fatal(err)
	}
	no("the other pod's link is down", toDB+port, "pod", "node-2", findings.PodLinkDown, "ip link set eth0 up")
	if _, err := web.Run(t.Context(), "ip", "link", "set", "eth0", "down"); err != nil {
		t.Fatal(err)
	}
	no("the pod's own is", "lab/web lab/beside"+port, "pod", "node-1", findings.PodLinkDown, "ip link set eth0 up")
}

// A packet that is sent says where it was lost: in rules of ours, in others', in the tailnet, at a port. Where it gets through, it is so, whoever
// could not be asked.
func TestWhyLive(t *testing.T) {
	l, via, web, db := whyWorld(t)
	a, b := l.Nodes[0], l.Nodes[1]
	// As in a container, where pods' network namespaces have no names.
	const contained = `unshare -m sh -c 'mount -t tmpfs none /run/netns && exec env -u KUBECONFIG HOME=/nonexistent headcnictl "$@"' sh `
	var out string
	run := func(inside bool, args string) (r why.Report, code string) {
		t.Helper()
		if inside {
			out, code = ctl(t, a, "why --live -o json "+args)
		} else {
			out = labtest.Sh(t, a.Machine, "code=0; %s why --live -o json %s 2>&1 || code=$?; echo exit $code", contained, args)
			i := strings.LastIndex(out, "exit ")
			out, code = out[:i], strings.TrimSpace(out[i+len("exit "):])
		}
		if err := json.Unmarshal([]byte(out), &r); err != nil {
			t.Logf("%v in %s", err, out)
		}
		return r, code
	}
	// ends wants the verdict, and of the last step of the packet its place ("" for any), state, a word, and the finding, "" for none.
	ends := func(what, args, code, where string, state why.State, word string, id findings.ID) {
		t.Helper()
		for _, inside := range []bool{true, false} {
			labtest.Eventually(t, what, func() error {
				r, got := run(inside, args)
				if got != code || len(r.Steps) == 0 || r.Live == nil {
					return fmt.Errorf("exit code %s of %s", got, out)
				}
				s := r.Steps[len(r.Steps)-1]
				var found findings.ID
				if len(s.Findings) > 0 {
					found = s.Findings[0].ID
				}
				from := live.FromLink
				if inside {
					from = live.FromNamespace
				}
				if strings.HasPrefix(args, "node ") {
					from = live.FromNode
				}
				if s.Name != "live" || where != "" && s.Where != where || s.State != state || !strings.Contains(s.Text, word) || found != id || r.Live.Near.From != from {
					return fmt.Errorf("exit code %s, sent from %s, %+v of %s", got, r.Live.Near.From, s, out)
				}
				var text strings.Builder
				if err := r.Print(&text, 0); err != nil {
					return err
				}
				t.Logf("%s:\n%s", what, text.String())
				return nil
			})
		}
		if left := labtest.Sh(t, a.Machine, "ip -br link show type veth | grep -c headcni-why || true"); strings.TrimSpace(left) != "0" {
			t.Errorf("%s left links: %s", what, left)
		}
	}
	far := "--via '" + via + " {}'"
	toDB, toDB6 := fmt.Sprintf("lab/web %s %s", db.Addr(false), far), fmt.Sprintf("lab/web %s %s", db.Addr(true), far)
	const answered = "the answer came back"
	ends("TCP", toDB+" --port 80", "0", "node-2", why.OK, answered, "")
	ends("TCP by IPv6", toDB6+" --port 80", "0", "node-2", why.OK, answered, "")
	ends("ICMP", toDB, "0", "node-2", why.OK, answered, "")
	ends("ICMP by IPv6", toDB6, "0", "node-2", why.OK, answered, "")
	ends("UDP", toDB+" --port 7/udp", "0", "node-2", why.OK, "", "")
	ends("a pod of the same node", "lab/web lab/beside --port 80", "0", "node-1", why.OK, answered, "")
	ends("from the node", fmt.Sprintf("node %s %s --port 80", db.Addr(false), far), "0", "node-2", why.OK, answered, "")
	// Nobody can be asked there, and it got through.
	ends("without a way to the other node", fmt.Sprintf("lab/web %s --port 80", db.Addr(false)), "0", "node-2", why.OK, answered, "")
	ends("a port that nobody listens on", toDB+" --port 81", "1", "node-2", why.Follows, "refused", "")
	ends("the same by UDP", toDB6+" --port 81/udp", "1", "node-2", why.Follows, "refused", "")

	// What no step above looks at.
	labtest.Sh(t, b.Machine, "nft 'add table inet other; add chain inet other f { type filter hook forward priority -20; }; add rule inet other f tcp dport 80 drop'")
	ends("another firewall at the far node", toDB+" --port 80", "1", "node-2", why.No, "and not out by hc", findings.Lost)
	labtest.Sh(t, b.Machine, "nft delete table inet other")
	labtest.Sh(t, a.Machine, "nft 'add table inet other; add chain inet other f { type filter hook forward priority -20; }; add rule inet other f iifname headcni01 tcp sport 80 drop; add rule inet other f iifname tailscale0 tcp sport 80 drop'")
	ends("the answer is lost", toDB+" --port 80", "1", "node-1", why.No, "the answer came in by", findings.Lost)
	labtest.Sh(t, a.Machine, "nft delete table inet other")
	if _, err := db.Run(t.Context(), "nft", "add table inet f; add chain inet f i { type filter hook input priority 0; }; add rule inet f i ip saddr "+web.Addr(false).String()+" drop"); err != nil {
		t.Fatal(err)
	}
	ends("a firewall inside the pod", toDB+" --port 80", "1", "node-2", why.No, "no answer came in by hc", findings.Lost)
	if _, err := db.Run(t.Context(), "nft", "delete table inet f"); err != nil {
		t.Fatal(err)
	}

	// The guard: its counter says so, and so does the step.
	egress := func(change func(*lab.Node, map[string]any)) {
		t.Helper()
		labtest.Stop(t, a.Daemon)
		if err := a.ConfigureDaemon(change); err != nil {
			t.Fatal(err)
		}
		labtest.StartDaemon(t, a)
	}
	egress(func(_ *lab.Node, c map[string]any) { labtest.Section(c, "network")["tailnetEgress"] = "deny" })
	ends("the guard denies what is outside the cluster", fmt.Sprintf("lab/web node-2 %s", far), "1", "node-1", why.Follows, "the guard's counter tailnet_egress moved by", "")
	egress(nil)
	ends("the guard as it was", toDB+" --port 80", "0", "node-2", why.OK, answered, "")

	labtest.Stop(t, b.Tailscaled)
	// Where it is lost depends on whether Headscale has taken the node's routes back yet.
	ends("the tunnel is dead at the far end", toDB+" --port 80", "1", "", why.Follows, "and not ", "")
	if _, err := web.Run(t.Context(), "ip", "link", "set", "eth0", "down"); err != nil {
		t.Fatal(err)
	}
	if r, code := run(true, toDB); code != "1" || r.Live == nil || !strings.Contains(r.Live.Near.Error, "is down") {
		t.Errorf("with the pod's link down: exit code %s of %s", code, out)
	}
}
