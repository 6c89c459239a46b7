package podlink

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/internal/sysctl"
)

func TestLinksWithRADefault(t *testing.T) {
	const none, any = "00000000000000000000000000000000", "fe800000000000000000000000000001"
	table := "" +
		none + " 00 " + none + " 00 " + any + " 00000400 00000001 00000000 00450003     eth0\n" + // by advertisement
		none + " 00 " + none + " 00 " + any + " 00000400 00000001 00000000 00000003     eth1\n" + // by hand
		any + " 40 " + none + " 00 " + none + " 00000100 00000001 00000000 00440001     eth2\n" + // advertised, no default
		none + " 00 " + none + " 00 " + none + " ffffffff 00000001 00000000 00200200       lo\n"
	if d := cmp.Diff([]string{"eth0"}, linksWithRADefault(table)); d != "" {
		t.Error(d)
	}
}

func TestEnableForwarding(t *testing.T) {
	ns := nstest.New(t)
	for _, addrs := range [][]netip.Addr{
		nil,
		{netip.MustParseAddr("10.244.1.2")},
		{netip.MustParseAddr("10.244.1.2"), netip.MustParseAddr("fd00:244:1::2")},
	} {
		ns.Do(t, func() error {
			for _, f := range forwarding {
				if err := sysctl.Write(f.key, "0"); err != nil {
					return err
				}
			}
			if err := enableForwarding(addrs); err != nil {
				return err
			}
			var errs []error
			for i, f := range forwarding {
				want := map[bool]string{true: "1", false: "0"}[i < len(addrs)]
				if got, err := sysctl.Read(f.key); err != nil || got != want {
					errs = append(errs, fmt.Errorf("%s is %s with pods at %v: %w", f.key, got, addrs, errors.Join(err, errors.New("want "+want))))
				}
			}
			return errors.Join(errs...)
		})
	}
}
