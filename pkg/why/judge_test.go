package why

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/headcni/headcni/internal/golden"
	"github.com/headcni/headcni/pkg/doctor"
	"github.com/headcni/headcni/pkg/findings"
	"github.com/headcni/headcni/pkg/nft"
	"github.com/headcni/headcni/pkg/nodestatus"
	"github.com/headcni/headcni/pkg/policy/report"
	"github.com/headcni/headcni/pkg/reconcile"
	"github.com/headcni/headcni/pkg/tailscale"
)

var (
	podA, podB = netip.MustParseAddr("10.244.1.7"), netip.MustParseAddr("10.244.7.3")
	moment     = time.Date(2026, 11, 29, 14, 2, 0, 0, time.UTC)
)

func explained(verdict report.Verdict, direction string, isolating ...string) *report.Explanation {
	n := uint64(41)
	return &report.Explanation{Answers: []report.Answer{{Verdict: verdict, Sides: []report.Side{
		{Direction: direction, Of: "cart/redis-0", Verdict: verdict, Isolating: isolating, Denied: &n},
	}}}}
}

// well is a connection from a pod to one of another node, where all is well.
func well() Case {
	yes := true
	daemon := func() *nodestatus.Status { return &nodestatus.Status{Policy: &nodestatus.Policy{InForce: true}} }
	far := Side{
		Node: "home-1", Src: podA, Dst: podB, Daemon: daemon(), Link: &Link{Name: "hc2", Pod: "cart/redis-0", Up: true, Carrier: true, MTU: 1280},
		There: Route{Dev: "hc2", Table: 254}, Back: Route{Dev: "headcni01", Table: 52}, Guard: Guard{SrcCluster: true, DstCluster: true}, Port: portOpen,
		Policy: explained(report.Allowed, "ingress"),
		Tailnet: Tailnet{State: tailscale.Running, Name: "home-1", IPs: ips(7), Tun: "headcni01", Advertised: routes(7), Routes: routes(7), Online: true,
			Holder: &Peer{Name: "fra-1", IPs: ips(1), Path: pathDirect}, Accepts: &yes, Pairs: true, KnowsSrc: true, KnowsDst: true},
	}
	far.DstLink = far.Link
	return Case{
		From: End{Name: "shop/web-6f9", Addr: podA, Node: "fra-1", Pod: true}, To: End{Name: "cart/redis-0", Addr: podB, Node: "home-1", Pod: true},
		Question: Question{Protocol: tcp, Port: 6379}, Now: moment, Far: &far, HeadscaleError: "no API key for it is here",
		Near: Side{
			Node: "fra-1", Src: podA, Dst: podB, SeenAs: podA, Daemon: daemon(), Link: &Link{Name: "hc1", Pod: "shop/web-6f9", Up: true, Carrier: true, MTU: 1280},
			There: Route{Dev: "headcni01", Table: 52}, Back: Route{Dev: "hc1", Table: 254}, Guard: Guard{SrcCluster: true, DstCluster: true},
			Policy: explained(report.Allowed, "egress"),
			Tailnet: Tailnet{State: tailscale.Running, Name: "fra-1", IPs: ips(1), Tun: "headcni01", Advertised: routes(1), Routes: routes(1), Online: true,
				Holder: &Peer{Name: "home-1", IPs: ips(7), Path: pathDirect, Endpoint: "203.0.113.9:41641", Millis: 18.2, Handshake: moment.Add(-40 * time.Second)}},
		},
	}
}

// outside has the receiver be somebody of the tailnet who is no node.
func (c *Case) outside(addr string) {
	a := netip.MustParseAddr(addr)
	c.To = End{Name: addr, Addr: a, Outside: true}
	c.Near.Dst, c.Near.Guard.DstCluster, c.Far = a, false, nil
}

// Each thing that is wrong has its step, its finding and its remedy.
func TestJudge(t *testing.T) {
	unreachable := Route{Error: "network is unreachable", Unreachable: true}
	dark := func(c *Case) { c.Near.There, c.Near.Tailnet.Holder = unreachable, nil }
	unapproved := func(c *Case) { dark(c); c.Far.Tailnet.Routes = nil }
	no := false
	refuses := func(c *Case, pairs, src, dst bool) {
		f := &c.Far.Tailnet
		f.Accepts, f.Pairs, f.KnowsSrc, f.KnowsDst = &no, pairs, src, dst
	}
	for name, c := range map[string]struct {
		change func(*Case)
		want   Verdict
		step   string // name and place of the one that decides
		id     findings.ID
		remedy string
	}{
		"all well":            {func(*Case) {}, Yes, "", "", ""},
		"no link":             {func(c *Case) { c.Near.Link = nil }, NoWay, "pod fra-1", findings.PodNoLink, "kubectl describe pod"},
		"the link is down":    {func(c *Case) { c.Near.Link.Up = false }, NoWay, "pod fra-1", findings.PodLinkDown, "ip link set hc1 up"},
		"the pod's end is":    {func(c *Case) { c.Near.Link.Carrier = false }, NoWay, "pod fra-1", findings.PodLinkDown, "ip link set eth0 up"},
		"no lease":            {func(c *Case) { c.Near.Link.Lease = &no }, Yes, "", findings.NoLease, "ipam check"},
		"egress is denied":    {func(c *Case) { c.Near.Policy = explained(report.Denied, "egress", "shop/quiet") }, NoWay, "policy egress fra-1", findings.PolicyDenies, "kubectl -n shop edit networkpolicy quiet"},
		"ingress is denied":   {func(c *Case) { c.Far.Policy = explained(report.Denied, "ingress", "cart/db-only") }, NoWay, "policy ingress home-1", findings.PolicyDenies, "kubectl -n cart edit networkpolicy db-only"},
		"policies unknown":    {func(c *Case) { c.Far.Policy = explained(report.Denied, "ingress") }, NoWay, "policy ingress home-1", findings.PolicyWaits, "API server"},
		"the kernel differs":  {func(c *Case) { c.Far.Policy.Answers[0].Sides[0].Kernel.Differences = []report.Difference{{Src: podA}} }, NoWay, "policy ingress home-1", findings.Contradiction, "sysdump"},
		"not enforced":        {func(c *Case) { c.Near.Daemon.Policy, c.Far.Daemon.Policy = nil, nil }, Yes, "", "", ""},
		"rules are gone":      {func(c *Case) { c.Near.There = Route{Dev: "eth0", Table: 254} }, NoWay, "rules fra-1", findings.RoutingRules, "ip rule"},
		"table 52 is flushed": {func(c *Case) { c.Near.There = unreachable }, NoWay, "rules fra-1", findings.TunnelRoutes, "restart tailscaled"},
		"routes were taken back": {func(c *Case) {
			c.Near.There = unreachable
			c.Near.Daemon.Parts = []reconcile.Status{{Name: "routes", Findings: []reconcile.Found{{ID: findings.TakenBack, Text: "cut off"}}}}
		}, NoWay, "rules fra-1", findings.TakenBack, "lanFirst"},
		"no tables":          {func(c *Case) { c.Near.Guard = Guard{Error: "no such table"} }, Yes, "", findings.FirewallRules, "restart headcni-daemon"},
		"outside the ranges": {func(c *Case) { c.Near.Guard.DstCluster = false }, NoWay, "guard fra-1", findings.RangeOutside, "network.clusterCIDRs"},
		"a subnet nobody named": {func(c *Case) {
			c.outside("192.168.50.10")
			c.Near.Guard.Refuses, c.Near.Tailnet.Holder.Routes = nft.DropTailnetSubnet, []netip.Prefix{netip.MustParsePrefix("192.168.0.0/16"), netip.MustParsePrefix("192.168.50.0/24")}
		}, NoWay, "guard fra-1", findings.SubnetDenied, "namespace shop headcni.io/tailnet-subnets=192.168.50.0/24"},
		"a device, and egress is denied": {func(c *Case) { c.outside("100.64.0.9"); c.Near.Guard.Refuses = nft.DropTailnetEgress }, NoWay, "guard fra-1", findings.EgressDenied, "network.tailnetEgress"},
		"a foreign firewall": {func(c *Case) {
			c.Far.Daemon.Parts = []reconcile.Status{{Name: "foreign", Findings: []reconcile.Found{{ID: findings.ForeignFirewall, Text: "chain x drops"}}}}
		}, NoWay, "guard home-1", findings.ForeignFirewall, "firewall-cmd"},
		"tailscaled is dead here": {func(c *Case) { dark(c); c.Near.Tailnet = Tailnet{Error: "dead"} }, NoWay, "tailnet fra-1", findings.TailscaledSilent, "systemctl start"},
		"it is there":             {func(c *Case) { c.Far.Tailnet = Tailnet{Error: "dead"} }, NoWay, "tailnet home-1", findings.TailscaledSilent, "systemctl start"},
		"it is stopped":           {func(c *Case) { dark(c); c.Near.Tailnet.State = tailscale.Stopped }, NoWay, "tailnet fra-1", findings.TailscaledStopped, "tailscale up"},
		"not logged in":           {func(c *Case) { c.Far.Tailnet.State = tailscale.NeedsLogin }, NoWay, "tailnet home-1", findings.NotInTailnet, "key joined"},
		"offline":                 {func(c *Case) { c.Near.Tailnet.Holder.Path = pathOffline }, NoWay, "tailnet fra-1", findings.PeerOffline, "reaches Headscale"},
		"silent":                  {func(c *Case) { c.Near.Tailnet.Holder.Path = pathSilent }, NoWay, "tailnet fra-1", findings.PeerSilent, "netcheck"},
		"relayed":                 {func(c *Case) { c.Near.Tailnet.Holder.Path = pathRelayed }, Yes, "", findings.PeerRelayed, "41641"},
		"not approved":            {unapproved, NoWay, "Headscale home-1", findings.NotApproved, "approve-routes"},
		"not approved, by Headscale's word": {func(c *Case) {
			dark(c)
			c.Headscale = &Headscale{Nodes: []Approval{{ID: "3", Name: "home-1", Offered: routes(7), Approved: routes(8)}}}
		}, NoWay, "Headscale home-1", findings.NotApproved, "headscale nodes approve-routes -i 3 -r 10.244.8.0/24,10.244.7.0/24"},
		"the policy hides the route": {func(c *Case) {
			dark(c)
			refuses(c, false, false, false)
			c.Headscale = &Headscale{Nodes: []Approval{{ID: "3", Name: "home-1", Offered: routes(7), Approved: routes(7), Online: true}}}
		}, NoWay, "Headscale home-1", findings.PolicyLacksRanges, `"10.244.7.0/24:*"`},
		"the same, and Headscale cannot be asked": {func(c *Case) { dark(c); refuses(c, false, false, false) }, NoWay, "Headscale home-1", findings.PolicyLacksRanges, `"10.244.7.0/24:*"`},
		"approved, and away": {func(c *Case) {
			dark(c)
			c.Headscale = &Headscale{Nodes: []Approval{{ID: "3", Name: "home-1", Offered: routes(7), Approved: routes(7)}}}
		}, NoWay, "Headscale home-1", findings.RoutedElsewhere, "headscale nodes list"},
		"not advertised":                 {func(c *Case) { dark(c); c.Far.Tailnet.Advertised = nil }, NoWay, "Headscale home-1", findings.Prefs, "restart headcni-daemon on home-1"},
		"the sender's is not":            {func(c *Case) { c.Far.Tailnet.Holder = nil }, NoWay, "Headscale fra-1", findings.NotApproved, "approve-routes"},
		"approved for another":           {func(c *Case) { c.Near.Tailnet.Holder.IPs = ips(9) }, NoWay, "Headscale home-1", findings.RoutedElsewhere, ""},
		"the policy lacks ranges":        {func(c *Case) { refuses(c, false, false, true) }, NoWay, "Headscale home-1", findings.PolicyLacksRanges, `"src": ["10.244.1.0/24", "10.244.7.0/24"]`},
		"the policy refuses":             {func(c *Case) { refuses(c, false, true, true) }, NoWay, "Headscale home-1", findings.PolicyRefuses, "add to acls"},
		"on this port":                   {func(c *Case) { refuses(c, true, true, true) }, NoWay, "Headscale home-1", findings.PolicyRefuses, "add the port"},
		"no filter is told":              {func(c *Case) { c.Far.Tailnet.FilterError, c.Far.Tailnet.Accepts = "old", nil }, Unsure, "Headscale home-1", "", ""},
		"the way back":                   {func(c *Case) { c.Far.Back.Dev = "eth0" }, NoWay, "guard home-1", findings.RoutingRules, "ip rule"},
		"the far pod's route":            {func(c *Case) { c.Far.There = Route{Dev: "eth0"} }, NoWay, "guard home-1", findings.RoutingRules, "ip rule"},
		"the far link is down":           {func(c *Case) { c.Far.Link.Carrier = false }, NoWay, "pod home-1", findings.PodLinkDown, "ip link set eth0 up"},
		"no far link":                    {func(c *Case) { c.Far.Link, c.Far.DstLink, c.Far.Policy = nil, nil, nil }, NoWay, "pod home-1", findings.PodNoLink, "kubectl describe pod"},
		"nobody listens":                 {func(c *Case) { c.Far.Port = portRefused }, NoWay, "pod home-1", findings.NobodyListens, "listens on"},
		"nobody answers":                 {func(c *Case) { c.Far.Port, c.Far.PortError = portSilent, "timeout" }, NoWay, "pod home-1", findings.NobodyListens, "firewall inside"},
		"the far node is silent":         {func(c *Case) { c.Far, c.FarError = nil, "not ready since 14:02" }, Unsure, "Headscale home-1", "", ""},
		"a dead daemon":                  {func(c *Case) { c.Far.Daemon, c.Far.DaemonError, c.Far.PolicyTable = nil, "connection refused", true }, Unsure, "policy ingress home-1", "", ""},
		"a dead daemon, and no policies": {func(c *Case) { c.Far.Daemon = nil }, Yes, "", "", ""},
		"to somebody outside": {func(c *Case) {
			c.To, c.Far = End{Name: "192.0.2.1", Outside: true}, nil
			c.Near.There, c.Near.Guard.DstCluster, c.Near.Tailnet.Holder = Route{Dev: "eth0"}, false, nil
		}, Unsure, "receiver 192.0.2.1", "", ""},
		"on the same node": {func(c *Case) {
			c.To.Node, c.Far = "fra-1", nil
			c.Near.DstLink, c.Near.There, c.Near.Port = &Link{Name: "hc2", Up: true, Carrier: true}, Route{Dev: "hc2"}, portOpen
		}, Yes, "", "", ""},
		"on the same node, denied": {func(c *Case) {
			c.To.Node, c.Far = "fra-1", nil
			c.Near.DstLink, c.Near.There, c.Near.Port = &Link{Name: "hc2", Up: true, Carrier: true}, Route{Dev: "hc2"}, portOpen
			c.Near.Policy = explained(report.Denied, "ingress", "cart/db-only")
		}, NoWay, "policy ingress fra-1", findings.PolicyDenies, "db-only"},
	} {
		one := well()
		c.change(&one)
		r := Judge("1", one)
		step := ""
		if r.Step > 0 {
			step = r.Steps[r.Step-1].Name + " " + r.Steps[r.Step-1].Where
		}
		var b strings.Builder
		if err := r.Print(&b, 0); err != nil {
			t.Fatal(err)
		}
		if r.Verdict != c.want || step != c.step || r.OK != (c.want == Yes) {
			t.Errorf("%s: %s at %q, want %s at %q:\n%s", name, r.Verdict, step, c.want, c.step, b.String())
		}
		if c.id == "" != (len(r.Findings) == 0) {
			t.Errorf("%s: %+v", name, r.Findings)
		}
		if c.id != "" && len(r.Findings) > 0 {
			known, ok := findings.Of(r.Findings[0].ID)
			if f := r.Findings[0]; f.ID != c.id || !ok || f.Title != known.Title || !strings.Contains(f.Remedy, c.remedy) || f.Cause == "" {
				t.Errorf("%s: %+v, want %s and %q", name, f, c.id, c.remedy)
			}
		}
		for line := range strings.Lines(b.String()) {
			if utf8.RuneCountInString(line) > 81 || strings.Contains(line, "\x1b") {
				t.Errorf("%s: too wide, or with colours: %q", name, line)
			}
		}
	}
}

func TestReportText(t *testing.T) {
	var b strings.Builder
	denied, silent, relayed := well(), well(), well()
	denied.Far.Policy, denied.Far.Port = explained(report.Denied, "ingress", "cart/db-only"), portRefused
	silent.Far, silent.FarError = nil, "node home-1 (not ready since 2026-11-29 14:02:00): ask pod headcni-x: no answer in time"
	relayed.Near.Tailnet.Holder.Path, relayed.Near.Tailnet.Holder.Endpoint = pathRelayed, "fra"
	for _, c := range []Case{well(), denied, silent, relayed} {
		r := Judge("1", c)
		for _, s := range r.Steps {
			for i, f := range s.Findings {
				if known, _ := findings.Of(f.ID); known.Remedy == f.Remedy {
					s.Findings[i].Remedy = "what " + string(f.ID) + " says, whose words may change." // package findings' own
				}
			}
		}
		if err := r.Print(&b, 0); err != nil {
			t.Fatal(err)
		}
		b.WriteString("---\n")
	}
	golden.Check(t, "testdata/why.txt", b.String())
}

func TestBook(t *testing.T) {
	pod := func(name, node, phase string, ips ...string) *corev1.Pod {
		p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name}, Spec: corev1.PodSpec{NodeName: node}, Status: corev1.PodStatus{Phase: corev1.PodPhase(phase)}}
		for _, ip := range ips {
			p.Status.PodIPs = append(p.Status.PodIPs, corev1.PodIP{IP: ip})
		}
		return p
	}
	host := pod("host", "a", "Running", "192.0.2.11")
	host.Spec.HostNetwork = true
	pods := map[string]*corev1.Pod{
		"web": pod("web", "a", "Running", "10.244.1.7", "fd00:244:1::7"), "host": host, "new": pod("new", "a", "Pending"), "homeless": pod("homeless", "", "Pending"),
		"over": pod("over", "a", "Succeeded", "10.244.1.8"), "elsewhere": pod("elsewhere", "windows", "Running", "10.244.9.1"),
	}
	b := book{namespace: "shop", nodes: []doctor.Node{{Name: "a", PodCIDRs: routes(1), Addrs: []netip.Addr{netip.MustParseAddr("192.0.2.11")}}},
		pod: func(_ context.Context, namespace, name string) (*corev1.Pod, error) {
			resource := schema.GroupResource{Resource: "pods"}
			switch {
			case namespace == "secret":
				return nil, apierrors.NewForbidden(resource, name, errors.New("no"))
			case pods[name] == nil || namespace != "shop":
				return nil, apierrors.NewNotFound(resource, name)
			}
			return pods[name], nil
		}}
	for text, want := range map[string]string{
		"web": "shop/web on a, a pod", "shop/web": "shop/web on a, a pod", "10.244.1.9": "10.244.1.9 on a, a pod", "192.0.2.11": "192.0.2.11 on a", "node/a": "node/a on a",
		"host": "shop/host on a", "laptop": "laptop outside", "192.0.2.99": "192.0.2.99 outside",
		"shop/none": "there is no pod shop/none", "a": "is node/a", "node/b": `there is no Node "b": there are a`, "svc/web": "kube-proxy chooses", "secret/x": "the right to get pods in namespace secret",
		"new": "has no address yet", "homeless": "has no node yet", "over": "has ended", "elsewhere": `there is no Node "windows"`,
	} {
		f, err := b.find(t.Context(), text)
		got := f.Name
		switch {
		case err != nil:
			got = err.Error()
		case f.Outside:
			got += " outside"
		default:
			got += " on " + f.Node
			if f.Pod {
				got += ", a pod"
			}
		}
		if !strings.Contains(got, want) || err == nil && got != want {
			t.Errorf("%s: %s, want %s", text, got, want)
		}
	}
	six := found{End: End{Name: "six", Pod: true}, addrs: []netip.Addr{netip.MustParseAddr("fd00:244:2::1")}}
	both, _ := b.find(t.Context(), "web")
	if src, dst, err := pair(both, six); err != nil || src != "fd00:244:1::7" || dst != "fd00:244:2::1" {
		t.Errorf("%s -> %s, %v", src, dst, err)
	}
	if _, _, err := pair(six, b.at(podA)); err == nil {
		t.Error("IPv6 alone reaches IPv4")
	}
}
