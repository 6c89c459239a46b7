package agent

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nlwatch"
	"github.com/headcni/headcni/internal/rtnl"
	"github.com/headcni/headcni/pkg/config/names"
	"github.com/headcni/headcni/pkg/kube"
	"github.com/headcni/headcni/pkg/networking/ipvs"
)

// linkWait gathers the events of one change of a link.
const linkWait = 2 * time.Millisecond

// LinkChanges signals soon after a pod's link came, went, got its carrier or was put into a group, and when IPVS comes or goes. The channel is closed when ctx ends
// or the kernel's events cannot be read any more.
func LinkChanges(ctx context.Context) (<-chan struct{}, error) {
	out, err := nlwatch.Watch(ctx, unix.NETLINK_ROUTE, linkWait, ofInterest, unix.RTNLGRP_LINK)
	if err != nil {
		return nil, fmt.Errorf("subscribe to events of links: %w", err)
	}
	return out, nil
}

func ofInterest(typ uint16, msg []byte) bool {
	if typ != unix.RTM_NEWLINK && typ != unix.RTM_DELLINK {
		return false
	}
	l, err := rtnl.ParseLink(msg)
	return err != nil || strings.HasPrefix(l.Name, names.PodLinkPrefix) || slices.Contains(ipvs.Links, l.Name)
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
