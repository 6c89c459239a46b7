package why

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/headcni/headcni/pkg/findings"
	"github.com/headcni/headcni/pkg/policy/report"
	"github.com/headcni/headcni/pkg/why/live"
)

// went is a packet of well that passed the first links of the way there, and then those back with the answer.
func went(there, back int, kind live.Kind) *Live {
	l := &Live{Near: live.Side{Sent: 3, From: live.FromLink}, Far: &live.Side{}}
	sides := []*live.Side{&l.Near, &l.Near, l.Far, l.Far}
	links := []string{"hc1", "headcni01", "headcni01", "hc2"}
	for i := range there {
		sides[i].Seen = append(sides[i].Seen, live.Count{Link: links[i], Out: i%2 == 1, Kind: live.Request, N: 1})
	}
	for i := range back {
		at := len(sides) - 1 - i
		sides[at].Seen = append(sides[at].Seen, live.Count{Link: links[at], Out: at%2 == 0, Kind: kind, N: 1})
	}
	return l
}

// Where a packet is lost is said; whether the steps explain it; and where they do not, that is a finding.
func TestJudgeLive(t *testing.T) {
	denied := []report.Drop{{Direction: "ingress", Isolating: []string{"cart/db-only"}}}
	for name, c := range map[string]struct {
		change func(*Case)
		want   Verdict
		where  string // of the last step
		state  State
		text   string
		id     findings.ID // of the last step
	}{
		"answered":              {func(c *Case) { c.Live = went(4, 4, live.Answer) }, Yes, "home-1", OK, "the answer came back", ""},
		"refused":               {func(c *Case) { c.Live = went(4, 4, live.Refused) }, NoWay, "home-1", No, "refuses 6379/tcp", findings.NobodyListens},
		"refused, as it says":   {func(c *Case) { c.Live, c.Far.Port = went(4, 4, live.Refused), portRefused }, NoWay, "home-1", Follows, "refused, as step 9 says", ""},
		"inside the pod":        {func(c *Case) { c.Live = went(0, 0, "") }, NoWay, "fra-1", No, "not in by hc1", findings.Lost},
		"on the near node":      {func(c *Case) { c.Live = went(1, 0, "") }, NoWay, "fra-1", No, "in by hc1, and not out by headcni01", findings.Lost},
		"between":               {func(c *Case) { c.Live = went(2, 0, "") }, NoWay, "home-1", No, "and not in by headcni01", findings.Lost},
		"on the far node":       {func(c *Case) { c.Live = went(3, 0, "") }, NoWay, "home-1", No, "and not out by hc2", findings.Lost},
		"in the other pod":      {func(c *Case) { c.Live = went(4, 0, "") }, NoWay, "home-1", No, "no answer came in by hc2", findings.Lost},
		"back on the far node":  {func(c *Case) { c.Live = went(4, 1, live.Answer) }, NoWay, "home-1", No, "the answer came in by hc2 on home-1, and not out by headcni01", findings.Lost},
		"back between":          {func(c *Case) { c.Live = went(4, 2, live.Answer) }, NoWay, "fra-1", No, "and not in by headcni01", findings.Lost},
		"back on the near node": {func(c *Case) { c.Live = went(4, 3, live.Answer) }, NoWay, "fra-1", No, "and not out by hc1", findings.Lost},
		"denied, as it says": {func(c *Case) {
			c.Live, c.Far.Policy = went(3, 0, ""), explained(report.Denied, "ingress", "cart/db-only")
			c.Live.Far.Denied = denied
		}, NoWay, "home-1", Follows, "NetworkPolicies denied it (isolated by cart/db-only), as step 8 says", ""},
		"denied, and nobody says so": {func(c *Case) { c.Live = went(3, 0, ""); c.Live.Far.Denied = denied }, NoWay, "home-1", No, "do not say so", findings.Contradiction},
		"dropped by the guard": {func(c *Case) {
			c.Live = went(1, 0, "")
			c.Live.Near.Drops = map[string]uint64{"pod_forged": 3}
		}, NoWay, "fra-1", No, "the guard's counter pod_forged moved by 3", findings.Contradiction},
		"somebody else's drops": {func(c *Case) {
			c.Live = went(1, 0, "")
			c.Live.Near.Drops = map[string]uint64{"lan_ingress": 1}
		}, NoWay, "fra-1", No, "lan_ingress moved by 1", findings.Lost},
		"it passes what denies it": {func(c *Case) {
			c.Live, c.Far.Policy = went(4, 4, live.Answer), explained(report.Denied, "ingress", "cart/db-only")
		}, NoWay, "home-1", OK, "the answer came back", ""},
		"too many packets": {func(c *Case) { c.Live = went(1, 0, ""); c.Live.Near.Missed = 9 }, Unsure, "fra-1", Unknown, "9 packets came too fast", ""},
		"an ICMP error": {func(c *Case) {
			c.Live = went(1, 0, "")
			c.Live.Near.Seen = append(c.Live.Near.Seen, live.Count{Link: "headcni01", Kind: live.Unreachable, N: 1})
		}, NoWay, "fra-1", No, "an ICMP error came back", findings.Lost},
		"UDP without an answer": {func(c *Case) {
			c.Question, c.Far.Port, c.Live = Question{Protocol: udp, Port: 53}, portTaken, went(4, 0, "")
		}, Yes, "home-1", OK, "all that can be known of UDP", ""},
		"nobody at the far end": {func(c *Case) {
			c.Live, c.Far, c.FarError = went(2, 0, ""), nil, "away"
			c.Live.Far, c.Live.FarError = nil, "away"
		}, Unsure, "home-1", Unknown, "could not be looked at: away", ""},
		"nobody there, and an answer": {func(c *Case) {
			c.Live, c.Far, c.FarError = went(4, 4, live.Answer), nil, "away"
			c.Live.Far = nil
		}, Yes, "home-1", OK, "the answer came back", ""},
		"not sent":           {func(c *Case) { c.Live = &Live{Near: live.Side{Error: "no right"}} }, Unsure, "fra-1", Unknown, "not tried: no right", ""},
		"the tunnel is dead": {func(c *Case) { c.Live, c.Far.Tailnet.Error = went(2, 0, ""), "refused" }, NoWay, "home-1", Follows, "as step 5 says", ""},
		"to itself": {func(c *Case) {
			c.From.Pod, c.To.Pod, c.To.Node, c.Far, c.Near.Local, c.Near.Port = false, false, "fra-1", nil, true, portOpen
			c.Near.There = Route{Dev: "lo", Local: true}
			c.Live = &Live{Near: live.Side{Sent: 1, From: live.FromNode, Seen: []live.Count{{Link: "lo", Out: true, Kind: live.Request, N: 1}, {Link: "lo", Kind: live.Answer, N: 1}}}}
		}, Yes, "fra-1", OK, "the answer came back", ""},
		"in clear, as it says": {func(c *Case) {
			c.Live, c.Near.There = went(1, 0, ""), Route{Dev: "eth0", Table: 254}
			c.Live.Near.Seen = append(c.Live.Near.Seen, live.Count{Link: "eth0", Out: true, Kind: live.Request, N: 3})
		}, NoWay, "fra-1", Follows, "not out by headcni01, as step 3 says", ""},
		"the receiver's link is down": {func(c *Case) { c.Live, c.Far.Link.Carrier = went(3, 0, ""), false }, NoWay, "home-1", Follows, "as step 9 says", ""},
	} {
		it := well()
		c.change(&it)
		r := Judge("1", it)
		s := r.Steps[len(r.Steps)-1]
		var id findings.ID
		if len(s.Findings) > 0 {
			id = s.Findings[0].ID
		}
		if r.Verdict != c.want || s.Name != "live" || s.Where != c.where || s.State != c.state || !strings.Contains(s.Text, c.text) || id != c.id {
			t.Errorf("%s: %s, %s %s %s %q, want %s, %s %s %s %q", name, r.Verdict, s.Where, s.State, id, s.Text, c.want, c.where, c.state, c.id, c.text)
		}
	}
	it := well()
	it.Live, it.Far.Policy = went(4, 4, live.Answer), explained(report.Denied, "ingress", "cart/db-only")
	if r := Judge("1", it); !slices.ContainsFunc(r.Steps, func(s Step) bool {
		return len(s.Findings) > 0 && s.Findings[0].ID == findings.Contradiction && s.Name == "live"
	}) {
		t.Errorf("a packet that passes what denies it is no finding: %+v", r.Steps)
	}
}

// The far side looks on before the near one sends, and is told when that is over; what goes wrong there keeps nobody from sending.
func TestTry(t *testing.T) {
	answer, err := json.Marshal(live.Side{Sent: 1, From: live.FromNode})
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		far  func(ready, end func()) error
		want string
	}{
		"it looks on":     {func(ready, end func()) error { ready(); end(); return nil }, ""},
		"it has no right": {func(func(), func()) error { return errors.New("no right") }, "does not look on: no right"},
		"it ends at once": {func(func(), func()) error { return nil }, "does not look on: EOF"},
		"it breaks off":   {func(ready, _ func()) error { ready(); return errors.New("gone") }, "does not say what it saw: gone"},
	} {
		looks := false
		ask := nodes{near: func(_ context.Context, command []string) ([]byte, error) {
			if c.want == "" && !looks {
				t.Error("sent before anybody looked")
			}
			if strings.Join(command[:5], " ") != "headcnictl why send 10.244.1.7 10.244.7.3" {
				t.Errorf("%s: %v", name, command)
			}
			return answer, nil
		}, far: func(_ context.Context, in io.Reader, out io.Writer, command []string) error {
			return c.far(func() {
				looks = true
				fmt.Fprintln(out, `{"ready":true}`)
			}, func() {
				_, _ = io.Copy(io.Discard, in)
				fmt.Fprintln(out, `{"seen":[{"link":"hc2","out":true,"kind":"request","n":1}]}`)
			})
		}}
		it := well()
		it.try(t.Context(), ask)
		if l := it.Live; l.Near.Sent != 1 || !strings.Contains(l.FarError, c.want) || (c.want == "") != (l.Far != nil && l.Far.Passed("hc2", true, live.Request) == 1) {
			t.Errorf("%s: %+v", name, l)
		}
	}
	it := well()
	it.Near.Link.Up = false
	it.try(t.Context(), nodes{near: func(context.Context, []string) ([]byte, error) {
		t.Error("sent by a link that is down")
		return nil, nil
	}})
	if !strings.Contains(it.Live.Near.Error, "hc1 is down") {
		t.Errorf("%+v", it.Live)
	}
}
