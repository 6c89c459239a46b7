package conntrack

import (
	"encoding/binary"
	"fmt"
	"strings"
	"testing"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nstest"
	"github.com/headcni/headcni/pkg/findings"
)

func TestMain(m *testing.M) { nstest.Main(m) }

// mostFlows is how large a table the test fills. What the kernel allows at most is the machine's, and not for a test to change.
const mostFlows = 1 << 19

// TestFull fills the kernel's table of a namespace, which has a count of its own, and sees what a pod would: nothing gets through.
func TestFull(t *testing.T) {
	ns := nstest.New(t)
	// Rules that ask for conntrack switch it on.
	ns.Run(t, "nft", "add table ip t; add chain ip t out { type filter hook output priority 0; }; add rule ip t out ct state new accept")
	w, fits := Watch{}, false
	ns.Do(t, func() error {
		u, err := Look()
		if err != nil {
			return err
		}
		if u.Max == 0 || u.Entries > 100 || u.Dropped+u.Evicted != 0 {
			t.Errorf("a new namespace: %+v", u)
		}
		if err := w.Err(); err != nil {
			t.Errorf("with room: %v", err)
		}
		if fits = u.Max <= mostFlows; !fits {
			t.Logf("not filled: a table of %d flows takes too much memory", u.Max)
			return nil
		}
		if err := fill(u.Max - u.Entries); err != nil {
			return err
		}
		if u, err = Look(); err != nil || u.Entries < u.Max {
			t.Errorf("filled: %+v, %v", u, err)
		}
		return nil
	})
	if !fits {
		return
	}
	out, err := ns.Command("ping", "-n", "-c", "1", "-W", "1", "127.0.0.2").CombinedOutput()
	if err == nil {
		t.Errorf("a ping passes: %s", out)
	}
	ns.Do(t, func() error {
		u, err := Look()
		if err != nil || u.Dropped == 0 {
			t.Errorf("after the ping: %+v, %v", u, err)
		}
		err = w.Err()
		if findings.IDOf(err) != findings.ConntrackFull || !strings.Contains(err.Error(), fmt.Sprintf("nf_conntrack_max=%d", 2*u.Max)) {
			t.Errorf("full: %v", err)
		}
		return nil
	})
	ns.Run(t, "conntrack", "-F")
	ns.Run(t, "ping", "-n", "-c", "1", "-W", "1", "127.0.0.2")
}

// fill adds flows that are not given up for others, as those of open connections are not.
func fill(n uint64) error {
	s, err := nl.Subscribe(unix.NETLINK_NETFILTER)
	if err != nil {
		return err
	}
	defer s.Close()
	const newFlow, atOnce = unix.NFNL_SUBSYS_CTNETLINK << 8, 200 // IPCTNL_MSG_CT_NEW
	var batch []byte
	for i := range n {
		r := nl.NewNetlinkRequest(newFlow, unix.NLM_F_CREATE|unix.NLM_F_EXCL)
		r.AddData(&nl.Nfgenmsg{NfgenFamily: unix.AF_INET, Version: nl.NFNETLINK_V0})
		for _, a := range flow(uint32(i)) {
			r.AddData(a)
		}
		batch = append(batch, r.Serialize()...)
		if (i+1)%atOnce == 0 || i+1 == n {
			if err := unix.Sendto(s.GetFd(), batch, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
				return fmt.Errorf("add flows: %w", err)
			}
			batch = batch[:0]
		}
	}
	return nil
}

// flow is the i-th UDP flow from 127/8.
func flow(i uint32) []*nl.RtAttr {
	tuple := func(typ int, src, dst uint32, from, to uint16) *nl.RtAttr {
		t := nl.NewRtAttr(unix.NLA_F_NESTED|typ, nil)
		ip := t.AddRtAttr(unix.NLA_F_NESTED|nl.CTA_TUPLE_IP, nil)
		ip.AddRtAttr(nl.CTA_IP_V4_SRC, nl.BEUint32Attr(src))
		ip.AddRtAttr(nl.CTA_IP_V4_DST, nl.BEUint32Attr(dst))
		proto := t.AddRtAttr(unix.NLA_F_NESTED|nl.CTA_TUPLE_PROTO, nil)
		proto.AddRtAttr(nl.CTA_PROTO_NUM, []byte{unix.IPPROTO_UDP})
		proto.AddRtAttr(nl.CTA_PROTO_SRC_PORT, nl.BEUint16Attr(from))
		proto.AddRtAttr(nl.CTA_PROTO_DST_PORT, nl.BEUint16Attr(to))
		return t
	}
	src, dst := 127<<24|1<<16|i>>8, uint32(127<<24|2)
	const assured = 1<<1 | 1<<2 | 1<<3 // IPS_SEEN_REPLY, IPS_ASSURED, IPS_CONFIRMED
	from := 1024 + uint16(i&0xff)
	return []*nl.RtAttr{
		tuple(nl.CTA_TUPLE_ORIG, src, dst, from, 9), tuple(nl.CTA_TUPLE_REPLY, dst, src, 9, from),
		nl.NewRtAttr(nl.CTA_STATUS, binary.BigEndian.AppendUint32(nil, assured)), nl.NewRtAttr(nl.CTA_TIMEOUT, binary.BigEndian.AppendUint32(nil, 600)),
	}
}
