package noderoutes

import (
	"os"
	"strings"

	"github.com/safchain/ethtool"

	"github.com/headcni/headcni/pkg/findings"
	"github.com/headcni/headcni/pkg/reconcile"
)

// offloads are features of the uplink by which tailscaled sends and gets its packets in batches (UDP_SEGMENT and UDP_GRO, udp(7)): where they
// are off, each packet goes its own way through the kernel. They are the kernel's names, each with ethtool's word for it.
var offloads = []struct{ feature, word string }{
	{"tx-generic-segmentation", "gso"}, {"tx-udp-segmentation", "tx-udp-segmentation"}, {"rx-gro", "gro"},
}

// OffloadsOff is a warning where somebody has switched off what the device of the uplink could do of offloads. What it cannot do, and links
// without a device, are as they are.
func OffloadsOff() error {
	for _, link := range uplinks() {
		name := link.Attrs().Name
		if _, err := os.Stat("/sys/class/net/" + name + "/device"); err == nil {
			return offloadsOff(name)
		}
	}
	return nil
}

func offloadsOff(link string) error {
	e, err := ethtool.NewEthtool()
	if err != nil {
		return nil // a kernel that cannot be asked costs nothing
	}
	defer e.Close()
	have, err := e.FeaturesWithState(link)
	if err != nil {
		return nil // so does a driver without features
	}
	var off, on []string
	for _, o := range offloads {
		if f := have[o.feature]; f.Available && !f.Active {
			off, on = append(off, o.word), append(on, o.word+" on")
		}
	}
	if off == nil {
		return nil
	}
	return reconcile.Warning{Err: findings.Errorf(findings.OffloadsOff, "uplink %s has %s off, which its device could: what tailscaled sends and gets goes packet by packet; "+
		"`ethtool -K %[1]s %[3]s`, unless it was switched off for a fault of the device", link, strings.Join(off, ", "), strings.Join(on, " "))}
}
