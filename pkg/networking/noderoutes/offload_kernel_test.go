package noderoutes

import (
	"errors"
	"strings"
	"testing"

	"github.com/safchain/ethtool"

	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/pkg/findings"
)

func TestOffloadsOff(t *testing.T) {
	ns := nstest.New(t)
	ns.Run(t, "sh", "-ec", "ip link add up0 type veth peer name far; ip address add 192.0.2.1/24 dev up0; ip link set far up; ip link set up0 up; ip route add default via 192.0.2.2")
	set := func(features map[string]bool) {
		t.Helper()
		ns.Do(t, func() error {
			e, err := ethtool.NewEthtool()
			if err != nil {
				return err
			}
			defer e.Close()
			return e.Change("up0", features)
		})
	}
	want := func(text string) {
		t.Helper()
		ns.Do(t, func() error {
			if got := uplinks(); len(got) != 1 || got[0].Attrs().Name != "up0" {
				t.Errorf("uplinks %v", got)
			}
			if err := OffloadsOff(); err != nil {
				t.Errorf("a link without a device: %v", err)
			}
			err := offloadsOff("up0")
			var f *findings.Error
			if text == "" && err != nil || text != "" && (err == nil || !errors.As(err, &f) || f.ID != findings.OffloadsOff || !strings.Contains(err.Error(), text)) {
				t.Errorf("%v, want %q", err, text)
			}
			return nil
		})
	}
	set(map[string]bool{"tx-generic-segmentation": true, "tx-udp-segmentation": true, "rx-gro": true})
	want("")
	set(map[string]bool{"rx-gro": false})
	want("`ethtool -K up0 gro on`")
	set(map[string]bool{"tx-udp-segmentation": false})
	want("`ethtool -K up0 tx-udp-segmentation on gro on`")
	set(map[string]bool{"tx-generic-segmentation": false, "rx-gro": true, "tx-udp-segmentation": true})
	want("has gso")
	ns.Do(t, func() error {
		if err := offloadsOff("none"); err != nil {
			t.Errorf("no such link: %v", err)
		}
		return nil
	})
}
