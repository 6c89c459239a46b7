package tailscaled

import (
	"slices"
	"strings"
	"testing"
)

// The dedicated tailscaled has the configured proxy and no other, or what the environment says; never our keys.
func TestTailscaledEnv(t *testing.T) {
	environ := []string{"HTTPS_PROXY=http://other:1", "no_proxy=example.com", "HEADSCALE_API_KEY=k", "HEADCNI_AUTH_KEY=k", "PATH=/bin", "LANG=C"}
	for _, c := range []struct {
		proxy string
		want  []string
	}{
		{"", []string{"HTTPS_PROXY=http://other:1", "no_proxy=example.com", "LANG=C"}},
		{"http://10.0.0.1:3128", []string{"LANG=C", "HTTPS_PROXY=http://10.0.0.1:3128"}},
	} {
		got := slices.DeleteFunc(tailscaledEnv(environ, c.proxy), func(e string) bool {
			return strings.HasPrefix(e, "TS_") || strings.HasPrefix(e, "PATH=/var/lib/headcni/")
		})
		if !slices.Equal(got, c.want) {
			t.Errorf("%q: %v, want %v", c.proxy, got, c.want)
		}
	}
}
