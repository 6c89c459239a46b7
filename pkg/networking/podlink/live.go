package podlink

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/rtnl"
	"github.com/headcni/headcni/pkg/config/names"
)

// groupBatch is how many links change their group by one system call: the answers must fit into the socket's buffer.
const groupBatch = 256

// LivePod is a pod's link as the kernel knows it.
type LivePod struct {
	ContainerID, IfName string
	Label, UID          string // as given in Pod
	Addrs               []netip.Addr
}

// Live lists the links of one network's pods with their addresses: the truth from which lost leases can be written anew.
func (h *Handle) Live(network string) ([]LivePod, error) {
	v, err := h.podLinks()
	if err != nil {
		return nil, err
	}
	var live []LivePod
	for _, l := range v.links {
		of, pod, ok := podOf(l)
		if of == network && ok && len(v.routes[l.Index]) > 0 {
			pod.Addrs = v.routes[l.Index]
			live = append(live, pod)
		}
	}
	return live, nil
}

// podOf reads a link's alias: the network and the pod that Attach made it for.
func podOf(l rtnl.Link) (network string, pod LivePod, ok bool) {
	network, rest, _ := strings.Cut(l.Alias, " ")
	attachment, label, _ := strings.Cut(rest, " ")
	label, uid, _ := strings.Cut(label, " ")
	id, ifName, ok := strings.Cut(attachment, "/")
	return network, LivePod{ContainerID: id, IfName: ifName, Label: label, UID: uid}, ok
}

// Attachment is a pod's link as the kernel has it now.
type Attachment struct {
	// Leased has the addresses that the node routes to the link.
	Leased
	Name  string
	Index int
	Group uint32
	// Label and UID say whose it is. Cut: the last of them that is there may lack its end.
	Label, UID string
	Cut        bool
	// Ready: the pod's end is up, which an ADD brings about after the host's end has all its routes.
	Ready bool
}

// Attached lists the links of all networks' pods by name. A link whose alias and name differ is nobody's.
func (h *Handle) Attached() (map[string]Attachment, error) {
	v, err := h.podLinks()
	if err != nil {
		return nil, err
	}
	all := map[string]Attachment{}
	for _, l := range v.links {
		if network, pod, ok := podOf(l); ok && l.Name == Name(pod.ContainerID, pod.IfName) {
			all[l.Name] = Attachment{
				Leased: Leased{Network: network, ContainerID: pod.ContainerID, IfName: pod.IfName, Addrs: v.routes[l.Index], Made: madeOf(l)},
				Name:   l.Name, Index: l.Index, Group: l.Group, Label: pod.Label, UID: pod.UID, Cut: len(l.Alias) == aliasMax, Ready: l.Operational,
			}
		}
	}
	return all, nil
}

// Names are those of the host's ends of all pods' links.
func (h *Handle) Names() ([]string, error) {
	all, err := h.Attached()
	return slices.Sorted(maps.Keys(all)), err
}

// Sources lists the addresses that the main table leads to pods' links, by the links' indexes: a pod sends from no others.
func (h *Handle) Sources() (map[int][]netip.Addr, error) {
	v, err := h.podLinks()
	if err != nil {
		return nil, err
	}
	all := map[int][]netip.Addr{}
	for _, l := range v.links {
		for _, a := range v.routes[l.Index] {
			if v.ways[a].link == l.Index && names.IsPodLink(l.Name) && !slices.Contains(all[l.Index], a) {
				all[l.Index] = append(all[l.Index], a)
			}
		}
	}
	return all, nil
}

// SetGroup puts links into a group, all in one go: ip link set dev LINK group N
//
// Of those that are gone it says nothing.
func (h *Handle) SetGroup(group uint32, indexes ...int) error {
	if len(indexes) == 0 {
		return nil
	}
	c, err := h.open()
	if err != nil {
		return err
	}
	var errs []error
	for chunk := range slices.Chunk(indexes, groupBatch) {
		var requests []rtnl.Request
		for _, i := range chunk {
			r := rtnl.Request{What: fmt.Sprintf("put link %d into group %d", i, group), Type: unix.RTM_SETLINK}
			r.Ifinfo(i, 0, 0)
			r.AttrUint32(unix.IFLA_GROUP, group)
			requests = append(requests, r)
		}
		if _, err := c.Do(requests...); err != nil && !errors.Is(err, unix.ENODEV) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// listLinks lists all links whose name is like that of a pod's, and under that name those whose alias says that it was theirs. It is a
// dump: not for ADD or DEL.
func listLinks(c *rtnl.Conn) (map[string]rtnl.Link, error) {
	links, renamed := map[string]rtnl.Link{}, map[string]rtnl.Link{}
	err := c.Links(func(l rtnl.Link) {
		if l.Kind != "veth" {
			return
		}
		if names.IsPodLink(l.Name) {
			links[l.Name] = l
		} else if _, pod, ok := podOf(l); ok {
			renamed[Name(pod.ContainerID, pod.IfName)] = l
		}
	})
	for name, l := range renamed {
		if _, taken := links[name]; !taken {
			links[name] = l
		}
	}
	return links, err
}

// HasPods reports whether any pod's link is on the node.
func (h *Handle) HasPods() bool {
	c, err := h.open()
	if err != nil {
		return false
	}
	found := false
	err = c.Links(func(l rtnl.Link) { found = found || l.Kind == "veth" && names.IsPodLink(l.Name) })
	return err == nil && found
}

// Sweep removes the links of one network's pods for which keep is false. It goes on past errors, and returns the names of
// the links that it could not remove.
func (h *Handle) Sweep(network string, keep func(linkName string) bool) (left []string, err error) {
	c, err := h.open()
	if err != nil {
		return nil, err
	}
	links, err := listLinks(c)
	if err != nil {
		return nil, err
	}
	var errs []error
	for name, l := range links {
		of, _, _ := strings.Cut(l.Alias, " ")
		if of != network || keep(name) {
			continue
		}
		if err := deleteLink(c, l); err != nil {
			left = append(left, name)
			errs = append(errs, err)
		}
	}
	return left, errors.Join(errs...)
}

// InUse reports whether a single address is known to the node's routes: to a pod of whatever network, or to the node itself.
// It asks the kernel once. Where the kernel gives no answer it is false: Attach finds out for itself.
func (h *Handle) InUse(a netip.Addr) bool {
	c, err := h.open()
	if err != nil {
		return false
	}
	r, err := c.MatchingRoute(a)
	return err == nil && r.DstBits == a.BitLen() && (r.Type == unix.RTN_UNICAST || r.Type == unix.RTN_LOCAL)
}
