package ipam

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

// TestCooldown: by every strategy an address that was freed is not given for half a minute while others are free, whoever opens the pool,
// and is given where there is no other. One that is asked for is given at once.
func TestCooldown(t *testing.T) {
	for _, strategy := range strategies {
		for _, subnet := range []string{"10.0.0.0/28", "10.0.0.0/12"} { // one of which is full
			t.Run(fmt.Sprint(strategy, " ", subnet), func(t *testing.T) {
				age := time.Hour
				cfg := Config{Network: "net", DataDir: testDir(t), Strategy: strategy, Sets: [][]Range{{{Subnet: pfx(subnet)}}}}
				reopen := func() *Pool { return openAt(t, cfg, nil, func() time.Duration { return age }) }
				addr := func(l Lease) netip.Addr { return l.Addrs[0].Addr.Addr() }
				release := func(id string) {
					t.Helper()
					if had, err := reopen().Release(t.Context(), id, "eth0"); !had || err != nil {
						t.Fatal(had, err)
					}
				}
				const free = 3 // of the small one
				given := map[netip.Addr]string{}
				for i := range 13 - free {
					id := fmt.Sprint(i)
					given[addr(allocate(t, reopen(), id))] = id
				}
				var cooling []netip.Addr
				for _, id := range []string{"2", "5", "7"} {
					for a, owner := range given {
						if owner == id {
							cooling = append(cooling, a)
						}
					}
					release(id)
				}
				age += cooldown - time.Second
				for i := range free {
					if got := addr(allocate(t, reopen(), fmt.Sprint("next-", i))); slices.Contains(cooling, got) {
						t.Errorf("%s is in cooldown and is given", got)
					}
				}
				if subnet == "10.0.0.0/28" {
					for i := range free { // nothing else is left
						if got := addr(allocate(t, reopen(), fmt.Sprint("last-", i))); !slices.Contains(cooling, got) {
							t.Errorf("%s is given, want one of %v", got, cooling)
						}
					}
					if _, err := reopen().Allocate(t.Context(), Owner{ContainerID: "late", IfName: "eth0"}, nil); !errors.Is(err, ErrExhausted) {
						t.Error(err)
					}
					release("last-1")
					age += cooldown + time.Second
					allocate(t, reopen(), "after")
					return
				}
				if l, err := reopen().Allocate(t.Context(), Owner{ContainerID: "asks", IfName: "eth0"}, cooling[:1]); err != nil || addr(l) != cooling[0] {
					t.Error(l, err)
				}
				if got := checked(t, reopen()); len(got) > 0 {
					t.Errorf("%+v", got)
				}
			})
		}
	}
}

// TestCooldownEnds: an address is given in its turn as soon as its time is over.
func TestCooldownEnds(t *testing.T) {
	age := time.Duration(0)
	p := openAt(t, Config{Network: "net", DataDir: testDir(t), Strategy: DensePack, Sets: [][]Range{{{Subnet: pfx("10.0.0.0/24")}}}}, nil,
		func() time.Duration { return age })
	first := addrsOf(allocate(t, p, "a"))
	if _, err := p.Release(t.Context(), "a", "eth0"); err != nil {
		t.Fatal(err)
	}
	for i, step := range []time.Duration{0, cooldown / 2, cooldown} {
		age += step
		if got := addrsOf(allocate(t, p, fmt.Sprint("b", i))); (got == first) != (age > cooldown) {
			t.Errorf("%v after it was freed, %s is given, and it is %s", age, got, first)
		}
	}
}

// TestCooldownOfMany: more than an index remembers, and what an index of an older version, or none, does not know of.
func TestCooldownOfMany(t *testing.T) {
	dir := testDir(t)
	p := openAt(t, Config{Network: "net", DataDir: dir, Strategy: DensePack, Sets: [][]Range{{{Subnet: pfx("10.0.0.0/20")}}}}, nil,
		func() time.Duration { return time.Hour })
	const many = 300
	given := map[string]bool{}
	for i := range many {
		given[addrsOf(allocate(t, p, fmt.Sprint(i)))] = true
	}
	for i := range many {
		if _, err := p.Release(context.Background(), fmt.Sprint(i), "eth0"); err != nil {
			t.Fatal(err)
		}
	}
	again := 0
	for i := range many - 128 {
		if given[addrsOf(allocate(t, p, fmt.Sprint("new-", i)))] {
			again++
		}
	}
	if again != many-128 {
		t.Errorf("%d of the %d that were freed longest ago are given", again, many-128)
	}
	if given[addrsOf(allocate(t, p, "other"))] {
		t.Error("one of those that were freed last is given")
	}
	indexes, err := filepath.Glob(filepath.Join(dir, "net", testBoot, "index", "*"))
	if err != nil || len(indexes) != 1 {
		t.Fatal(indexes, err)
	}
	if err := os.Remove(indexes[0]); err != nil {
		t.Fatal(err)
	}
	if !given[addrsOf(allocate(t, p, "forgotten"))] {
		t.Error("something is in cooldown without an index")
	}
	if got := checked(t, p); len(got) > 0 {
		t.Errorf("%+v", got)
	}
}
