package ipam

import (
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/headcni/headcni/pkg/ipam/store"
)

// memory is what is taken, without a disk.
type memory struct {
	windows map[netip.Addr]*store.Bitmap
	linked  map[netip.Addr]bool
}

func newMemory() *memory {
	return &memory{map[netip.Addr]*store.Bitmap{}, map[netip.Addr]bool{}}
}

func (m *memory) Bitmap(window netip.Addr) (*store.Bitmap, error) {
	if m.windows[window] == nil {
		m.windows[window] = new(store.Bitmap)
	}
	return m.windows[window], nil
}

func (m *memory) Linked(a netip.Addr) (bool, error) { return m.linked[a], nil }

func (m *memory) set(t testing.TB, a netip.Addr, taken bool) {
	t.Helper()
	window, offset := store.Locate(a)
	b, _ := m.Bitmap(window)
	changed, err := b.Set(offset, taken)
	if err != nil || !changed || m.linked[a] == taken {
		t.Fatalf("%s: taken %v before and now; %v", a, taken, err)
	}
	m.linked[a] = taken
}

func rangesOf(t testing.TB, json string) []Range {
	t.Helper()
	c, err := ParseConfig("net", []byte(`{"ranges": [`+json+`]}`))
	if err != nil {
		t.Fatal(err)
	}
	return c.Sets[0]
}

// usable lists what a set may give by the definition, one address at a time.
func usable(set []Range) (out []netip.Addr) {
	for _, r := range set {
		for a := r.Start; a.IsValid() && a.Compare(r.End) <= 0; a = a.Next() {
			excluded := slices.ContainsFunc(r.Exclude, func(x netip.Prefix) bool { return x.Contains(a) })
			broadcast := a.Is4() && a == lastOf(r.Subnet)
			if !excluded && !broadcast && a != r.Gateway && a != r.Subnet.Addr() {
				out = append(out, a)
			}
		}
	}
	return out
}

var shapes = map[string]string{
	"/30":            `[{"subnet": "10.0.0.0/30"}]`,
	"/24":            `[{"subnet": "10.0.0.0/24"}]`,
	"part":           `[{"subnet": "10.0.0.0/24", "rangeStart": "10.0.0.10", "rangeEnd": "10.0.0.50"}]`,
	"gateway inside": `[{"subnet": "10.0.0.0/26", "gateway": "10.0.0.20"}]`,
	"gateway beyond": `[{"subnet": "10.0.0.0/26", "gateway": "169.254.1.1"}]`,
	"whole start":    `[{"subnet": "10.0.0.0/28", "rangeStart": "10.0.0.0", "rangeEnd": "10.0.0.15"}]`,
	"exclude":        `[{"subnet": "10.0.0.0/25", "exclude": ["10.0.0.0/28", "10.0.0.40", "10.0.0.40/30", "10.0.0.120/29"]}]`,
	"two ranges":     `[{"subnet": "10.0.1.0/28"}, {"subnet": "10.0.0.0/28"}]`,
	"same subnet": `[{"subnet": "10.0.0.0/24", "rangeStart": "10.0.0.50", "rangeEnd": "10.0.0.60"},
		{"subnet": "10.0.0.0/24", "rangeStart": "10.0.0.10", "rangeEnd": "10.0.0.20"}]`,
	"over windows":   `[{"subnet": "10.0.0.0/8", "rangeStart": "10.15.255.200", "rangeEnd": "10.16.0.50"}]`,
	"last of all v4": `[{"subnet": "255.255.255.0/24"}]`,
	"/120":           `[{"subnet": "fd00::/120"}]`,
	"v6 windows":     `[{"subnet": "fd00::/64", "rangeStart": "fd00::f:ffe0", "rangeEnd": "fd00::10:20"}]`,
	"last of all v6": `[{"subnet": "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ff00/120"}]`,
}

var strategies = []Strategy{Sequential, Random, DensePack}

func TestSpansAreWhatMayBeGiven(t *testing.T) {
	for name, shape := range shapes {
		set := rangesOf(t, shape)
		var got []netip.Addr
		s := newSpace(set)
		for i, sp := range s {
			for a := sp.lo; a.IsValid() && a.Compare(sp.hi) <= 0; a = a.Next() {
				got = append(got, a)
				if c := s.at(number{lo: uint64(len(got) - 1)}); c.addr != a {
					t.Errorf("%s: at(%d) = %s, want %s", name, len(got)-1, c.addr, a)
				}
			}
			if i > 0 && s[i-1].rng == sp.rng && s[i-1].hi.Next() == sp.lo {
				t.Errorf("%s: spans %v and %v should be one", name, s[i-1], sp)
			}
		}
		want := usable(set)
		if !slices.Equal(got, want) {
			t.Errorf("%s: %v\nwant %v", name, got, want)
		}
		if s.size() != (number{lo: uint64(len(want))}) {
			t.Errorf("%s: size %v, want %d", name, s.size(), len(want))
		}
	}
}

func TestSpaceWithout(t *testing.T) {
	for name, shape := range shapes {
		whole := newSpace(rangesOf(t, shape))
		order := usable(rangesOf(t, shape))
		for i, a := range order {
			less := whole.without(a)
			if _, ok := less.find(a); ok || less.size() != (number{lo: uint64(len(order) - 1)}) {
				t.Errorf("%s: without %s: %v", name, a, less)
			}
			for j := range len(order) - 1 {
				want := order[j]
				if j >= i {
					want = order[j+1]
				}
				if got := less.at(number{lo: uint64(j)}); got.addr != want || !got.rng.Subnet.Contains(want) {
					t.Fatalf("%s: without %s: at(%d) = %s, want %s", name, a, j, got.addr, want)
				}
			}
		}
		if got := whole.without(adr("203.0.113.1")); got.size() != whole.size() {
			t.Errorf("%s: a foreign address changed it: %v", name, got)
		}
	}
}

// Every strategy gives each address exactly once and stops after the last.
func TestFillsThePool(t *testing.T) {
	for name, shape := range shapes {
		set := rangesOf(t, shape)
		want := usable(set)
		for _, strategy := range strategies {
			m := newMemory()
			r := rand.New(rand.NewPCG(1, 2))
			var last netip.Addr
			var got []netip.Addr
			for {
				c, err := pick(strategy, newSpace(set), last, m, r.Uint64)
				if err != nil {
					t.Fatal(err)
				}
				if c.rng == nil {
					break
				}
				if !c.rng.Subnet.Contains(c.addr) {
					t.Errorf("%s %s: %s of range %s", name, strategy, c.addr, c.rng.Subnet)
				}
				m.set(t, c.addr, true) // fails where the address is taken
				last, got = c.addr, append(got, c.addr)
			}
			slices.SortFunc(got, netip.Addr.Compare)
			sorted := slices.SortedFunc(slices.Values(want), netip.Addr.Compare)
			if !slices.Equal(got, sorted) {
				t.Errorf("%s %s: gave %d addresses, want %d", name, strategy, len(got), len(sorted))
			}
		}
	}
}

// churn takes and frees at random, and asks check before each pick.
func churn(t *testing.T, set []Range, strategy Strategy, rounds, target int, check func(m *memory, last netip.Addr, c choice)) *memory {
	t.Helper()
	m, r := newMemory(), rand.New(rand.NewPCG(3, 4))
	var last netip.Addr
	var held []netip.Addr
	for range rounds {
		if len(held) > 0 && r.IntN(2*target) < len(held) {
			i := r.IntN(len(held))
			m.set(t, held[i], false)
			held = slices.Delete(held, i, i+1)
			continue
		}
		c, err := pick(strategy, newSpace(set), last, m, r.Uint64)
		if err != nil {
			t.Fatal(err)
		}
		check(m, last, c)
		if c.rng != nil {
			m.set(t, c.addr, true)
			last, held = c.addr, append(held, c.addr)
		}
	}
	return m
}

// Sequential is the next free one in the order of the configuration, so every other free address comes before a released
// one comes again.
func TestSequentialIsRoundRobin(t *testing.T) {
	for name, shape := range shapes {
		set := rangesOf(t, shape)
		order := usable(set)
		churn(t, set, Sequential, 2000, len(order), func(m *memory, last netip.Addr, c choice) {
			start := slices.Index(order, last) + 1
			var want netip.Addr
			for i := range order {
				if a := order[(start+i)%len(order)]; !m.linked[a] {
					want = a
					break
				}
			}
			if c.addr != want {
				t.Fatalf("%s: after %s came %s, want %s", name, last, c.addr, want)
			}
		})
	}
}

// Of N addresses of which H are held, no strategy can promise more than N-H allocations from one giving of an address to the
// next: where the H stay held, the others take turns. Sequential keeps that promise; what the others do is measured beside it.
func TestSequentialMaximisesTimeBeforeReuse(t *testing.T) {
	set := rangesOf(t, `[{"subnet": "10.0.0.0/24"}, {"subnet": "10.0.5.0/25"}]`)
	size := len(usable(set))
	shortest := map[Strategy]int{}
	for _, strategy := range strategies {
		given, n, held, most := map[netip.Addr]int{}, 0, 0, 0
		shortest[strategy] = math.MaxInt
		churn(t, set, strategy, 8000, size/2, func(m *memory, _ netip.Addr, c choice) {
			held = 0
			for _, taken := range m.linked {
				if taken {
					held++
				}
			}
			n, most = n+1, max(most, held)
			if before, ok := given[c.addr]; ok {
				shortest[strategy] = min(shortest[strategy], n-before)
			}
			given[c.addr] = n
		})
		if best := size - most; strategy == Sequential && shortest[strategy] < best {
			t.Errorf("an address came again after %d allocations, want %d", shortest[strategy], best)
		}
	}
	t.Logf("allocations from one giving of an address to the next, at least, of %d addresses half of which are held: %v", size, shortest)
	if shortest[Random]*4 > shortest[Sequential] || shortest[DensePack]*4 > shortest[Sequential] {
		t.Errorf("sequential is not far ahead: %v", shortest)
	}
}

func TestSequentialAfterAChangeOfRanges(t *testing.T) {
	set := rangesOf(t, `[{"subnet": "10.0.0.0/24", "rangeStart": "10.0.0.10", "rangeEnd": "10.0.0.50", "exclude": ["10.0.0.20/30"]},
		{"subnet": "10.0.5.0/24"}]`)
	for last, want := range map[string]string{
		"10.0.0.5": "10.0.0.10", "10.0.0.21": "10.0.0.24", "10.0.0.60": "10.0.5.2", "10.0.5.255": "10.0.0.10",
		"10.7.7.7": "10.0.0.10", "fd00::1": "10.0.0.10", "10.0.0.30": "10.0.0.31", "10.0.0.50": "10.0.5.2",
	} {
		c, err := pick(Sequential, newSpace(set), netip.MustParseAddr(last), newMemory(), nil)
		if err != nil || c.addr.String() != want {
			t.Errorf("after %s came %s, want %s; %v", last, c.addr, want, err)
		}
	}
}

// Random is uniform over the free addresses: the chi-squared statistic stays below its 99.99 % quantile. The seed is
// fixed, so the test cannot fail by chance.
func TestRandomIsUniform(t *testing.T) {
	for name, shape := range shapes {
		if name == "/30" {
			continue // one address
		}
		set := rangesOf(t, shape)
		m, r := newMemory(), rand.New(rand.NewPCG(5, 6))
		var free []netip.Addr
		for i, a := range usable(set) {
			if i%3 == 1 {
				m.set(t, a, true)
			} else {
				free = append(free, a)
			}
		}
		const perAddress = 50
		count := map[netip.Addr]int{}
		for range perAddress * len(free) {
			c, err := pick(Random, newSpace(set), netip.Addr{}, m, r.Uint64)
			if err != nil || m.linked[c.addr] {
				t.Fatalf("%s: %s: %v", name, c.addr, err)
			}
			count[c.addr]++
		}
		chi := 0.0
		for _, a := range free {
			d := float64(count[a] - perAddress)
			chi += d * d / perAddress
		}
		// Wilson and Hilferty's approximation of the quantile; 3.72 is the normal one.
		k := float64(len(free) - 1)
		z := 1 - 2/(9*k) + 3.72*math.Sqrt(2/(9*k))
		if limit := k * z * z * z; chi > limit {
			t.Errorf("%s: chi-squared %.0f over %d addresses, limit %.0f", name, chi, len(free), limit)
		}
	}
}

// In a space too large for an index the draw is over all of it.
func TestRandomInA64(t *testing.T) {
	set := rangesOf(t, `[{"subnet": "fd00::/64", "exclude": ["fd00::/72"]}, {"subnet": "fd01::/64"}]`)
	m, r := newMemory(), rand.New(rand.NewPCG(7, 8))
	var buckets [16]int
	for range 1600 {
		c, err := pick(Random, newSpace(set), netip.Addr{}, m, r.Uint64)
		if err != nil {
			t.Fatal(err)
		}
		m.linked[c.addr] = true
		b := c.addr.As16()
		buckets[b[1]&1<<3|b[8]>>5]++
	}
	for i, n := range buckets {
		if n < 60 || n > 145 { // 100 expected, four deviations
			t.Errorf("bucket %d has %d of 1600 draws: %v", i, n, buckets)
		}
	}
	if len(m.windows) != 0 {
		t.Errorf("%d windows were indexed", len(m.windows))
	}
}

// A space of which only few are free, too large for an index, is still filled to the last address.
func TestRandomFindsTheLast(t *testing.T) {
	m := newMemory()
	set := rangesOf(t, `[{"subnet": "10.0.0.0/7", "rangeStart": "10.0.0.0", "rangeEnd": "11.255.255.255"}]`)
	space := newSpace(set)
	only := netip.MustParseAddr("10.7.7.7")
	full := &almostFull{memory: m, free: only}
	c, err := pick(Random, space, netip.Addr{}, full, rand.New(rand.NewPCG(9, 9)).Uint64)
	if err != nil || c.addr != only {
		t.Errorf("picked %s, want %s; %v", c.addr, only, err)
	}
}

// almostFull says that everything but one address is taken.
type almostFull struct {
	*memory
	free netip.Addr
	full *store.Bitmap
}

func (a *almostFull) Linked(x netip.Addr) (bool, error) { return x != a.free, nil }

func (a *almostFull) Bitmap(window netip.Addr) (*store.Bitmap, error) {
	w, offset := store.Locate(a.free)
	if a.full == nil {
		a.full = new(store.Bitmap)
		a.full.Fill()
	}
	if window != w {
		return a.full, nil
	}
	b := new(store.Bitmap)
	b.Fill()
	_, err := b.Set(offset, false)
	return b, err
}

// Dense-pack is the lowest free address of the fullest block of the whole set.
func TestDensePackAgainstDefinition(t *testing.T) {
	for name, shape := range shapes {
		set := rangesOf(t, shape)
		order := usable(set)
		churn(t, set, DensePack, 1500, len(order), func(m *memory, _ netip.Addr, c choice) {
			blocks := map[netip.Prefix]int{}
			for a, taken := range m.linked {
				if taken {
					blocks[block(a)]++
				}
			}
			most, want := -1, netip.Addr{}
			for _, a := range order {
				if n := blocks[block(a)]; !m.linked[a] && n > most {
					most, want = n, a
				}
			}
			if c.addr != want {
				t.Fatalf("%s: %s in a block of %d, want %s in one of %d", name, c.addr, blocks[block(c.addr)], want, most)
			}
		})
	}
}

func block(a netip.Addr) netip.Prefix {
	return netip.PrefixFrom(a, a.BitLen()-store.BlockBits).Masked()
}

// Under churn dense-pack holds its leases in far fewer blocks than the others.
func TestDensePackKeepsFewBlocks(t *testing.T) {
	set := rangesOf(t, `[{"subnet": "10.0.0.0/22"}]`)
	mean := map[Strategy]float64{}
	for _, strategy := range strategies {
		sum, least, n := 0, 0, 0
		churn(t, set, strategy, 6000, 110, func(m *memory, _ netip.Addr, _ choice) {
			if n++; n < 1000 {
				return // warming up
			}
			blocks, leases := map[netip.Prefix]bool{}, 0
			for a, taken := range m.linked {
				if taken {
					blocks[block(a)], leases = true, leases+1
				}
			}
			sum, least = sum+len(blocks), least+(leases+store.BlockSize-1)/store.BlockSize
		})
		mean[strategy] = math.Round(100*float64(sum)/float64(least)) / 100
	}
	t.Logf("blocks in use, as a multiple of the fewest possible: %v", mean)
	if mean[DensePack] > 1.6 || mean[DensePack]*2 > mean[Sequential] || mean[DensePack]*2 > mean[Random] {
		t.Errorf("dense-pack does not pack: %v", mean)
	}
}

func TestNumbers(t *testing.T) {
	for _, text := range []string{"0.0.0.0", "10.1.2.3", "255.255.255.255", "::", "fd00::1", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"} {
		a := netip.MustParseAddr(text)
		if back := numberOf(a).addr(a); back != a {
			t.Errorf("%s became %s", a, back)
		}
	}
	a, b := number{1, 2}, number{0, ^uint64(0)}
	if got := a.add(b); got != (number{2, 1}) || got.sub(b) != a || a.compare(b) != 1 || b.compare(a) != -1 || a.compare(a) != 0 {
		t.Errorf("add, sub or compare: %v", got)
	}
	r := rand.New(rand.NewPCG(1, 1))
	for _, limit := range []number{{0, 1}, {0, 3}, {1, 0}, {1, 1}, {5, 7}, {0, 1 << 63}} {
		for range 200 {
			if n := below(limit, r.Uint64); n.compare(limit) >= 0 {
				t.Errorf("below(%v) = %v", limit, n)
			}
		}
	}
}

func ExampleStrategy() {
	set := []Range{Range{Subnet: netip.MustParsePrefix("10.0.0.0/24")}.withDefaults()}
	m := newMemory()
	for _, taken := range []string{"10.0.0.2", "10.0.0.3", "10.0.0.30", "10.0.0.31", "10.0.0.32"} {
		window, offset := store.Locate(netip.MustParseAddr(taken))
		b, _ := m.Bitmap(window)
		_, _ = b.Set(offset, true)
	}
	last := netip.MustParseAddr("10.0.0.31")
	seq, _ := pick(Sequential, newSpace(set), last, m, nil)
	dense, _ := pick(DensePack, newSpace(set), last, m, nil)
	fmt.Println(seq.addr, dense.addr)
	// Output: 10.0.0.33 10.0.0.4
}
