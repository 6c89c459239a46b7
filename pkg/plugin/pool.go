package plugin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	types100 "github.com/containernetworking/cni/pkg/types/100"

	"github.com/headcni/headcni/pkg/config/netconf"
	"github.com/headcni/headcni/pkg/ipam"
	"github.com/headcni/headcni/pkg/networking/podlink"
)

// pool is headcni-ipam without a process of its own.
type pool struct {
	r     *Request
	pool  *ipam.Pool
	links Links
	node  Node
}

// newPool is strict for ADD and STATUS. Everything else goes on with whatever tells where the leases are: the ranges may
// have changed since they were given.
func newPool(r *Request, links Links, node Node) (IPAM, error) {
	cfg, err := poolConfig(r.Config)
	if err != nil && (r.Command == "ADD" || r.Command == "STATUS") {
		return nil, err
	}
	if err != nil {
		r.Log.Warn("the ipam configuration has faults; going on all the same", "err", err)
		cfg = ipam.Config{Network: r.Config.Name, DataDir: dataDir(r.Config.IPAM.Raw)}
	}
	cfg.Writer, cfg.InUse = ipam.InProcess, node.InUse
	p, err := ipam.Open(cfg)
	if err != nil {
		return nil, err
	}
	return &pool{r: r, pool: p, links: links, node: node}, nil
}

// poolConfig returns the configuration of the pool, with the ranges that the runtime asks for.
func poolConfig(c netconf.Config) (ipam.Config, error) {
	raw, err := ipam.WithRanges(c.IPAM.Raw, c.Runtime.IPRanges)
	if err != nil {
		return ipam.Config{}, err
	}
	if raw == nil {
		raw = json.RawMessage(`{}`)
	}
	return ipam.ParseConfig(c.Name, raw)
}

func dataDir(raw json.RawMessage) string {
	var c struct {
		DataDir string `json:"dataDir"`
	}
	_ = json.Unmarshal(raw, &c) // what cannot be read is the default
	return c.DataDir
}

func (p *pool) Add(ctx context.Context) (IPAMResult, error) {
	owner := ipam.Owner{
		ContainerID: p.r.ContainerID, IfName: p.r.IfName,
		PodNamespace: p.r.Args.PodNamespace, PodName: p.r.Args.PodName,
	}
	lease, err := p.pool.Allocate(ctx, owner, p.r.requestedIPs())
	if errors.Is(err, ipam.ErrCorrupt) {
		if err := p.rebuild(ctx); err != nil {
			return IPAMResult{}, err
		}
		lease, err = p.pool.Allocate(ctx, owner, p.r.requestedIPs())
	}
	if errors.Is(err, ipam.ErrOwnerHasLease) {
		// The pod has no such interface (that was looked up before): an ADD was killed half-way.
		p.r.Log.Warn("removing what an interrupted ADD of this attachment left", "lease", lease.Addrs)
		if _, err := p.links.Detach(p.r.ContainerID, p.r.IfName, p.r.Netns); err != nil {
			return IPAMResult{}, fmt.Errorf("remove the link that an interrupted ADD left: %w", err)
		}
		if _, err := p.pool.Release(ctx, p.r.ContainerID, p.r.IfName); err != nil {
			return IPAMResult{}, err
		}
		lease, err = p.pool.Allocate(ctx, owner, p.r.requestedIPs())
	}
	if err != nil {
		return IPAMResult{}, err
	}
	result, err := p.pool.Config().Result(lease)
	if err != nil {
		return IPAMResult{}, err
	}
	return readIPAMResult(result)
}

// rebuild replaces a corrupt store by one with the leases of the pods that live. Every lease of ours has a link in the
// kernel, except for ADDs that are under way in this very moment.
func (p *pool) rebuild(ctx context.Context) error {
	pods, err := p.node.Live(p.r.Config.Name)
	if err != nil {
		return fmt.Errorf("rebuild the lease store: %w", err)
	}
	aside, err := p.pool.Rebuild(ctx, liveLeases(pods, p.pool.Config(), time.Now().UTC()))
	if err == nil && aside != "" {
		p.r.Log.Error("the lease store was corrupt; rebuilt it from the pods that live", "old", aside, "pods", len(pods))
	}
	return err
}

// liveLeases returns the leases that the live pods must have had.
func liveLeases(pods []podlink.LivePod, cfg ipam.Config, now time.Time) []ipam.Lease {
	var leases []ipam.Lease
	for _, pod := range pods {
		namespace, name, _ := strings.Cut(pod.Label, "/")
		l := ipam.Lease{
			Owner: ipam.Owner{ContainerID: pod.ContainerID, IfName: pod.IfName, PodNamespace: namespace, PodName: name},
			Time:  now, Writer: ipam.InProcess,
		}
		for _, a := range pod.Addrs {
			leased := ipam.LeasedAddr{Addr: netip.PrefixFrom(a, a.BitLen())}
			for _, r := range slices.Concat(cfg.Sets...) {
				if r.Subnet.Contains(a) {
					leased = ipam.LeasedAddr{Addr: netip.PrefixFrom(a, r.Subnet.Bits()), Gateway: r.Gateway}
				}
			}
			l.Addrs = append(l.Addrs, leased)
		}
		leases = append(leases, l)
	}
	return leases
}

// readIPAMResult reads an IPAM result.
func readIPAMResult(result *types100.Result) (IPAMResult, error) {
	assigned := IPAMResult{Routes: result.Routes, DNS: result.DNS}
	for _, ip := range result.IPs {
		addr, ok := netip.AddrFromSlice(ip.Address.IP)
		if addr = addr.Unmap(); !ok || addr.IsUnspecified() || addr.IsLoopback() || addr.IsMulticast() {
			return IPAMResult{}, fmt.Errorf("read the addresses given: a pod cannot have %s", addr)
		}
		gateway, _ := netip.AddrFromSlice(ip.Gateway) // zero: none
		assigned.IPs = append(assigned.IPs, IPAMAddress{Addr: addr, Gateway: gateway.Unmap()})
	}
	return assigned, nil
}

func (p *pool) Del(ctx context.Context) ([]netip.Addr, error) {
	lease, lookup := p.pool.Lookup(ctx, p.r.ContainerID, p.r.IfName) // only to tell; Release finds out for itself
	released, err := p.pool.Release(ctx, p.r.ContainerID, p.r.IfName)
	if err != nil || lookup != nil || !released {
		return nil, err
	}
	var addrs []netip.Addr
	for _, a := range lease.Addrs {
		addrs = append(addrs, a.Addr.Addr())
	}
	return addrs, nil
}

func (p *pool) Check(ctx context.Context, want []netip.Addr) error {
	lease, err := p.pool.Lookup(ctx, p.r.ContainerID, p.r.IfName)
	if err != nil {
		return err
	}
	var errs []error
	for _, a := range want {
		if !slices.ContainsFunc(lease.Addrs, func(l ipam.LeasedAddr) bool { return l.Addr.Addr() == a }) {
			errs = append(errs, fmt.Errorf("address %s is not leased to the pod", a))
		}
	}
	return errors.Join(errs...)
}

func (p *pool) GC(ctx context.Context, keep func(containerID, ifName string) bool) error {
	released, err := p.pool.GC(ctx, func(l ipam.Lease) bool { return keep(l.ContainerID, l.IfName) })
	for _, l := range released {
		p.r.Log.Info("released a stale lease", "of", l.ContainerID+"/"+l.IfName, "addresses", l.Addrs)
	}
	return err
}

func (p *pool) Status(ctx context.Context) error { return p.pool.Status(ctx) }
