package tailscaled

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"

	"github.com/headcni/headcni/internal/atomicfile"
	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/findings"
)

// machineFile remembers which machine this disk is in.
const machineFile = paths.StateDir + "/machine"

// marks are what tells two machines apart, by name. A copy of the disk has the machine ID with it, but the hardware's own number (of a
// virtual machine: the hypervisor's) is another. Where there is none, as in a container, the ID has to do.
var (
	hardware  = map[string]string{"DMI UUID": "/sys/class/dmi/id/product_uuid", "serial number": "/sys/firmware/devicetree/base/serial-number"}
	installed = map[string]string{"machine ID": "/etc/machine-id"}
)

// passingID is there where systemd makes up a machine ID at each boot, which tells nothing.
const passingID = "/run/machine-id"

// SameMachine is an error where the disk was another machine's: who runs with a copied state takes the original's place in the tailnet,
// with its addresses and its pods' ranges, each whenever it speaks to Headscale, and both say that all is well. The first call on a disk
// remembers the machine. What cannot be read or kept tells nothing; without a disk to write to there is no state either.
func SameMachine() error { return sameMachine("/") }

func sameMachine(root string) error {
	now := marksOf(root, hardware)
	if _, err := os.Stat(filepath.Join(root, passingID)); len(now) == 0 && errors.Is(err, fs.ErrNotExist) {
		now = marksOf(root, installed)
	}
	path := filepath.Join(root, machineFile)
	b, err := os.ReadFile(path)
	var was map[string]string
	if err == nil && json.Unmarshal(b, &was) == nil {
		for what, mark := range now {
			if was[what] != "" && was[what] != mark {
				return findings.Errorf(findings.OtherMachine, "this disk was another machine's (another %s): it is a copy, or was moved. For a copy: rm -r %s, in host mode also tailscaled's "+
					"state (/var/lib/tailscale/tailscaled.state, with tailscaled stopped; no `tailscale logout`, which ends the original too), give it podCIDRs of its own in %s, and start tailscaled again. "+
					"If the other machine is gone for good: rm %s", what, paths.StateDir, paths.ConfigFile, machineFile)
			}
		}
	}
	if len(now) == 0 || maps.Equal(was, now) || err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if b, err = json.Marshal(now); err == nil {
		_ = atomicfile.Write(path, b, 0o600) // a full disk is named elsewhere, and the next look comes
	}
	return nil
}

// marksOf reads what is there. Only hashes are kept: machine-id(5) asks for it.
func marksOf(root string, files map[string]string) map[string]string {
	marks := map[string]string{}
	for what, file := range files {
		b, err := os.ReadFile(filepath.Join(root, file))
		if text := strings.Trim(string(b), " \n\x00"); err == nil && text != "" {
			marks[what] = fmt.Sprintf("%x", sha256.Sum256([]byte("headcni "+text)))
		}
	}
	return marks
}

// ForgetMachine is for an uninstallation.
func ForgetMachine() error { return atomicfile.Remove(machineFile) }
