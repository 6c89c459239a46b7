package why

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/netset"
	"github.com/headcni/headcni/internal/nfnl"
	"github.com/headcni/headcni/pkg/config/names"
	"github.com/headcni/headcni/pkg/conflist"
	"github.com/headcni/headcni/pkg/ipam"
	"github.com/headcni/headcni/pkg/networking/podlink"
	"github.com/headcni/headcni/pkg/nft"
	"github.com/headcni/headcni/pkg/nodestatus"
	"github.com/headcni/headcni/pkg/policy/report"
	"github.com/headcni/headcni/pkg/tailscale"
)

// Self is how a node itself is named as an end.
const Self = "node"

// Question is what one node is asked about a connection.
type Question struct {
	// Far is for the node of who is sent to, else it is that of who sends.
	Far bool
	// Src and Dst are addresses, or names: Self, a pod of this node (NAMESPACE/NAME), or a device of the tailnet.
	Src, Dst string
	// Protocol is tcp, udp or icmp, which has no Port.
	Protocol string
	Port     uint16
	// Live: a packet is sent as well.
	Live bool
}

func (q Question) port() string {
	if q.Protocol == icmp {
		return icmp
	}
	return fmt.Sprintf("%d/%s", q.Port, q.Protocol)
}

const (
	icmp = "icmp"
	tcp  = "tcp"
	udp  = "udp"
)

// Side is what one node says of a connection: of its kernel, tailscaled and daemon, at this moment.
type Side struct {
	// Node is the machine's name.
	Node string     `json:"node"`
	Src  netip.Addr `json:"src,omitzero"`
	Dst  netip.Addr `json:"dst,omitzero"`
	// SeenAs is the source that the other end sees.
	SeenAs netip.Addr `json:"seenAs,omitzero"`
	// Daemon is what the daemon says, nil where DaemonError says why it says nothing.
	Daemon      *nodestatus.Status `json:"daemon,omitempty"`
	DaemonError string             `json:"daemonError,omitempty"`
	// Link is the pod's whose end this is. It is nil where no pod has the address.
	Link *Link `json:"link,omitempty"`
	// Local: the address of who is sent to is one of this machine's own. DstLink is the pod's here that has it.
	Local   bool  `json:"local,omitempty"`
	DstLink *Link `json:"dstLink,omitempty"`
	// There and Back are where the kernel leads packets of the connection, and answers.
	There Route `json:"there"`
	Back  Route `json:"back"`
	Guard Guard `json:"guard"`
	// Tailnet is what tailscaled says.
	Tailnet Tailnet `json:"tailnet"`
	// Policy is nil where PolicyError says why, or where no pod is at this end.
	Policy      *report.Explanation `json:"policy,omitempty"`
	PolicyError string              `json:"policyError,omitempty"`
	// PolicyTable: the kernel has our table of NetworkPolicies, or does not tell.
	PolicyTable bool `json:"policyTable"`
	// Port is whether somebody listens, on the far side.
	Port string `json:"port,omitempty"`
	// PortError is what the kernel said to a try.
	PortError string `json:"portError,omitempty"`
}

// Answers of a port.
const (
	portOpen    = "open"
	portRefused = "refused" // nobody listens
	portSilent  = "silent"
	portTaken   = "taken" // UDP: not refused, which is all that can be known
)

// Link is a pod's link as its node's kernel has it.
type Link struct {
	Name string `json:"name"`
	Pod  string `json:"pod"` // NAMESPACE/NAME
	Up   bool   `json:"up"`
	// Carrier: the pod's end is up as well.
	Carrier bool `json:"carrier"`
	MTU     int  `json:"mtu"`
	// Lease tells whether the address has one, nil where leases are another plugin's.
	Lease *bool `json:"lease,omitempty"`
}

// Route is the kernel's answer to RTM_GETROUTE.
type Route struct {
	// Dev is the link, Table where the route stands.
	Dev   string     `json:"dev,omitempty"`
	Table int        `json:"table,omitempty"`
	Via   netip.Addr `json:"via,omitzero"`
	Src   netip.Addr `json:"src,omitzero"`
	// Local: packets are for the machine itself.
	Local bool `json:"local,omitempty"`
	// Error is the kernel's where there is none: unreachable, prohibited. Unreachable tells that a rule or route says so.
	Error       string `json:"error,omitempty"`
	Unreachable bool   `json:"unreachable,omitempty"`
}

// Guard is what our nftables hold about the ends.
type Guard struct {
	// Error is why they could not be read: they are not there.
	Error string `json:"error,omitempty"`
	// SrcCluster and DstCluster: the set of the clusters' pod ranges has the address.
	SrcCluster bool `json:"srcCluster"`
	DstCluster bool `json:"dstCluster"`
	// Refuses is why they refuse what the pod begins by the tunnel outside the cluster, as the counter of what is dropped is called.
	Refuses string `json:"refuses,omitempty"`
}

// Tailnet is what tailscaled says of the connection.
type Tailnet struct {
	Error string       `json:"error,omitempty"`
	State string       `json:"state,omitempty"`
	Name  string       `json:"name,omitempty"`
	IPs   []netip.Addr `json:"ips,omitempty"`
	Tun   string       `json:"tun,omitempty"`
	// Advertised are this node's own routes, Routes those of them that Headscale has approved.
	Advertised []netip.Prefix `json:"advertised,omitempty"`
	Routes     []netip.Prefix `json:"routes,omitempty"`
	// Holder is the peer that has the other end's address, nil for none.
	Holder *Peer `json:"holder,omitempty"`
	// Online is of the holder.
	Online bool `json:"online,omitempty"`
	// Accepts tells whether tailscaled lets the connection in (far side), nil where FilterError says why not known. Pairs: it lets some of
	// it in, on Ports; KnowsSrc and KnowsDst: some rule names the end.
	Accepts     *bool  `json:"accepts,omitempty"`
	FilterError string `json:"filterError,omitempty"`
	Pairs       bool   `json:"pairs,omitempty"`
	Ports       string `json:"ports,omitempty"`
	KnowsSrc    bool   `json:"knowsSrc,omitempty"`
	KnowsDst    bool   `json:"knowsDst,omitempty"`
}

// Place is where a node is asked.
type Place struct {
	Tailscaled *tailscale.Client // nil for none
	// TailscaledError is why there is none.
	TailscaledError error
	// Socket is the daemon's.
	Socket, ConfDir string
}

// portTimeout bounds the try whether somebody listens, and udpWait how long a refusal may take.
const (
	portTimeout = 3 * time.Second
	udpWait     = 500 * time.Millisecond
)

// Look answers on the node that is asked. An error means that an end is not what was said.
func (p Place) Look(ctx context.Context, q Question) (Side, error) {
	s := Side{}
	s.Node, _ = os.Hostname()
	if st, err := nodestatus.Ask(ctx, p.Socket); err != nil {
		s.DaemonError = err.Error()
	} else {
		s.Daemon = &st
	}
	status := p.askTailscaled(ctx, &s)
	var pods podlink.Handle
	defer pods.Close()
	links, err := pods.Attached()
	if err != nil {
		return s, fmt.Errorf("list pods' links: %w", err)
	}
	if err := s.ends(q, links, status); err != nil {
		return s, err
	}
	own := s.Src
	if q.Far {
		own = s.Dst
	}
	s.Link, s.DstLink = linkOf(links, own), linkOf(links, s.Dst)
	for _, l := range []*Link{s.Link, s.DstLink} {
		if l != nil {
			l.lease(ctx, p.ConfDir, links)
		}
	}
	s.Local = isOwn(s.Dst)
	s.routes(q)
	s.Guard = guardOf(s.Src, s.Dst)
	s.SeenAs = s.Src
	toTun := s.There.Dev != "" && s.There.Dev == s.Tailnet.Tun
	if !q.Far && toTun && s.Link != nil && !s.Guard.DstCluster && s.Guard.Error == "" {
		reason, err := nft.Refuses(links[s.Link.Name].Index, s.Dst)
		if err != nil {
			s.Guard.Error = err.Error()
		}
		s.Guard.Refuses = reason
	}
	if !q.Far && toTun && (s.Link == nil || !s.Guard.DstCluster) {
		s.SeenAs = ofFamily(s.Tailnet.IPs, s.Dst)
	}
	if !q.Far && s.Link != nil && s.There.Dev != "" && s.There.Dev != s.Tailnet.Tun && !s.Local && s.DstLink == nil {
		s.SeenAs = cmp.Or(lookup(s.Dst, netip.Addr{}, "").Src, s.Src) // masqueraded
	}
	p.askTailnet(ctx, &s, q, status)
	p.askPolicy(ctx, &s, q)
	if (q.Far || s.Local || s.DstLink != nil) && q.Protocol != icmp {
		s.Port, s.PortError = tryPort(ctx, s.Dst, q)
	}
	return s, nil
}

func (p Place) askTailscaled(ctx context.Context, s *Side) (st tailscale.Status) {
	err := p.TailscaledError
	if p.Tailscaled != nil {
		st, err = p.Tailscaled.Status(ctx)
	}
	if err != nil {
		s.Tailnet.Error = err.Error()
		s.Tailnet.Tun = existing(names.DaemonTun, names.HostTun)
		return st
	}
	s.Tailnet.State, s.Tailnet.Name, s.Tailnet.IPs, s.Tailnet.Routes = st.State, st.Self.Name, st.Self.IPs, st.Self.Routes
	if tun, err := tailscale.FindTun(st.Self.IPs, tailscale.Links); err == nil {
		s.Tailnet.Tun = tun.Name
	} else {
		s.Tailnet.Tun = existing(names.DaemonTun, names.HostTun)
	}
	if prefs, err := p.Tailscaled.Prefs(ctx); err == nil {
		s.Tailnet.Advertised = prefs.AdvertiseRoutes
	}
	return st
}

// existing is the first link that is there.
func existing(links ...string) string {
	for _, name := range links {
		if _, err := netlink.LinkByName(name); err == nil {
			return name
		}
	}
	return ""
}

// isOwn reports whether the machine itself has an address.
func isOwn(a netip.Addr) bool {
	all, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	return (err == nil || errors.Is(err, netlink.ErrDumpInterrupted)) && slices.ContainsFunc(all, func(have netlink.Addr) bool {
		ip, _ := netip.AddrFromSlice(have.IP)
		return ip.Unmap() == a
	})
}

// ends finds the addresses of both ends, of one family.
func (s *Side) ends(q Question, links map[string]podlink.Attachment, st tailscale.Status) error {
	src, err := addrsOf(q.Src, links, st)
	if err != nil {
		return err
	}
	dst, err := addrsOf(q.Dst, links, st)
	if err != nil {
		return err
	}
	if len(dst) == 0 {
		return errors.New("the other end cannot be this node's " + Self)
	}
	if len(src) == 0 { // the kernel chooses
		s.Dst = dst[0]
		return nil
	}
	for _, d := range dst {
		if a := ofFamily(src, d); a.IsValid() {
			s.Src, s.Dst = a, d
			return nil
		}
	}
	return fmt.Errorf("%s has %s addresses alone, and %s has none", q.Src, netset.Family(src[0]), q.Dst)
}

func ofFamily(list []netip.Addr, like netip.Addr) netip.Addr {
	for _, a := range list {
		if a.Is4() == like.Is4() {
			return a
		}
	}
	return netip.Addr{}
}

// addrsOf are the addresses of an end, IPv4 first; none for the node itself.
func addrsOf(end string, links map[string]podlink.Attachment, st tailscale.Status) (out []netip.Addr, err error) {
	if end == Self || end != "" && (end == Self+"/"+st.Self.Name || end == st.Self.Name) {
		return nil, nil
	}
	if a, err := netip.ParseAddr(end); err == nil {
		return []netip.Addr{a.Unmap()}, nil
	}
	var known []string
	for _, l := range links {
		if l.Label == end && len(l.Addrs) > 0 {
			out = append(out, l.Addrs...)
		}
		known = append(known, l.Label)
	}
	name := strings.TrimPrefix(end, Self+"/")
	for _, p := range st.Peers {
		if len(out) == 0 && (p.Name == name || p.DNSName == name) {
			out = append(out, p.IPs...)
		}
	}
	if len(out) == 0 {
		slices.Sort(known)
		return nil, fmt.Errorf("%s is no address, no pod of this node (%s) and no device of the tailnet", end, cmp.Or(strings.Join(slices.Compact(known), ", "), "it has none"))
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out), nil
}

func linkOf(links map[string]podlink.Attachment, a netip.Addr) *Link {
	for _, l := range links {
		if !a.IsValid() || !slices.Contains(l.Addrs, a) {
			continue
		}
		out := &Link{Name: l.Name, Pod: l.Label, Carrier: l.Ready, MTU: l.Made.MTU}
		if have, err := netlink.LinkByIndex(l.Index); err == nil {
			out.Up = have.Attrs().Flags&net.FlagUp != 0
		}
		return out
	}
	return nil
}

// lease looks for the link's lease. Where the pool is not ours, or cannot be read, nothing is known.
func (l *Link) lease(ctx context.Context, confDir string, links map[string]podlink.Attachment) {
	of := links[l.Name]
	own, err := conflist.IPAM(confDir)
	if err != nil {
		return
	}
	pool, err := ipam.Open(ipam.Config{Network: of.Network, DataDir: own.DataDir})
	if err != nil {
		return
	}
	leases, err := pool.List(ctx)
	if err != nil || len(leases) == 0 {
		return // another plugin's
	}
	found := slices.ContainsFunc(leases, func(o ipam.Lease) bool { return o.ContainerID == of.ContainerID && o.IfName == of.IfName })
	l.Lease = &found
}

// routes asks the kernel where packets of the connection, and answers, go.
func (s *Side) routes(q Question) {
	link, tun := "", s.Tailnet.Tun
	if s.Link != nil {
		link = s.Link.Name
	}
	if q.Far {
		// A packet that comes out of the tunnel, and an answer of the pod.
		s.There = lookup(s.Dst, s.Src, tun)
		s.Back = lookup(s.Src, s.Dst, link)
		return
	}
	s.There = lookup(s.Dst, s.Src, link)
	if !s.Src.IsValid() {
		s.Src = s.There.Src
	}
	if s.Src.IsValid() {
		s.Back = lookup(s.Src, s.Dst, s.There.Dev)
	}
}

// lookup is ip route get DST from SRC iif LINK. Without a link the machine itself sends.
func lookup(dst, src netip.Addr, iif string) (out Route) {
	o := &netlink.RouteGetOptions{}
	if iif != "" && iif != "lo" && src.IsValid() {
		o.Iif, o.SrcAddr = iif, src.AsSlice()
	}
	list, err := netlink.RouteGetWithOptions(dst.AsSlice(), o)
	if err != nil || len(list) == 0 {
		// ENETUNREACH is a rule's, EHOSTUNREACH a route's.
		out.Unreachable = errors.Is(err, unix.ENETUNREACH) || errors.Is(err, unix.EHOSTUNREACH) || errors.Is(err, unix.EACCES)
		out.Error = fmt.Sprint(err)
		if errors.Is(err, unix.EXDEV) || errors.Is(err, unix.EINVAL) {
			out.Error = fmt.Sprintf("the kernel does not take %s for a source on %s (%v)", src, iif, err)
		}
		return out
	}
	r := list[0]
	out.Table, out.Local = r.Table, r.Type == unix.RTN_LOCAL
	out.Via, _ = netip.AddrFromSlice(r.Gw)
	out.Src, _ = netip.AddrFromSlice(r.Src)
	out.Via, out.Src = out.Via.Unmap(), out.Src.Unmap()
	if l, err := netlink.LinkByIndex(r.LinkIndex); err == nil {
		out.Dev = l.Attrs().Name
	}
	return out
}

// guardOf asks our table of the family for the addresses.
func guardOf(src, dst netip.Addr) (g Guard) {
	set := nfnl.Set{Family: unix.NFPROTO_IPV4, Table: names.NFTTable, Name: nft.SetCluster}
	if dst.Is6() {
		set.Family = unix.NFPROTO_IPV6
	}
	elements, err := nfnl.Elements(set)
	if err != nil {
		g.Error = err.Error()
		return g
	}
	g.SrcCluster, g.DstCluster = nfnl.Within(elements, src), nfnl.Within(elements, dst)
	return g
}

// askTailnet asks tailscaled who has the other end, and on the far side whether it lets the connection in.
func (p Place) askTailnet(ctx context.Context, s *Side, q Question, st tailscale.Status) {
	other := s.Dst
	if q.Far {
		other = s.Src
	}
	if s.Tailnet.Error != "" || st.State != tailscale.Running || !other.IsValid() {
		return
	}
	if h, ok := st.Holder(other); ok {
		one := peerOf(h, st.Self)
		if !q.Far && len(one.IPs) > 0 {
			one.ping(ctx, p.Tailscaled, pingTries, h.Online)
		}
		s.Tailnet.Holder, s.Tailnet.Online = &one, h.Online
	}
	if !q.Far {
		return
	}
	f, err := p.Tailscaled.Filter(ctx)
	if err != nil {
		s.Tailnet.FilterError = err.Error()
		return
	}
	proto := map[string]int{tcp: tailscale.ProtoTCP, udp: tailscale.ProtoUDP, icmp: tailscale.ProtoICMP}[q.Protocol]
	ok := f.Accepts(s.Src, s.Dst, proto, q.Port)
	s.Tailnet.Accepts, s.Tailnet.Pairs, s.Tailnet.Ports = &ok, f.Pairs(s.Src, s.Dst), f.Ports(s.Src, s.Dst)
	for _, m := range f {
		s.Tailnet.KnowsSrc = s.Tailnet.KnowsSrc || netset.Contains(m.Srcs, s.Src)
		s.Tailnet.KnowsDst = s.Tailnet.KnowsDst || slices.ContainsFunc(m.Dsts, func(d tailscale.FilterDst) bool { return d.Net.Contains(s.Dst) })
	}
}

// askPolicy asks the daemon what policies of this end's pod say, and whether the kernel does the same.
func (p Place) askPolicy(ctx context.Context, s *Side, q Question) {
	_, err := nfnl.Request(unix.NFPROTO_INET, unix.NFT_MSG_GETTABLE, 0, nfnl.Name(unix.NFTA_TABLE_NAME, names.PolicyTable))
	s.PolicyTable = !errors.Is(err, unix.ENOENT)
	if s.Link == nil || s.Daemon == nil || s.Daemon.Policy == nil {
		return
	}
	ask := report.Question{Pod: s.Link.Pod, To: s.Dst.String(), Port: q.port()}
	if q.Far {
		ask.To, ask.From = "", s.Src.String()
	}
	e, err := report.AskExplain(ctx, p.Socket, ask)
	if err != nil {
		s.PolicyError = err.Error()
		return
	}
	s.Policy = &e
}

// tryPort tries from the pod's own node, which policies do not keep from it.
func tryPort(ctx context.Context, to netip.Addr, q Question) (answer, why string) {
	ctx, cancel := context.WithTimeout(ctx, portTimeout)
	defer cancel()
	var d net.Dialer
	c, err := d.DialContext(ctx, q.Protocol, net.JoinHostPort(to.String(), strconv.Itoa(int(q.Port))))
	if err == nil && q.Protocol == udp {
		defer c.Close()
		buffer := make([]byte, 1)
		_ = c.SetDeadline(time.Now().Add(udpWait)) // a socket that has just been opened
		if _, err = c.Write(nil); err == nil {
			_, err = c.Read(buffer)
		}
		if !errors.Is(err, unix.ECONNREFUSED) {
			return portTaken, ""
		}
	}
	switch {
	case err == nil:
		c.Close()
		return portOpen, ""
	case errors.Is(err, unix.ECONNREFUSED):
		return portRefused, ""
	}
	for u := errors.Unwrap(err); u != nil; u = errors.Unwrap(u) {
		err = u
	}
	return portSilent, err.Error()
}
