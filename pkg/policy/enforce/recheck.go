package enforce

import (
	"context"
	"encoding/binary"
	"fmt"
	"maps"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nfnl"
	"github.com/headcni/headcni/pkg/policy"
)

// Recheck asks of each flow that the kernel tracks from or to a pod under recheck whether it is allowed, by what was applied last, and
// takes the pods without a forbidden flow out of recheck: their packets go the short way again. It returns how many stay. It deletes
// no flow: one that a server goes on with would be taken for a new one, from the server.
func (t *Table) Recheck(ctx context.Context, allowed func(policy.Flow) (egress, ingress bool)) (left int, err error) {
	t.mu.Lock()
	asked := maps.Clone(t.recheck)
	t.mu.Unlock()
	if len(asked) == 0 {
		return 0, nil
	}
	stay := map[netip.Addr]bool{}
	err = eachFlow(ctx, func(f policy.Flow) {
		_, from := asked[f.Src]
		_, to := asked[f.Dst]
		from, to = from && !stay[f.Src], to && !stay[f.Dst]
		if !from && !to {
			return
		}
		egress, ingress := allowed(f)
		if from && !egress {
			stay[f.Src] = true
		}
		if to && !ingress {
			stay[f.Dst] = true
		}
	})
	if err != nil {
		return len(asked), fmt.Errorf("list the flows that the kernel tracks: %w", t.explain(err))
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.have == nil {
		return len(t.recheck), nil // the next Apply looks at what is there
	}
	b := nfnl.NewBatch(unix.NFPROTO_INET)
	var out []netip.Addr
	for a, since := range asked {
		if !stay[a] && t.recheck[a] == since { // it has not lost rights again meanwhile
			out = append(out, a)
			b.DelElements(policy.Table, policy.SetRecheck+family(a), []nfnl.Element{{Key: addrKey(a)}})
		}
	}
	if len(out) == 0 {
		return len(t.recheck), nil
	}
	last := len(out) == len(t.recheck)
	if last {
		c := elementChange(policy.MapState, states(true), states(false))
		b.DelElements(policy.Table, c.set, c.del)
		b.AddElements(policy.Table, c.set, c.add)
	}
	if err := t.send(b); err != nil {
		t.have = nil
		return len(t.recheck), fmt.Errorf("end the recheck of %s: %w", said(len(out), "address"), t.explain(err))
	}
	for _, a := range out {
		delete(t.recheck, a)
	}
	t.have.doubt = !last
	return len(t.recheck), nil
}

// Attributes of the kernel's connection tracking (include/uapi/linux/netfilter/nfnetlink_conntrack.h).
const (
	ctGet = 1 // IPCTNL_MSG_CT_GET

	ctaTupleOrig, ctaTupleReply = 1, 2
	ctaTupleIP, ctaTupleProto   = 1, 2
	ctaIPv4Src, ctaIPv6Src      = 1, 3
	ctaProtoNum, ctaProtoSrc    = 1, 2
)

// eachFlow lists what the kernel tracks, one by one: a table may have hundreds of thousands.
func eachFlow(ctx context.Context, do func(policy.Flow)) error {
	req := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_CTNETLINK<<8|ctGet, unix.NLM_F_DUMP)
	req.AddRawData([]byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, 0})
	err := req.ExecuteIter(unix.NETLINK_NETFILTER, 0, func(msg []byte) bool {
		if f, ok := flow(msg); ok {
			do(f)
		}
		return ctx.Err() == nil
	})
	if err != nil {
		return err
	}
	return ctx.Err()
}

// flow is a tracked flow by its own ends: who began it, before translation of the source, and who answers, after translation of the
// destination. The rules ask for the same.
func flow(msg []byte) (f policy.Flow, ok bool) {
	if len(msg) < 4 {
		return f, false
	}
	orig, reply := nfnl.Get(msg[4:], ctaTupleOrig), nfnl.Get(msg[4:], ctaTupleReply)
	var ok2 bool
	f.Src, ok = source(orig)
	f.Dst, ok2 = source(reply)
	proto := nfnl.Get(reply, ctaTupleProto)
	if num := nfnl.Get(proto, ctaProtoNum); len(num) == 1 {
		f.Protocol = policy.Protocol(num[0])
	}
	if port := nfnl.Get(proto, ctaProtoSrc); len(port) == 2 {
		f.Port = binary.BigEndian.Uint16(port)
	}
	return f, ok && ok2
}

func source(tuple []byte) (netip.Addr, bool) {
	ip := nfnl.Get(tuple, ctaTupleIP)
	if b := nfnl.Get(ip, ctaIPv4Src); b != nil {
		return netip.AddrFromSlice(b)
	}
	return netip.AddrFromSlice(nfnl.Get(ip, ctaIPv6Src))
}
