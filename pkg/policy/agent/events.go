package agent

import (
	"context"
	"fmt"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nlwatch"
	"github.com/headcni/headcni/internal/rtnl"
	"github.com/headcni/headcni/pkg/config/names"
	"github.com/headcni/headcni/pkg/kube"
)

// linkWait gathers the events of one change of a link.
const linkWait = 2 * time.Millisecond

// LinkChanges signals soon after a pod's link came, went, got its carrier or was put into a group. The channel is closed when ctx ends
// or the kernel's events cannot be read any more.
func LinkChanges(ctx context.Context) (<-chan struct{}, error) {
	out, err := nlwatch.Watch(ctx, unix.NETLINK_ROUTE, linkWait, podLink, unix.RTNLGRP_LINK)
	if err != nil {
		return nil, fmt.Errorf("subscribe to events of links: %w", err)
	}
	return out, nil
}

func podLink(typ uint16, msg []byte) bool {
	if typ != unix.RTM_NEWLINK && typ != unix.RTM_DELLINK {
		return false
	}
	l, err := rtnl.ParseLink(msg)
	return err != nil || strings.HasPrefix(l.Name, names.PodLinkPrefix)
}

// maxEvents are kept while the API server is away; older ones go.
const maxEvents = 64

// eventRetry is how long after a failure events are tried again.
const eventRetry = 10 * time.Second

// Reporter writes events one after the other, beside everything else. Make it with NewReporter.
type Reporter struct {
	write func(context.Context, kube.Event) error
	queue chan kube.Event
}

// NewReporter writes events by write.
func NewReporter(write func(context.Context, kube.Event) error) *Reporter {
	return &Reporter{write: write, queue: make(chan kube.Event, maxEvents)}
}

// Tell queues an event. Where too many wait, the oldest goes.
func (r *Reporter) Tell(e kube.Event) {
	for {
		select {
		case r.queue <- e:
			return
		default:
		}
		select {
		case <-r.queue:
		default:
		}
	}
}

// Run writes until ctx ends.
func (r *Reporter) Run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case e := <-r.queue:
			for ctx.Err() == nil && r.write(ctx, e) != nil && len(r.queue) < maxEvents {
				select {
				case <-ctx.Done():
				case <-time.After(eventRetry):
				}
			}
		}
	}
}

// ipvsLink is kube-proxy's in IPVS mode.
const ipvsLink = "kube-ipvs0"

// errIPVS: with IPVS services' packets pass INPUT and OUTPUT, and not the hook on which policies stand.
var errIPVS = fmt.Errorf("kube-proxy is in IPVS mode (there is a link %s): NetworkPolicies would NOT hold for what goes by a service; "+
	"run kube-proxy with --proxy-mode=nftables or iptables (then `ip link delete %[1]s`), or set network.networkPolicy: false", ipvsLink)

// ipvs returns errIPVS where kube-proxy uses it.
func ipvs() error {
	c, err := rtnl.Open(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := c.LinkByName(ipvsLink); err == nil {
		return errIPVS
	}
	return nil
}
