package leases

import (
	"cmp"
	"errors"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/headcni/headcni/pkg/networking/hostport"
	"github.com/headcni/headcni/pkg/networking/podlink"
	"github.com/headcni/headcni/pkg/nft"
)

// Ports are the node's ports that lead to pods of its own. Make it with NewPorts.
type Ports struct {
	folder string
	links  podlink.Handle
	stamp  atomic.Int64 // the folder's, at the last look
}

// NewPorts reads what the plugin keeps beside the daemon's socket.
func NewPorts(socket string) *Ports { return &Ports{folder: hostport.Folder(socket)} }

// Tell calls changed where a pod with ports came or went since the last List. It may be called while that is at work.
func (p *Ports) Tell(changed func()) {
	if p.now() != p.stamp.Load() {
		changed()
	}
}

func (p *Ports) now() int64 {
	info, err := os.Stat(p.folder)
	if err != nil {
		return 0
	}
	return info.ModTime().UnixNano()
}

// List has what there is now, sorted. The record of a pod whose link is not there stays: the link may be under another name for the moment
// until a Mender is done, and DEL takes the record along. One that never gets a DEL leads nowhere, and ends with the next pod that
// asks for the port, with CNI's GC or with the tmpfs.
func (p *Ports) List() (all []nft.Port, err error) {
	stamp := p.now()
	records, err := hostport.List(p.folder)
	if len(records) == 0 {
		p.stamp.Store(stamp)
		return nil, err
	}
	links, err2 := p.links.Attached()
	if err2 != nil {
		p.links.Close()
		return nil, errors.Join(err, err2)
	}
	for _, r := range records {
		_, there := links[r.Link]
		for _, m := range r.Ports {
			for _, a := range r.Addrs {
				if port, ok := portOf(r.Link, m, a); ok {
					port.Gone = !there
					all = append(all, port)
				}
			}
		}
	}
	slices.SortFunc(all, func(a, b nft.Port) int {
		return cmp.Or(cmp.Compare(a.Number, b.Number), cmp.Compare(a.Protocol, b.Protocol), a.At.Compare(b.At), a.To.Compare(b.To), cmp.Compare(a.Link, b.Link))
	})
	p.stamp.Store(stamp)
	return all, err
}

// portOf is a mapping for one address of its pod. What portmap would not take there is none.
func portOf(link string, m hostport.Mapping, pod netip.Addr) (nft.Port, bool) {
	p := nft.Port{Protocol: strings.ToLower(cmp.Or(m.Protocol, "tcp")), Number: m.HostPort, To: netip.AddrPortFrom(pod, m.ContainerPort), Link: link}
	if m.HostIP != "" {
		at, err := netip.ParseAddr(m.HostIP)
		if err != nil || at.Is4() != pod.Is4() {
			return p, false
		}
		if !at.IsUnspecified() {
			p.At = at
		}
	}
	return p, p.Valid()
}
