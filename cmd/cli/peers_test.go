package main

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"unicode/utf8"
)

func TestPeersBadInput(t *testing.T) {
	noCluster(t)
	for args, want := range map[string]string{
		"peers -o yaml":            "want table, json, dot or mermaid",
		"peers now":                "unknown command",
		"peers --bad":              "unknown flag",
		"peers --local --node a":   "leave --node out",
		"peers --kubeconfig /none": "no such file",
		"peers --timeout 0s":       "want a time such as 30s",
	} {
		out, err := headcnictl(t, strings.Fields(args)...)
		var code exitCode
		if !errors.As(err, &code) || code != 2 || !strings.Contains(out, want) {
			t.Errorf("%s: %v, want %q in\n%s", args, err, want, out)
		}
	}
}

// What is new fits a terminal of 80 columns.
func TestHelpFits(t *testing.T) {
	for _, args := range [][]string{{"peers"}} {
		cmd := root()
		var b bytes.Buffer
		cmd.SetOut(&b)
		cmd.SetArgs(append(args, "--help"))
		if err := cmd.Execute(); err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(b.String()) {
			if utf8.RuneCountInString(line) > 81 {
				t.Errorf("%s: %s", args, line)
			}
		}
	}
}
