package store

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

var cmpAddr = cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})

func testLease(id string, addrs ...string) Lease {
	l := Lease{Owner: Owner{ContainerID: id, IfName: "eth0"}, Writer: "test", Time: time.Unix(1700000000, 123456789).UTC()}
	for _, a := range addrs {
		p := netip.MustParsePrefix(a)
		l.Addrs = append(l.Addrs, LeasedAddr{Addr: p, Gateway: p.Masked().Addr().Next()})
	}
	return l
}

func TestRecordGolden(t *testing.T) {
	l := testLease("abc123", "10.244.1.7/24", "fd00:244:1::7/64")
	l.PodNamespace, l.PodName = "default", "web-0"
	data, err := encode(l)
	if err != nil {
		t.Fatal(err)
	}
	want := `headcni-lease 1
container abc123
interface eth0
namespace default
pod web-0
writer test
time 2023-11-14T22:13:20.123456789Z
address 10.244.1.7/24 via 10.244.1.1
address fd00:244:1::7/64 via fd00:244:1::1
end
`
	if diff := cmp.Diff(want, string(data)); diff != "" {
		t.Error(diff)
	}
}

func TestRecordRoundTrip(t *testing.T) {
	plain := testLease("abc123", "10.244.1.7/24")
	odd := testLease("x\nend\ny", "fd00::1/64")
	odd.IfName, odd.PodName, odd.PodNamespace = `"eth 0"`, "\x00\xff\nü", " "
	bare := testLease("c", "10.0.0.1/8")
	bare.Addrs[0].Gateway = netip.Addr{}
	for _, l := range []Lease{plain, odd, bare} {
		data, err := encode(l)
		if err != nil {
			t.Fatal(err)
		}
		back, err := decode(data)
		if err != nil {
			t.Errorf("%q: %v", data, err)
		}
		if diff := cmp.Diff(l, back, cmpAddr); diff != "" {
			t.Error(diff)
		}
		for n := range data {
			if _, err := decode(data[:n]); err == nil {
				t.Errorf("a record cut to %d of %d bytes passes for whole", n, len(data))
			}
		}
	}
	named := testLease("c", "10.0.0.1/8")
	named.PodNamespace, named.PodName = strings.Repeat("n", 253), strings.Repeat("\n", 5000)
	if got, err := encode(named); err != nil || len(got) > maxRecord {
		t.Errorf("a long name: %d bytes, %v", len(got), err)
	} else if l, err := decode(got); err != nil || l.ContainerID != "c" || l.PodName != "" {
		t.Errorf("a long name: %+v, %v", l, err)
	}
	if _, err := encode(testLease(strings.Repeat("x", maxRecord), "10.0.0.1/8")); err == nil {
		t.Error("a record of more than a page was made")
	}
}

func TestRecordFromTheFuture(t *testing.T) {
	data, err := encode(testLease("c", "10.0.0.1/8"))
	if err != nil {
		t.Fatal(err)
	}
	newer := strings.Replace(string(data), "writer", "colour blue\nwriter", 1)
	if _, err := decode([]byte(newer)); err != nil {
		t.Errorf("a key of a newer version: %v", err)
	}
}

func TestLeaseNames(t *testing.T) {
	seen := map[string]Owner{}
	for _, o := range []Owner{
		{ContainerID: "abc", IfName: "eth0"}, {ContainerID: "abc", IfName: "eth1"}, {ContainerID: ".", IfName: "."},
		{ContainerID: "..", IfName: "x"}, {ContainerID: ".new", IfName: "x"}, {ContainerID: "a/b", IfName: "../c"}, {ContainerID: "a:b", IfName: "c"},
		{ContainerID: "a", IfName: "b:c"}, {ContainerID: "a%3ab", IfName: "c"}, {ContainerID: "ä\x00\n", IfName: "e h"},
		{ContainerID: strings.Repeat("x", 196), IfName: "e"}, {ContainerID: strings.Repeat("x", 300), IfName: "eth0"},
		{ContainerID: strings.Repeat("x", 301), IfName: "eth0"},
	} {
		name := leaseName(o.ContainerID, o.IfName)
		if other, ok := seen[name]; ok {
			t.Errorf("%q is the name of %+v and %+v", name, o, other)
		}
		seen[name] = o
		if len(name) > maxName || strings.ContainsAny(name, "/\x00\n ") || name[0] == '.' {
			t.Errorf("%q is not a safe file name", name)
		}
		if back, ok := ownerOf(name); ok && back != o || !ok && len(o.ContainerID) < 200 {
			t.Errorf("ownerOf(%q) = %+v, %v, want %+v", name, back, ok, o)
		}
	}
}

func FuzzDecode(f *testing.F) {
	data, err := encode(testLease("abc", "10.244.1.7/24"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add([]byte(recordHead + "\n\nend\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		l, err := decode(data)
		if err != nil {
			return
		}
		again, err := encode(l)
		if err != nil {
			return // longer than a page once quoted
		}
		back, err := decode(again)
		if err != nil || !back.equal(l) {
			t.Fatalf("%q became %q: %v", data, again, err)
		}
	})
}
