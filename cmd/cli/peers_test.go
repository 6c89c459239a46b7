package main

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/headcni/headcni/pkg/why"
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
		"peers -w -o json":         "leave --output json out",
		"peers -w=10ms":            "want a second or more",
		"peers -w=-5s":             "want a second or more",
	} {
		out, err := headcnictl(t, strings.Fields(args)...)
		var code exitCode
		if !errors.As(err, &code) || code != 2 || !strings.Contains(out, want) {
			t.Errorf("%s: %v, want %q in\n%s", args, err, want, out)
		}
	}
}

func TestAgain(t *testing.T) {
	var out bytes.Buffer
	if again(&out, false, time.Unix(0, 0)); out.Len() != 0 {
		t.Errorf("once: %q", out.String())
	}
	if again(&out, true, time.Unix(0, 0).UTC()); out.String() != "1970-01-01T00:00:00Z\n" {
		t.Errorf("in a pipe: %q", out.String())
	}
}

func TestWhyBadInput(t *testing.T) {
	noCluster(t)
	for args, want := range map[string]string{
		"why a":                                "accepts 2 arg(s), received 1",
		"why a b --bad":                        "unknown flag",
		"why a b -o yaml":                      "want text or json",
		"why a b --port 0":                     "want a number from 1 to 65535",
		"why a b --port 65536":                 "want a number from 1 to 65535",
		"why a b --port http":                  "want a number from 1 to 65535",
		"why a b --port 80x":                   "want a number from 1 to 65535",
		"why a b --port 53/udp --proto tcp":    "contradict each other",
		"why a b --port 53/sctp":               "want tcp, udp or icmp",
		"why a b --proto tcp":                  "need --port",
		"why a b --proto icmp --port 80":       "need --port",
		"why a b --kubeconfig /none":           "no such file",
		"why a b --timeout 0s":                 "want a time such as 30s",
		"ping a":                               "accepts 2 arg(s), received 1",
		"ping a b -c 0":                        "want 1 to 1000",
		"ping a b --size 10":                   "want 64 to 9000",
		"ping a 192.0.2.1":                     "a is no address, no pod of this node",
		"why node svc/web --port 80":           "kube-proxy chooses one of the pods",
		"why shop/none 192.0.2.1 --port 80":    "shop/none is no address, no pod of this node",
		"why 203.0.113.77 192.0.2.1 --port 80": "is no pod of this node and no address of its own",
	} {
		out, err := headcnictl(t, strings.Fields(args)...)
		var code exitCode
		if !errors.As(err, &code) || code != 2 || !strings.Contains(out, want) {
			t.Errorf("%s: %v, want %q in\n%s", args, err, want, out)
		}
	}
}

func TestPortOfWhy(t *testing.T) {
	for port, want := range map[string]why.Question{
		"":       {Protocol: "icmp"},
		"80":     {Protocol: "tcp", Port: 80},
		"80/tcp": {Protocol: "tcp", Port: 80},
		"53/udp": {Protocol: "udp", Port: 53},
	} {
		var q why.Question
		if err := parsePort(&q, port); err != nil || q != want {
			t.Errorf("%q: %+v, %v", port, q, err)
		}
	}
}
