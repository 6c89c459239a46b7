package ipam

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"

	"github.com/headcni/headcni/internal/jsonobj"
	"github.com/headcni/headcni/internal/nearest"
	"github.com/headcni/headcni/pkg/config/names"
	"github.com/headcni/headcni/pkg/config/paths"
)

// Range is a span of addresses of one subnet.
type Range struct {
	// Subnet gives the prefix length of the addresses; IPv4 /30, IPv6 /126 or wider, without host bits.
	Subnet netip.Prefix
	// Start and End are inclusive. Default: all of the subnet.
	Start, End netip.Addr
	// Gateway is never given where it lies in the range. Default: the subnet's first address.
	Gateway netip.Addr
	// Exclude is never given; nor are the network address and, for IPv4, the broadcast address.
	Exclude []netip.Prefix
}

// Route is a route of the result, with the fields of CNI specification 1.1.0.
type Route struct {
	Dst                   netip.Prefix
	GW                    netip.Addr
	MTU, AdvMSS, Priority int
	Table, Scope          *int
}

// Config is one network's address management.
type Config struct {
	// Network is the CNI network's name.
	Network string
	// Sets are range sets: an attachment gets one address from each. The ranges of a set are of one family.
	Sets [][]Range
	// Strategy default Sequential.
	Strategy Strategy
	// DataDir holds a folder per network. Default paths.IPAMDir.
	DataDir string
	// Writer is recorded in each lease. Default Standalone.
	Writer string
	// Routes and the DNS settings of the file ResolvConf go into the result.
	Routes     []Route
	ResolvConf string
	// InUse, where it is set, says that an address that no lease has is live all the same, for instance under another
	// network's name. Such an address is passed over for this time. It is asked under the lock, and not about requested
	// addresses.
	InUse func(netip.Addr) bool
}

// rangeJSON is host-local's range with exclude added.
type rangeJSON struct {
	Subnet, RangeStart, RangeEnd, Gateway string
	Exclude                               []string
}

// configJSON is host-local's ipam object with strategy and exclude added.
type configJSON struct {
	rangeJSON
	Ranges              [][]rangeJSON
	Strategy            Strategy
	DataDir, ResolvConf string
	Routes              []routeJSON
}

type routeJSON struct {
	Dst      string `json:"dst"`
	GW       string `json:"gw"`
	MTU      int    `json:"mtu"`
	AdvMSS   int    `json:"advmss"`
	Priority int    `json:"priority"`
	Table    *int   `json:"table"`
	Scope    *int   `json:"scope"`
}

// ParseConfig reads the ipam object of a CNI network configuration: host-local's format (subnet, rangeStart, rangeEnd,
// gateway, ranges, routes, dataDir, resolvConf), and in addition strategy and exclude (a list of prefixes or addresses, in
// a range or beside the ranges). A subnet beside ranges makes the first set, as with host-local. Unknown keys are an
// error. The error is an ErrConfig that names all faults; where they all are unknown keys, it is an ErrUnsupported too;
// where the only one is that there is no range, it is an ErrNoRanges too, and the rest of the Config is good.
func ParseConfig(network string, ipamJSON []byte) (Config, error) {
	p := &parser{}
	var raw configJSON
	known := p.keys(&raw)
	o, err := jsonobj.Parse(ipamJSON)
	if err != nil {
		return Config{}, fmt.Errorf("%w: ipam: want an object; known keys are %s", ErrConfig, known.list())
	}
	p.object("", o, known)
	if len(p.faults) > 0 {
		return Config{}, p.err()
	}
	c := p.config(network, raw)
	c = c.withDefaults()
	if len(p.faults) == 0 {
		return c, c.Validate()
	}
	return c, p.err()
}

// parser turns text into addresses and gathers the faults.
type parser struct {
	faults  []error
	unknown int // the number of faults that are unknown keys
}

func (p *parser) fault(field, format string, args ...any) {
	p.faults = append(p.faults, fmt.Errorf("ipam."+field+": "+format, args...))
}

func (p *parser) err() error {
	kind := ErrConfig
	switch len(p.faults) {
	case 0:
		return nil
	case p.unknown:
		kind = ErrUnsupported
	}
	return fmt.Errorf("%w: %w", kind, errors.Join(p.faults...))
}

// reader reads the value of a member, whose name is for faults.
type reader func(field string, v json.RawMessage)

// readers are the keys that an object may have.
type readers map[string]reader

func (r readers) list() string { return strings.Join(slices.Sorted(maps.Keys(r)), ", ") }

// object has each member read that is not null, which Go programs write for what they left nil.
func (p *parser) object(at string, o jsonobj.Object, known readers) {
	for _, key := range slices.Sorted(maps.Keys(o)) {
		read, ok := known[key]
		switch {
		case o[key] == nil:
		case ok:
			read(at+key, o[key])
		default:
			p.unknownKey(at, key, o[key], known)
		}
	}
}

// unknownKey names key and value, as the specification wants it (section 5, error 2). Nothing here is secret.
func (p *parser) unknownKey(at, key string, v json.RawMessage, known readers) {
	p.unknown++
	help := "known keys are " + known.list()
	if like := nearest.Key(key, slices.Collect(maps.Keys(known))); like != "" {
		help = "did you mean " + like + "?"
	}
	p.fault(at+key, "unknown key (value %s), %s", v, help)
}

// into reads a value. The fault does not repeat the input.
func (p *parser) into(to any, want string) reader {
	return func(field string, v json.RawMessage) {
		if json.Unmarshal(v, to) != nil {
			p.fault(field, "want %s", want)
		}
	}
}

func (p *parser) keys(raw *configJSON) readers {
	var ignored string // host-local has a name and ignores it
	known := p.rangeKeys(&raw.rangeJSON)
	maps.Copy(known, readers{
		"type": p.into(&ignored, "a string"), "name": p.into(&ignored, "a string"), "strategy": p.into((*string)(&raw.Strategy), "a string"),
		"dataDir": p.into(&raw.DataDir, "a path"), "resolvConf": p.into(&raw.ResolvConf, "a path"),
		"routes": p.routes(&raw.Routes), "ranges": p.ranges(&raw.Ranges),
	})
	return known
}

func (p *parser) rangeKeys(r *rangeJSON) readers {
	return readers{
		"subnet": p.into(&r.Subnet, "a prefix"), "rangeStart": p.into(&r.RangeStart, "an address"), "rangeEnd": p.into(&r.RangeEnd, "an address"),
		"gateway": p.into(&r.Gateway, "an address"), "exclude": p.into(&r.Exclude, "a list of prefixes and addresses"),
	}
}

func (p *parser) routes(to *[]routeJSON) reader {
	return func(field string, v json.RawMessage) {
		d := json.NewDecoder(bytes.NewReader(v))
		d.DisallowUnknownFields()
		if err := d.Decode(to); err != nil {
			p.fault(field, "want a list of {dst, gw, mtu, advmss, priority, table, scope}: %s", strings.TrimPrefix(err.Error(), "json: "))
		}
	}
}

func (p *parser) ranges(to *[][]rangeJSON) reader {
	return func(field string, v json.RawMessage) {
		var sets [][]jsonobj.Object
		p.into(&sets, "a list of lists of ranges")(field, v)
		for i, set := range sets {
			*to = append(*to, make([]rangeJSON, len(set)))
			for j, r := range set {
				p.object(fmt.Sprintf("%s[%d][%d].", field, i, j), r, p.rangeKeys(&(*to)[i][j]))
			}
		}
	}
}

func (p *parser) config(network string, raw configJSON) Config {
	c := Config{Network: network, Strategy: raw.Strategy, DataDir: raw.DataDir, ResolvConf: raw.ResolvConf}
	shared := raw.Exclude
	raw.Exclude = nil
	if raw.Subnet != "" {
		c.Sets = append(c.Sets, []Range{p.rng("", raw.rangeJSON)})
	} else if raw.RangeStart != "" || raw.RangeEnd != "" || raw.Gateway != "" {
		p.fault("subnet", "is missing, but rangeStart, rangeEnd or gateway is given")
	}
	for i, set := range raw.Ranges {
		var ranges []Range
		for j, r := range set {
			ranges = append(ranges, p.rng(fmt.Sprintf("ranges[%d][%d].", i, j), r))
		}
		c.Sets = append(c.Sets, ranges)
	}
	for i, text := range shared {
		p.share(c.Sets, fmt.Sprintf("exclude[%d]", i), text)
	}
	for i, r := range raw.Routes {
		c.Routes = append(c.Routes, p.route(fmt.Sprintf("routes[%d].", i), r))
	}
	return c
}

// share adds an exclusion beside the ranges to each range that it touches.
func (p *parser) share(sets [][]Range, field, text string) {
	x := p.prefix(field, text)
	used := false
	for _, set := range sets {
		for i := range set {
			if x.IsValid() && set[i].Subnet.IsValid() && x.Overlaps(set[i].Subnet) {
				set[i].Exclude, used = append(set[i].Exclude, x), true
			}
		}
	}
	if x.IsValid() && !used {
		p.fault(field, "%s: lies in none of the subnets", text)
	}
}

func (p *parser) rng(at string, r rangeJSON) Range {
	out := Range{Start: p.addr(at+"rangeStart", r.RangeStart), End: p.addr(at+"rangeEnd", r.RangeEnd), Gateway: p.addr(at+"gateway", r.Gateway)}
	var err error
	if out.Subnet, err = netip.ParsePrefix(r.Subnet); err != nil {
		p.fault(at+"subnet", "%q: want a prefix such as 10.244.1.0/24", r.Subnet)
	}
	for i, text := range r.Exclude {
		if x := p.prefix(fmt.Sprintf("%sexclude[%d]", at, i), text); x.IsValid() {
			out.Exclude = append(out.Exclude, x)
		}
	}
	return out
}

func (p *parser) addr(field, text string) netip.Addr {
	if text == "" {
		return netip.Addr{}
	}
	a, err := netip.ParseAddr(text)
	if err != nil || a.Zone() != "" {
		p.fault(field, "%q: want an address", text)
		return netip.Addr{}
	}
	return a.Unmap()
}

// prefix also takes a single address.
func (p *parser) prefix(field, text string) netip.Prefix {
	if a, err := netip.ParseAddr(text); err == nil && a.Zone() == "" {
		a = a.Unmap()
		return netip.PrefixFrom(a, a.BitLen())
	}
	x, err := netip.ParsePrefix(text)
	if err != nil {
		p.fault(field, "%q: want a prefix or an address", text)
		return netip.Prefix{}
	}
	return x.Masked()
}

func (p *parser) route(at string, r routeJSON) Route {
	out := Route{GW: p.addr(at+"gw", r.GW), MTU: r.MTU, AdvMSS: r.AdvMSS, Priority: r.Priority, Table: r.Table, Scope: r.Scope}
	var err error
	if out.Dst, err = netip.ParsePrefix(r.Dst); err != nil {
		p.fault(at+"dst", "%q: want a prefix such as 0.0.0.0/0", r.Dst)
	}
	out.Dst = out.Dst.Masked()
	if out.Dst.IsValid() && out.GW.IsValid() && out.GW.Is4() != out.Dst.Addr().Is4() {
		p.fault(at+"gw", "%s: of another family than dst %s", out.GW, out.Dst)
	}
	p.number(at+"mtu", &r.MTU, 0, math.MaxUint16)
	p.number(at+"advmss", &r.AdvMSS, 0, math.MaxUint16)
	p.number(at+"priority", &r.Priority, 0, math.MaxUint32)
	p.number(at+"table", r.Table, 1, math.MaxUint32)
	p.number(at+"scope", r.Scope, 0, math.MaxUint8)
	return out
}

// number wants the value, where there is one, to be what the kernel has room for.
func (p *parser) number(field string, n *int, least, most int64) {
	if n != nil && (int64(*n) < least || int64(*n) > most) {
		p.fault(field, "%d: want %d to %d", *n, least, most)
	}
}

// WithRanges returns an ipam object with the range sets that the runtime asks for (runtimeConfig.ipRanges, the capability
// ipRanges) before its own, as host-local has it. The object may be nil, the ranges too.
func WithRanges(ipamJSON, ipRanges json.RawMessage) (json.RawMessage, error) {
	if len(ipRanges) == 0 {
		return ipamJSON, nil
	}
	keys := jsonobj.Object{}
	var requested, own []json.RawMessage
	if err := json.Unmarshal(ipRanges, &requested); err != nil {
		return nil, fmt.Errorf("%w: runtimeConfig.ipRanges: want a list of range sets", ErrConfig)
	}
	if len(ipamJSON) > 0 {
		if err := json.Unmarshal(ipamJSON, &keys); err != nil || keys == nil {
			return nil, fmt.Errorf("%w: ipam: want an object", ErrConfig)
		}
	}
	if ranges := keys["ranges"]; ranges != nil {
		if err := json.Unmarshal(ranges, &own); err != nil {
			return nil, fmt.Errorf("%w: ipam.ranges: want a list of range sets", ErrConfig)
		}
	}
	all, err := json.Marshal(append(requested, own...))
	if err != nil {
		return nil, err
	}
	keys["ranges"] = all
	return json.Marshal(keys)
}

// withDefaults fills what is not given. The receiver is not changed.
func (c Config) withDefaults() Config {
	if c.Strategy == "" {
		c.Strategy = Sequential
	}
	if c.DataDir == "" {
		c.DataDir = paths.IPAMDir
	}
	if c.Writer == "" {
		c.Writer = Standalone
	}
	sets := make([][]Range, len(c.Sets))
	for i, set := range c.Sets {
		sets[i] = slices.Clone(set)
		for j := range sets[i] {
			sets[i][j] = sets[i][j].withDefaults()
		}
	}
	c.Sets = sets
	return c
}

func (r Range) withDefaults() Range {
	if !r.Subnet.IsValid() {
		return r
	}
	first := r.Subnet.Masked().Addr().Next()
	if !r.Start.IsValid() {
		r.Start = first
	}
	if !r.End.IsValid() {
		r.End = lastOf(r.Subnet)
		if r.Subnet.Addr().Is4() {
			r.End = r.End.Prev()
		}
	}
	if !r.Gateway.IsValid() {
		r.Gateway = first
	}
	return r
}

// lastOf is the highest address of a prefix: the broadcast address of an IPv4 subnet.
func lastOf(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for bit := p.Bits(); bit < 8*len(b); bit++ {
		b[bit/8] |= 0x80 >> (bit % 8)
	}
	a, _ := netip.AddrFromSlice(b) // the length is an address's
	return a
}

// validNetwork says whether a name is one that the CNI specification allows (section 1) and can be a folder's name.
func validNetwork(name string) bool { return len(name) <= 255 && names.Valid(name) }

// Validate returns an ErrConfig with all faults joined. Defaults need not be filled in.
func (c Config) Validate() error {
	c = c.withDefaults()
	p := &parser{}
	if !validNetwork(c.Network) {
		p.faults = append(p.faults, fmt.Errorf("network name %q: want letters, digits, underscore, dot and dash, at most 255", c.Network))
	}
	if c.Strategy != Sequential && c.Strategy != Random && c.Strategy != DensePack {
		p.fault("strategy", "%q: want %s, %s or %s", c.Strategy, Sequential, Random, DensePack)
	}
	if !filepath.IsAbs(c.DataDir) {
		p.fault("dataDir", "%q: want an absolute path", c.DataDir)
	}
	for i, set := range c.Sets {
		p.checkSet(i, set)
	}
	p.checkOverlap(slices.Concat(c.Sets...))
	if len(c.Sets) == 0 {
		if len(p.faults) == 0 {
			return fmt.Errorf("%w: %w; give subnet or ranges", ErrConfig, ErrNoRanges)
		}
		p.fault("ranges", "%s; give subnet or ranges", ErrNoRanges)
	}
	return p.err()
}

func (p *parser) checkSet(i int, set []Range) {
	if len(set) == 0 {
		p.fault(fmt.Sprintf("ranges[%d]", i), "is empty")
	}
	for _, r := range set {
		name := fmt.Sprintf("range %s", r.Subnet)
		if !r.Subnet.IsValid() {
			p.fault(name, "want a subnet")
			continue
		}
		if r.Subnet.Addr().Is4() != set[0].Subnet.Addr().Is4() {
			p.fault(name, "of another family than %s in the same set; make it a set of its own", set[0].Subnet)
		}
		p.checkRange(name, r)
	}
}

func (p *parser) checkRange(name string, r Range) {
	if r.Subnet != r.Subnet.Masked() {
		p.fault(name, "has host bits set; the network is %s", r.Subnet.Masked())
		return
	}
	if r.Subnet.Addr().BitLen()-r.Subnet.Bits() < 2 {
		p.fault(name, "is too small; want /%d or wider", r.Subnet.Addr().BitLen()-2)
		return
	}
	before := len(p.faults)
	for _, a := range []struct {
		field string
		addr  netip.Addr
	}{{"rangeStart", r.Start}, {"rangeEnd", r.End}} {
		if !r.Subnet.Contains(a.addr) {
			p.fault(name, "%s %s lies outside", a.field, a.addr)
		}
	}
	if r.Gateway.Is4() != r.Subnet.Addr().Is4() {
		p.fault(name, "gateway %s is of another family", r.Gateway)
	}
	if r.End.Less(r.Start) {
		p.fault(name, "rangeEnd %s lies before rangeStart %s", r.End, r.Start)
	}
	for _, x := range r.Exclude {
		if !x.Overlaps(r.Subnet) {
			p.fault(name, "exclude %s lies outside", x)
		}
	}
	if before == len(p.faults) && len(r.spans()) == 0 {
		p.fault(name, "every address is reserved or excluded")
	}
}

func (p *parser) checkOverlap(ranges []Range) {
	for i, a := range ranges {
		for _, b := range ranges[:i] {
			if a.Subnet.IsValid() && b.Subnet.IsValid() && a.Start.Compare(b.End) <= 0 && b.Start.Compare(a.End) <= 0 {
				p.fault("ranges", "%s-%s and %s-%s overlap", b.Start, b.End, a.Start, a.End)
			}
		}
	}
}
