package rtnl

import (
	"testing"

	"golang.org/x/sys/unix"
)

// FuzzAnswers: no message of the kernel, cut or mangled, is read beyond its end, and none is taken for success that says it failed.
func FuzzAnswers(f *testing.F) {
	var r Request
	r.Ifinfo(7, unix.IFF_UP, 0)
	r.AttrString(unix.IFLA_IFNAME, "hc0")
	end := r.Nest(unix.IFLA_LINKINFO)
	r.AttrString(unix.IFLA_INFO_KIND, "veth")
	end()
	f.Add(r.Body, uint16(0))
	f.Add([]byte{0xef, 0xff, 0xff, 0xff, 20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 1, 0, 'n', 'o', 0, 0}, uint16(unix.NLM_F_ACK_TLVS))
	f.Add([]byte{0xef, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, uint16(unix.NLM_F_ACK_TLVS))
	f.Fuzz(func(t *testing.T, b []byte, flags uint16) {
		for typ, v := range Attrs(b) {
			if len(v) > len(b)-4 || typ&unix.NLA_F_NESTED != 0 {
				t.Errorf("attribute %d has %d bytes of %d", typ, len(v), len(b))
			}
		}
		if l, err := ParseLink(b); err == nil && len(b) < unix.SizeofIfInfomsg {
			t.Errorf("%+v out of %d bytes", l, len(b))
		}
		if err := parseError("x", flags, b); err == nil && (len(b) < 4+unix.NLMSG_HDRLEN || b[0]|b[1]|b[2]|b[3] != 0) {
			t.Errorf("success, by %x", b)
		}
	})
}
