package config

import (
	"os"
	"reflect"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

// FuzzDecodeFile: whatever daemon.yaml holds, it is refused or it is a configuration that says the same when it is written out.
func FuzzDecodeFile(f *testing.F) {
	example, err := os.ReadFile("../../docs/daemon.yaml")
	if err != nil {
		f.Fatal(err)
	}
	for _, s := range []string{string(example), "", "network: {podCIDRs: [10.244.1.0/24]}", "network:\n  mtu: 9000\n  podCIDRs: 7\n", "a: &a {b: *a}",
		"<<: *x", "{", "---\n---\n", "headscale: {url: http://hs, apiKeyFile: /k}\nnetwrok: {}\n", "? [a]\n: b", "cni:\n\tx", "\x00", "network: !!binary aGk="} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		c := Default()
		if err := decodeFile("daemon.yaml", b, &c); err != nil {
			if !strings.Contains(err.Error(), "daemon.yaml") {
				t.Errorf("it does not say in which file: %v", err)
			}
			return
		}
		text, err := yaml.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		again := Default()
		if err := decodeFile("daemon.yaml", text, &again); err != nil || !reflect.DeepEqual(normal(c), normal(again)) {
			t.Errorf("%v\nread    %+v\nwritten %+v", err, c, again)
		}
	})
}

// normal is c as text: an empty list and none are the same there.
func normal(c Config) string { return c.String() }

// FuzzReadEnvFile: every variable is NAME=VALUE in one line.
func FuzzReadEnvFile(f *testing.F) {
	for _, s := range []string{"", "A=b", "A='b'\n#c\n;d\nE = \"f\" \n", "=", "A=\"", "A", "HEADSCALE_API_KEY=x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		for _, v := range parseEnv(text) {
			if !strings.Contains(v, "=") || strings.Contains(v, "\n") {
				t.Errorf("%q", v)
			}
		}
	})
}
