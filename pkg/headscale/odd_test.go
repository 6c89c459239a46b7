package headscale

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/headcni/headcni/internal/headscaletest"
)

// everyCall makes each call of the client's once, by its name.
func everyCall(ctx context.Context, c *Client) map[string]error {
	n := Node{ID: 1, NodeKey: "nodekey:ab"}
	route := []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")}
	return map[string]error{
		"Nodes":            second(c.Nodes(ctx)),
		"Node":             second(c.Node(ctx, 1)),
		"NodeByKey":        second(c.NodeByKey(ctx, n.NodeKey)),
		"ApproveRoutes":    second(c.ApproveRoutes(ctx, n, route, nil)),
		"DeleteNode":       c.DeleteNode(ctx, n),
		"DisableExpiry":    c.DisableExpiry(ctx, 1),
		"Policy":           second(c.Policy(ctx)),
		"OwnAPIKey":        second(c.OwnAPIKey(ctx)),
		"CreatePreAuthKey": second(c.CreatePreAuthKey(ctx, PreAuthKeyRequest{Tags: []string{"tag:headcni"}})),
		"KnowsPreAuthKey":  second(c.KnowsPreAuthKey(ctx, 1, time.Now())),
		"Health":           second(c.Health(ctx)),
	}
}

// TestOddAnswers: whatever is not Headscale's answer is an error, and never "none", "gone" or "done": a proxy's page, a body
// that is JSON and another one, one that lacks what was asked for.
func TestOddAnswers(t *testing.T) {
	for name, fault := range map[string]headscaletest.Fault{
		"empty":                 headscaletest.Answer(200, ""),
		"no content":            headscaletest.Answer(204, ""),
		"null":                  headscaletest.Answer(200, "null"),
		"a list":                headscaletest.Answer(200, "[]"),
		"an object":             headscaletest.Answer(200, "{}"),
		"nulls":                 headscaletest.Answer(200, `{"nodes":null,"node":null,"policy":null,"apiKeys":null,"preAuthKey":null,"preAuthKeys":null,"users":null,"status":null}`),
		"of other types":        headscaletest.Answer(200, `{"nodes":{},"node":[],"policy":7,"apiKeys":"","preAuthKey":"","preAuthKeys":{},"users":7,"status":{}}`),
		"of nothing":            headscaletest.Answer(200, `{"nodes":[{}],"node":{},"policy":{},"apiKeys":[[]],"preAuthKey":{},"preAuthKeys":[7],"users":[7],"status":""}`),
		"an error that is 200":  headscaletest.Answer(200, `{"code":5,"message":"node not found","details":[]}`),
		"a portal":              headscaletest.Answer(200, "<html><body>Please log in</body></html>"),
		"a portal, not found":   headscaletest.Answer(404, `{"error":"no such route"}`),
		"two answers":           headscaletest.Answer(200, `{"nodes":[]}{"nodes":[]}`),
		"cut off":               headscaletest.Answer(200, `{"nodes":[`),
		"a redirect to http":    sendTo("http://headscale.example.com/api"),
		"a redirect elsewhere":  sendTo("https://192.0.2.1/"),
		"a redirect to itself":  sendTo("/api/v1/node/"),
		"a redirect to nowhere": headscaletest.Answer(302, ""),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := serve(t, fault)
			for call, err := range everyCall(t.Context(), c) {
				if err == nil || errors.Is(err, ErrNotFound) || errors.Is(err, ErrUnauthorized) || strings.Contains(err.Error(), testKey) {
					t.Errorf("%s: %v", call, err)
				} else if !strings.Contains(err.Error(), "headscale.url") {
					t.Errorf("%s says nothing of what to do: %v", call, err)
				}
			}
		})
	}
}

func sendTo(url string) headscaletest.Fault {
	return func(w http.ResponseWriter, r *http.Request) bool {
		http.Redirect(w, r, url, http.StatusTemporaryRedirect)
		return true
	}
}

// TestKeyStaysHome: a server that redirects to another one gets nothing sent there.
func TestKeyStaysHome(t *testing.T) {
	var stray atomic.Int32
	other := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { stray.Add(1) }))
	defer other.Close()
	c := serve(t, sendTo(other.URL+"/api/v1/node?secret=1"))
	for call, err := range everyCall(t.Context(), c) {
		if err == nil || !strings.Contains(err.Error(), other.URL) || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: %v", call, err)
		}
	}
	if n := stray.Load(); n != 0 {
		t.Errorf("%d requests followed", n)
	}
}

// TestOddNodes: a list is taken whole or not at all, and a node is only changed where it is still the one that was listed.
func TestOddNodes(t *testing.T) {
	node := func(id int, key string) string {
		return fmt.Sprintf(`{"id":"%d","nodeKey":%q,"givenName":"n","approvedRoutes":["10.244.1.0/24"]}`, id, key)
	}
	for name, list := range map[string]string{
		"twice":      node(1, "nodekey:a") + "," + node(1, "nodekey:b"),
		"no number":  node(1, "nodekey:a") + "," + node(0, "nodekey:b"),
		"no key":     node(1, "nodekey:a") + "," + node(2, ""),
		"bad prefix": strings.Replace(node(1, "nodekey:a"), "/24", "/33", 1),
	} {
		if nodes, err := serve(t, headscaletest.Answer(200, `{"nodes":[`+list+`]}`)).Nodes(t.Context()); err == nil {
			t.Errorf("%s: %+v", name, nodes)
		}
	}
	s := headscaletest.New(t)
	was := s.AddNode(headscaletest.Node{NodeKey: "nodekey:new", Approved: []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")}})
	c := client(t, s.URL, s.APIKey())
	listed := Node{ID: ID(was.ID), NodeKey: "nodekey:old"}
	for what, err := range map[string]error{
		"approve": second(c.ApproveRoutes(t.Context(), listed, nil, was.Approved)), "delete": c.DeleteNode(t.Context(), listed),
	} {
		if err == nil || !strings.Contains(err.Error(), "another node key") {
			t.Errorf("%s: %v", what, err)
		}
	}
	if now := s.Nodes(); len(now) != 1 || len(now[0].Approved) != 1 {
		t.Errorf("changed all the same: %+v", now)
	}
	// The answer for one node must be about that node.
	other := serve(t, headscaletest.Answer(200, `{"node":`+node(2, "nodekey:b")+`}`))
	if n, err := other.Node(t.Context(), 1); err == nil {
		t.Errorf("asked for node 1, got %+v", n)
	}
}

// TestEndlessAnswer: neither a body without end nor one that drips keeps a call, or takes the memory.
func TestEndlessAnswer(t *testing.T) {
	var sent atomic.Int64
	endless := serve(t, func(w http.ResponseWriter, r *http.Request) bool {
		chunk := []byte(strings.Repeat(" ", 1<<16))
		for r.Context().Err() == nil {
			n, err := w.Write(chunk)
			sent.Add(int64(n))
			if err != nil {
				break
			}
		}
		return true
	})
	if _, err := endless.Node(t.Context(), 1); err == nil || !strings.Contains(err.Error(), "longer than 2 MiB") {
		t.Errorf("endless: %v", err)
	}
	if n := sent.Load(); n > 16*maxBody {
		t.Errorf("%d bytes were taken", n)
	}
	drips := serve(t, func(w http.ResponseWriter, r *http.Request) bool {
		for r.Context().Err() == nil {
			_, _ = w.Write([]byte(" "))
			_ = http.NewResponseController(w).Flush()
			time.Sleep(10 * time.Millisecond)
		}
		return true
	})
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := drips.Nodes(ctx); !errors.Is(err, ErrUnreachable) {
		t.Errorf("drips: %v", err)
	}
}
