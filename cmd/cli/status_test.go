package main

import (
	"context"
	"encoding/json"
	"errors"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/headcni/headcni/internal/daemontest"
	"github.com/headcni/headcni/pkg/findings"
	"github.com/headcni/headcni/pkg/nodestatus"
	"github.com/headcni/headcni/pkg/reconcile"
)

// noCluster keeps a kubeconfig of whoever runs the tests out of them.
func noCluster(t *testing.T) {
	t.Helper()
	t.Setenv("KUBECONFIG", "")
	t.Setenv("HOME", t.TempDir())
}

func answering(t *testing.T, s func() nodestatus.Status) string {
	return daemontest.Serve(t, nodestatus.Answers{Status: func(context.Context) nodestatus.Status { return s() }})
}

func TestStatusExitCodes(t *testing.T) {
	noCluster(t)
	ok := []reconcile.Status{{Name: "config", OK: true}}
	with := func(id findings.ID, severity findings.Severity) []reconcile.Status {
		return []reconcile.Status{{Name: "config", Error: "it is so", Findings: []reconcile.Found{{ID: id, Severity: severity, Text: "it is so"}}}}
	}
	right := answering(t, func() nodestatus.Status { return nodestatus.Status{Version: "1", Ready: true, Parts: ok} })
	wrong := answering(t, func() nodestatus.Status {
		return nodestatus.Status{Version: "1", Parts: with(findings.NoPodCIDR, findings.Fail)}
	})
	warns := answering(t, func() nodestatus.Status {
		return nodestatus.Status{Version: "1", Ready: true, Parts: with(findings.APIKeyEnds, findings.Warn)}
	})
	none := filepath.Join(t.TempDir(), "none")
	for name, c := range map[string]struct {
		socket, args string
		code         exitCode
		want         string
	}{
		"right":               {right, "status", 0, "1 of 1 node right"},
		"right, local":        {right, "status --local", 0, "1 of 1 node right"},
		"right, doctor":       {right, "doctor", 0, "0 warnings, 0 failures"},
		"wrong":               {wrong, "status", 1, "HC104 the node has no pod range\n  why   it is so\n  do    `kubectl get nodes"},
		"wrong, JSON":         {wrong, "status -o json", 1, `"id": "HC104"`},
		"wrong, doctor":       {wrong, "doctor", 1, "FAIL  HC104"},
		"warnings":            {warns, "status", 0, "WARNINGS"},
		"warnings, strictly":  {warns, "status --strict", 3, "HC222"},
		"no daemon":           {none, "status", 2, "is headcni-daemon running?"},
		"no daemon, waiting":  {none, "status --wait=10ms", 2, "is headcni-daemon running?"},
		"another output":      {right, "status -o yaml", 2, "want text or json"},
		"another flag":        {right, "status --bad", 2, "unknown flag"},
		"too much":            {right, "status now", 2, "unknown command"},
		"a node, no cluster":  {right, "status --node a", 2, "--local asks the daemon of this node"},
		"a node, local":       {right, "status --local --node a", 2, "leave --node out"},
		"no such kubeconfig":  {right, "status --kubeconfig /none", 2, "no such file"},
		"no time":             {right, "status --timeout 0s", 2, "want a time such as 30s"},
		"explain":             {right, "doctor --explain HC201", 0, "HC201  fail  the node's routes are advertised and not approved"},
		"explain, small":      {right, "doctor --explain hc201", 0, "What to do:"},
		"explain what is not": {right, "doctor --explain HC999", 2, "there is no finding HC999"},
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
	out, _ := headcnictl(t, "status", "-o", "json", "--socket", wrong)
	var report struct {
		OK       bool `json:"ok"`
		Findings []struct{ ID, Severity, Where, Cause, Remedy string }
	}
	if err := json.Unmarshal([]byte(out), &report); err != nil || report.OK || len(report.Findings) != 1 || report.Findings[0].Cause != "it is so" {
		t.Errorf("%v in %s", err, out)
	}
}

// It waits for what passes, and says what changes only.
func TestStatusWait(t *testing.T) {
	noCluster(t)
	var asked atomic.Int32
	socket := answering(t, func() nodestatus.Status {
		if asked.Add(1) < 3 {
			return nodestatus.Status{Parts: []reconcile.Status{{Name: "tailnet", Findings: []reconcile.Found{{ID: findings.NotInTailnet, Severity: findings.Wait}}}}}
		}
		return nodestatus.Status{Ready: true}
	})
	out, err := headcnictl(t, "status", "--wait", "--socket", socket)
	if err != nil || asked.Load() != 3 || strings.Count(out, "HC210") != 1 || !strings.Contains(out, "1 of 1 node right\n") {
		t.Errorf("%v after %d questions:\n%s", err, asked.Load(), out)
	}
}
