package tailnet

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/headcni/headcni/internal/lab"
	"github.com/headcni/headcni/internal/labtest"
	"github.com/headcni/headcni/pkg/findings"
	"github.com/headcni/headcni/pkg/why"
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

// ask has one node run commands on others, as ssh would, by a script. It returns the script's path.
func ask(t *testing.T, from *lab.Node, others ...*lab.Node) string {
	t.Helper()
	l := labtest.Listen(t, from, netip.MustParseAddrPort("127.0.0.1:0"))
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return // closed
			}
			line, _ := bufio.NewReader(c).ReadString('\n')
			words := strings.Fields(line)
			for _, n := range others {
				if n.Name == words[0] {
					out, err := n.Run(labtest.Within(t), words[1], words[2:]...)
					if err != nil {
						t.Log(n.Name, words, err)
					}
					fmt.Fprint(c, out)
				}
			}
			c.Close()
		}
	}()
	script := fmt.Sprintf("#!/bin/bash\nexec 3<>/dev/tcp/127.0.0.1/%d\necho \"$@\" >&3\ncat <&3\n", netip.MustParseAddrPort(l.Addr().String()).Port())
	if err := os.WriteFile(from.Path("/run/ask"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	return "/run/ask"
}

// Step by step from one node's pod to another's: yes where all is well, and for each thing that is broken the step, the finding and what
// mends it.
func TestWhy(t *testing.T) {
	l := labtest.New(t, lab.Options{Nodes: 2, Bin: labtest.Programs(t)})
	a, b := l.Nodes[0], l.Nodes[1]
	via := ask(t, a, b)
	web, db := labtest.AddPod(t, a, "web", lab.PodOptions{}), labtest.AddPod(t, b, "db", lab.PodOptions{})
	labtest.AddPod(t, a, "beside", lab.PodOptions{})
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
