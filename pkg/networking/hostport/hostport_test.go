package hostport

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

func TestKeepListForget(t *testing.T) {
	run := t.TempDir()
	folder := Folder(filepath.Join(run, "daemon.sock"))
	a := Record{Link: "hca", Addrs: []netip.Addr{netip.MustParseAddr("10.244.1.2")}, Ports: []Mapping{{HostPort: 80, ContainerPort: 8080, Protocol: "TCP", HostIP: "192.0.2.1"}}}
	b := Record{Link: "hcb", Addrs: []netip.Addr{netip.MustParseAddr("fd00::2")}, Ports: []Mapping{{HostPort: 53, ContainerPort: 53, Protocol: "udp"}}}
	if all, err := List(folder); err != nil || len(all) > 0 {
		t.Errorf("before any: %v, %v", all, err)
	}
	for _, r := range []Record{a, b, a} { // a second ADD may come after one that was killed
		if err := Keep(folder, r); err != nil {
			t.Fatal(err)
		}
	}
	want := func(want ...Record) {
		t.Helper()
		all, err := List(folder)
		if diff := cmp.Diff(want, all, cmpopts.EquateComparable(netip.Addr{})); diff != "" || err != nil {
			t.Errorf("%v (-want +got):\n%s", err, diff)
		}
	}
	want(a, b)
	for range 2 {
		if err := Forget(folder, "hca"); err != nil {
			t.Fatal(err)
		}
	}
	want(b)
}

// A node on which no daemon has ever run has nobody who would read it.
func TestKeepNothingWithoutDaemon(t *testing.T) {
	folder := Folder(filepath.Join(t.TempDir(), "none", "daemon.sock"))
	if err := Keep(folder, Record{Link: "hca"}); err != nil {
		t.Error(err)
	}
	if err := Forget(folder, "hca"); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Dir(folder)); err == nil {
		t.Error("it made the daemon's folder")
	}
}

// What is not a record is named, and hides no other.
func TestListNamesWhatItCannotRead(t *testing.T) {
	folder := t.TempDir()
	if err := Keep(folder, Record{Link: "hcgood"}); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"hcempty": "", "hclist": "[]", "hcother": `{"link":"hcgood"}`, ".tmp": "{", "hclarge": strings.Repeat(" ", maxRecord+1)} {
		if err := os.WriteFile(filepath.Join(folder, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("/dev/zero", filepath.Join(folder, "hclink")); err != nil {
		t.Fatal(err)
	}
	all, err := List(folder)
	if len(all) != 1 || all[0].Link != "hcgood" {
		t.Errorf("got %v", all)
	}
	for _, name := range []string{"hcempty", "hclist", "hcother", "hclarge", "hclink"} {
		if err == nil || !strings.Contains(err.Error(), "pod link "+name) {
			t.Errorf("%v does not name %s", err, name)
		}
	}
}

func TestOverlaps(t *testing.T) {
	r := Record{Ports: []Mapping{{HostPort: 80, Protocol: "TCP"}, {HostPort: 53, Protocol: "udp", HostIP: "192.0.2.1"}}}
	for _, c := range []struct {
		asked Mapping
		want  bool
	}{
		{Mapping{HostPort: 80}, true}, {Mapping{HostPort: 80, HostIP: "192.0.2.9"}, true}, {Mapping{HostPort: 81}, false}, {Mapping{HostPort: 80, Protocol: "udp"}, false},
		{Mapping{HostPort: 53, Protocol: "UDP", HostIP: "192.0.2.1"}, true}, {Mapping{HostPort: 53, Protocol: "udp", HostIP: "192.0.2.2"}, false},
		{Mapping{HostPort: 53, Protocol: "udp", HostIP: "0.0.0.0"}, true}, {Mapping{HostPort: 53, Protocol: "udp"}, true}, {Mapping{HostPort: 53}, false},
	} {
		if got := r.Overlaps([]Mapping{{HostPort: 1}, c.asked}); got != c.want {
			t.Errorf("%+v: %v, want %v", c.asked, got, c.want)
		}
	}
}
