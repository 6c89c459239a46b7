package answer

import (
	"net/netip"
	"strings"

	"golang.org/x/net/dns/dnsmessage"
)

const (
	// plainSize is how long an answer over UDP may be where the question does not say more, largest where it does (dnsflagday.net/2020).
	plainSize, largest = 512, 1232
	// maxQuestion in bytes bounds what is read at all: a name of 255, a header and EDNS options have room.
	maxQuestion = 1232
)

// respond answers one message; nil where there is nothing to say to it. size bounds the answer, 0 where the question says by how much.
func (x *index) respond(query []byte, size int) []byte {
	var p dnsmessage.Parser
	h, err := p.Start(query)
	if err != nil || h.Response {
		return nil // to answer answers would be a loop
	}
	out := dnsmessage.Header{ID: h.ID, Response: true, OpCode: h.OpCode, RecursionDesired: h.RecursionDesired}
	q, err := p.Question()
	if err == nil {
		_, more := p.Question()
		if more != dnsmessage.ErrSectionDone {
			err = dnsmessage.ErrSectionDone
		}
	}
	if err != nil {
		out.RCode = dnsmessage.RCodeFormatError
		return build(out, nil, nil, false, plainSize)
	}
	edns, limit := options(&p)
	if size == 0 {
		size = limit
	}
	if h.OpCode != 0 {
		out.RCode = dnsmessage.RCodeNotImplemented
		return build(out, &q, nil, edns, size)
	}
	records := x.resolve(&out, q)
	return build(out, &q, records, edns, size)
}

// options finds EDNS, and how long an answer may be.
func options(p *dnsmessage.Parser) (edns bool, size int) {
	if p.SkipAllAnswers() != nil || p.SkipAllAuthorities() != nil {
		return false, plainSize
	}
	for {
		h, err := p.AdditionalHeader()
		if err != nil {
			return false, plainSize
		}
		if h.Type == dnsmessage.TypeOPT {
			return true, min(max(int(h.Class), plainSize), largest)
		}
		if p.SkipAdditional() != nil {
			return false, plainSize
		}
	}
}

// records are those of one answer.
type records struct {
	name  dnsmessage.Name
	addrs []netip.Addr
	ptr   string
	soa   string // the zone, where there is nothing, or it was asked for
	asked bool   // for the SOA
}

// resolve sets the header's code and says what goes with it.
func (x *index) resolve(h *dnsmessage.Header, q dnsmessage.Question) *records {
	if x == nil || x.Domain == "" && len(x.Hosts) == 0 {
		h.RCode = dnsmessage.RCodeServerFailure // tailscaled has not said anything so far
		return nil
	}
	f := x.find(strings.ToLower(strings.TrimSuffix(q.Name.String(), ".")))
	if f.zone == "" || q.Class != dnsmessage.ClassINET && q.Class != dnsmessage.ClassANY {
		h.RCode = dnsmessage.RCodeRefused
		return nil
	}
	if !f.exists && x.Incomplete {
		h.RCode = dnsmessage.RCodeServerFailure
		return nil
	}
	h.Authoritative = true
	r := &records{name: q.Name}
	for _, a := range f.addrs {
		if q.Type == dnsmessage.TypeALL || q.Type == dnsmessage.TypeA && a.Is4() || q.Type == dnsmessage.TypeAAAA && a.Is6() {
			r.addrs = append(r.addrs, a)
		}
	}
	if q.Type == dnsmessage.TypePTR || q.Type == dnsmessage.TypeALL {
		r.ptr = f.name
	}
	r.asked = q.Type == dnsmessage.TypeSOA && f.exists && strings.EqualFold(f.zone, strings.TrimSuffix(q.Name.String(), "."))
	if !f.exists {
		h.RCode = dnsmessage.RCodeNameError
	}
	if len(r.addrs) == 0 && r.ptr == "" {
		r.soa = f.zone
	}
	return r
}

// build packs an answer. One that is too long says so, and has nothing else in it: TCP takes all.
func build(h dnsmessage.Header, q *dnsmessage.Question, r *records, edns bool, size int) []byte {
	out, err := pack(h, q, r, edns)
	if err == nil && len(out) > size {
		h.Truncated = true
		out, err = pack(h, q, nil, edns)
	}
	if err != nil {
		h.RCode, h.Authoritative = dnsmessage.RCodeServerFailure, false
		if out, err = pack(h, q, nil, edns); err != nil {
			return nil // a name that can be read can be written: never
		}
	}
	return out
}

func pack(h dnsmessage.Header, q *dnsmessage.Question, r *records, edns bool) ([]byte, error) {
	b := dnsmessage.NewBuilder(make([]byte, 0, plainSize), h)
	b.EnableCompression()
	if err := b.StartQuestions(); err != nil {
		return nil, err
	}
	if q != nil {
		if err := b.Question(*q); err != nil {
			return nil, err
		}
	}
	if r != nil {
		if err := r.pack(&b); err != nil {
			return nil, err
		}
	}
	if edns {
		if err := b.StartAdditionals(); err != nil {
			return nil, err
		}
		var o dnsmessage.ResourceHeader
		if err := o.SetEDNS0(largest, dnsmessage.RCodeSuccess, false); err != nil {
			return nil, err
		}
		if err := b.OPTResource(o, dnsmessage.OPTResource{}); err != nil {
			return nil, err
		}
	}
	return b.Finish()
}

func (r *records) pack(b *dnsmessage.Builder) error {
	head := dnsmessage.ResourceHeader{Name: r.name, Class: dnsmessage.ClassINET, TTL: TTL}
	if err := b.StartAnswers(); err != nil {
		return err
	}
	for _, a := range r.addrs {
		var err error
		if a.Is4() {
			err = b.AResource(head, dnsmessage.AResource{A: a.As4()})
		} else {
			err = b.AAAAResource(head, dnsmessage.AAAAResource{AAAA: a.As16()})
		}
		if err != nil {
			return err
		}
	}
	if r.ptr != "" {
		name, err := dnsmessage.NewName(r.ptr + ".")
		if err != nil {
			return err
		}
		if err := b.PTRResource(head, dnsmessage.PTRResource{PTR: name}); err != nil {
			return err
		}
	}
	if r.soa == "" {
		return nil
	}
	if !r.asked {
		if err := b.StartAuthorities(); err != nil {
			return err
		}
	}
	return packSOA(b, r.soa)
}

// packSOA says of whom a "no" is, and for how long (RFC 2308). Nobody transfers the zone: its other numbers mean nothing.
func packSOA(b *dnsmessage.Builder, zone string) error {
	name, err := dnsmessage.NewName(zone + ".")
	if err != nil {
		return err
	}
	mbox, err := dnsmessage.NewName("nobody.invalid.")
	if err != nil {
		return err
	}
	return b.SOAResource(dnsmessage.ResourceHeader{Name: name, Class: dnsmessage.ClassINET, TTL: TTL},
		dnsmessage.SOAResource{NS: name, MBox: mbox, Serial: 1, Refresh: 3600, Retry: 600, Expire: 86400, MinTTL: TTL})
}
