package main

import (
	"encoding/json"
	"errors"
	"net/http"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/headcni/headcni/internal/daemontest"
	"github.com/headcni/headcni/pkg/nodestatus"
	"github.com/headcni/headcni/pkg/policy/report"
)

func asJSON(v ...any) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		for _, one := range v {
			_ = json.NewEncoder(w).Encode(one)
		}
	}
}

func TestPolicyExitCodes(t *testing.T) {
	pod := &report.End{Kind: "pod", Name: "shop/web", Node: "one", Addrs: []netip.Addr{netip.MustParseAddr("10.244.1.10")}}
	right := report.Explanation{Node: "one", Pod: pod, Answers: []report.Answer{{Sides: []report.Side{{Direction: "ingress", Kernel: report.Kernel{Asked: 3}}}}}}
	wrong := report.Explanation{Node: "one", Pod: pod, Answers: []report.Answer{{Sides: []report.Side{{Direction: "ingress", Kernel: report.Kernel{Error: "gone"}}}}}}
	var asked string
	socket := daemontest.Serve(t, nodestatus.Answers{Others: map[string]http.HandlerFunc{
		"GET " + report.ListPath: asJSON(report.List{Node: "one", Policies: 7}),
		"GET " + report.ExplainPath: func(w http.ResponseWriter, r *http.Request) {
			asked = r.URL.RawQuery
			switch r.URL.Query().Get("pod") {
			case "web":
				asJSON(right)(w, r)
			case "odd":
				asJSON(wrong)(w, r)
			default:
				http.Error(w, "there is no such pod", http.StatusUnprocessableEntity)
			}
		},
		"GET " + report.DropsPath: asJSON(report.Drops{Node: "one", DeniedUnknown: 3}),
		"GET " + report.FollowPath: asJSON(report.Event{Started: &report.Started{Node: "one", Note: "elsewhere"}}, report.Event{Lost: 4},
			report.Event{Drop: &report.Drop{Time: time.Unix(0, 0).UTC(), Direction: "egress", From: *pod, To: *pod, Port: "80/tcp", Isolating: []string{"shop/deny"}}},
			report.Event{Error: "the end"}),
	}})
	none := filepath.Join(t.TempDir(), "none")
	for name, c := range map[string]struct {
		socket, args string
		code         exitCode
		want         string
	}{
		"list":                        {socket, "policy list", 0, "7 policies in the cluster"},
		"list as JSON":                {socket, "policy list -o json", 0, `"policies": 7`},
		"list as something":           {socket, "policy list -o yaml", 2, "--output yaml: want text or json"},
		"list without a daemon":       {none, "policy list", 2, "is headcni-daemon running?"},
		"explain":                     {socket, "policy explain -n shop web --from b --port 80", 0, "pod shop/web on node one"},
		"explain as JSON":             {socket, "policy explain web -o json", 0, `"name": "shop/web"`},
		"the kernel differs":          {socket, "policy explain odd", 1, "THE KERNEL COULD NOT BE ASKED: gone"},
		"the kernel differs, as JSON": {socket, "policy explain odd --output=json", 1, `"error": "gone"`},
		"no such pod":                 {socket, "policy explain lost", 2, "headcnictl: there is no such pod"},
		"drops":                       {socket, "drops", 0, "3 packets of pods whose policies were not known yet"},
		"drops as JSON":               {socket, "drops -o json", 0, `"deniedUnknown": 3`},
		"drops, followed as JSON":     {socket, "drops -f -o json", 2, `"port":"80/tcp"`},
		"drops, followed to their end": {socket, "drops -f", 2, `elsewhere
node one logs what policies deny, at most ten packets a second of each kind; Ctrl-C ends it
4 packets are not shown: there were too many
00:00:00.000 egress  shop/web (10.244.1.10) -> shop/web (10.244.1.10) 80/tcp: isolated by shop/deny
headcnictl: the end
`},
	} {
		out, err := headcnictl(t, append(strings.Fields(c.args), "--socket", c.socket)...)
		var code exitCode
		if err != nil && !errors.As(err, &code) {
			t.Errorf("%s: %v", name, err)
		}
		if code != c.code || !strings.Contains(out, c.want) {
			t.Errorf("%s: exit code %d, want %d and %q in\n%s", name, code, c.code, c.want, out)
		}
	}
	if _, err := headcnictl(t, "policy", "explain", "-n", "shop", "web", "--from", "b", "--port", "80", "--socket", socket); err != nil || asked != "from=b&namespace=shop&pod=web&port=80&to=" {
		t.Errorf("%v, asked: %s", err, asked)
	}
	if _, err := headcnictl(t, "policy", "explain", "web", "--from", "a", "--to", "b", "--socket", socket); err == nil {
		t.Error("--from and --to together")
	}
}

// Of each side the node counts whose kernel was asked, whoever said more.
func TestBothSides(t *testing.T) {
	side := func(of string, asked int) report.Side {
		return report.Side{Of: of, Kernel: report.Kernel{Asked: asked}}
	}
	explanation := func(from, to int) report.Explanation {
		return report.Explanation{Answers: []report.Answer{{Sides: []report.Side{side("a", from), side("b", to)}}}}
	}
	for name, c := range map[string]struct {
		all  []said[report.Explanation]
		want report.Explanation
	}{
		"one node":                             {[]said[report.Explanation]{{"one", explanation(2, 3)}}, explanation(2, 3)},
		"two nodes":                            {[]said[report.Explanation]{{"one", explanation(2, 0)}, {"two", explanation(0, 3)}}, explanation(2, 3)},
		"other order":                          {[]said[report.Explanation]{{"two", explanation(0, 3)}, {"one", explanation(2, 0)}}, explanation(2, 3)},
		"a pod has lost its address meanwhile": {[]said[report.Explanation]{{"one", explanation(2, 0)}, {"two", report.Explanation{}}}, explanation(2, 0)},
		"another pod has it": {[]said[report.Explanation]{{"one", explanation(2, 0)},
			{"two", report.Explanation{Answers: []report.Answer{{Sides: []report.Side{side("a", 0), side("c", 3)}}}}}}, explanation(2, 0)},
	} {
		if diff := cmp.Diff(c.want, bothSides(c.all)); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
}
