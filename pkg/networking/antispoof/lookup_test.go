package antispoof

import (
	"testing"

	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/internal/sysctl"
)

// Only pods' links, only where the host wants no more than loosely, and all is as on new links afterwards.
func TestSpareLookups(t *testing.T) {
	const pod, other, strict = "hc0123456789", "hcfoo", "hcaaaaaaaaaa"
	for name, c := range map[string]struct {
		all, standard string
		filter, local string // of the pod's link
		after         string
	}{
		"nothing set":                 {"0", "0", "0", "1", "0"},
		"systemd's loose links":       {"0", "2", "0", "1", "2"},
		"a host that is loose itself": {"2", "0", "0", "0", "0"},
		"a strict host":               {"1", "1", "1", "0", "1"},
	} {
		t.Run(name, func(t *testing.T) {
			ns := nstest.New(t)
			is := func(when, link, filter, local string) {
				t.Helper()
				ns.Do(t, func() error {
					f, err := sysctl.Read(sysctl.IPv4LinkReversePath(link))
					if err != nil {
						return err
					}
					l, err := sysctl.Read(sysctl.IPv4LinkAcceptLocal(link))
					if f != filter || l != local {
						t.Errorf("%s: %s has rp_filter %s, accept_local %s, want %s, %s", when, link, f, l, filter, local)
					}
					return err
				})
			}
			ns.Do(t, func() error {
				if err := sysctl.Write(sysctl.IPv4LinkReversePath("all"), c.all); err != nil {
					return err
				}
				return sysctl.Write(sysctl.IPv4LinkReversePath("default"), c.standard)
			})
			for _, l := range []string{pod, other, strict} {
				ns.Run(t, "ip", "link", "add", l, "type", "veth", "peer", "name", "p"+l)
			}
			ns.Do(t, func() error { return sysctl.Write(sysctl.IPv4LinkReversePath(strict), "1") })
			for range 2 {
				ns.Do(t, func() error {
					done, err := spareLookups(nil)
					if c.local == "1" && (!done[pod] || done[other]) {
						t.Errorf("done: %v", done)
					}
					return err
				})
				is("spared", pod, c.filter, c.local)
				is("spared", strict, "1", "0")
				is("spared", other, c.standard, "0")
			}
			ns.Do(t, func() error {
				if err := sysctl.Write(sysctl.IPv4LinkAcceptLocal(pod), "0"); err != nil {
					return err
				}
				_, err := spareLookups(map[string]bool{pod: true})
				return err
			})
			is("not looked at again", pod, c.filter, "0")
			ns.Do(t, func() error { _, err := spareLookups(nil); return err })
			ns.Do(t, Remove)
			is("removed", pod, c.after, "0")
			is("removed", strict, "1", "0")
			is("removed", other, c.standard, "0")
		})
	}
}
