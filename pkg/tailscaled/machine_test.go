package tailscaled

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/headcni/headcni/pkg/config/paths"
	"github.com/headcni/headcni/pkg/findings"
)

// A disk that comes up in another machine is told; one that stays where it is never is, whatever its machine ID becomes.
func TestSameMachine(t *testing.T) {
	const dmi, tree, id = "/sys/class/dmi/id/product_uuid", "/sys/firmware/devicetree/base/serial-number", "/etc/machine-id"
	type files map[string]string
	for name, c := range map[string]struct {
		first, then files
		names       string // what the error names; "": none
	}{
		"the same":                               {files{dmi: "a\n", id: "1\n"}, files{dmi: "a\n", id: "1\n"}, ""},
		"a copied virtual machine":               {files{dmi: "a\n", id: "1\n"}, files{dmi: "b\n", id: "1\n"}, "DMI UUID"},
		"a copied SD card":                       {files{tree: "10000000abcd\x00", id: "1\n"}, files{tree: "10000000abce\x00", id: "1\n"}, "serial number"},
		"a new machine ID":                       {files{dmi: "a\n", id: "1\n"}, files{dmi: "a\n", id: "2\n"}, ""},
		"a copied container":                     {files{id: "1\n"}, files{id: "2\n"}, "machine ID"},
		"a machine ID made up at each boot":      {files{id: "1\n", passingID: "1\n"}, files{id: "2\n", passingID: "2\n"}, ""},
		"nothing is known":                       {files{}, files{}, ""},
		"hardware that does not tell any more":   {files{dmi: "a\n"}, files{id: "1\n"}, ""},
		"hardware that was not asked before":     {files{id: "1\n"}, files{dmi: "a\n", id: "1\n"}, ""},
		"a damaged memory, which tells nothing":  {files{dmi: "a\n"}, files{dmi: "b\n", machineFile: "{"}, ""},
		"a memory that a person has taken away":  {files{dmi: "a\n"}, files{dmi: "b\n", machineFile: ""}, ""},
		"an ID that was empty at the first boot": {files{id: "\n"}, files{id: "1\n"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			set := func(f files) {
				for path, text := range f {
					path = filepath.Join(root, path)
					if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o600)); err != nil {
						t.Fatal(err)
					}
				}
			}
			if err := os.MkdirAll(filepath.Join(root, paths.StateDir), 0o755); err != nil {
				t.Fatal(err)
			}
			set(c.first)
			for range 2 {
				if err := sameMachine(root); err != nil {
					t.Fatalf("at home: %v", err)
				}
			}
			for _, path := range []string{dmi, tree, id, passingID} {
				if err := os.Remove(filepath.Join(root, path)); err != nil && !errors.Is(err, os.ErrNotExist) {
					t.Fatal(err)
				}
			}
			set(c.then)
			for range 2 { // that it was told changes nothing
				err := sameMachine(root)
				if told := findings.IDOf(err) == findings.OtherMachine; told != (c.names != "") || told && !strings.Contains(err.Error(), c.names) {
					t.Errorf("elsewhere: %v, want %q", err, c.names)
				}
			}
			if err := os.Remove(filepath.Join(root, machineFile)); err != nil && !errors.Is(err, os.ErrNotExist) {
				t.Fatal(err)
			}
			if err := sameMachine(root); err != nil {
				t.Errorf("after it was taken away: %v", err)
			}
		})
	}
}
