// Package antispoof keeps the nftables' cache of the addresses that pods send from, and spares pods' packets the kernel's own look at their
// source.
//
// A pod's packet whose link and source are in it passes without a lookup in the FIB, which is most of what keeping pods from posing as
// others costs. What is not in it is looked up as ever, so that a cache that lacks something costs time, and no packets.
package antispoof

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/nlwatch"
	"github.com/headcni/headcni/internal/rtnl"
	"github.com/headcni/headcni/pkg/config/names"
	"github.com/headcni/headcni/pkg/reconcile"
)

const (
	// fullCheck is how often links are looked at although nobody told of a change.
	fullCheck = time.Minute
	// retry is how long after a failure it is tried again.
	retry = 10 * time.Second
	// wait gathers the events of one cause. Pods that start do not wait for us.
	wait = nlwatch.Debounce
)

// Table is the kernel's: an nft.Tables.
type Table interface {
	// Sources returns fs.ErrNotExist where no table checks what pods send.
	Sources(map[int][]netip.Addr) (changed int, err error)
}

// Links are the node's pods': a podlink.Handle.
type Links interface {
	Sources() (map[int][]netip.Addr, error)
}

// Cache keeps the kernel's. Make it with New.
type Cache struct {
	log   *slog.Logger
	table Table
	links Links
	loop  *reconcile.Loop
	said  string
	// spared are the links whose sources the kernel does not look up.
	spared map[string]bool
}

// New makes a Cache that has touched nothing yet.
func New(log *slog.Logger, table Table, links Links) *Cache {
	c := &Cache{log: log, table: table, links: links, loop: reconcile.NewLoop()}
	c.loop.Pass = func(_ context.Context, woken bool) time.Duration { return c.pass(woken) }
	c.loop.Settle = func(time.Duration) time.Duration { return 0 } // wait has done that
	return c
}

// Start keeps it until ctx ends. events calls a function for what a channel signals. What is in the kernel stays.
func (c *Cache) Start(
	ctx context.Context, wg *sync.WaitGroup, events func(context.Context, func(context.Context) (<-chan struct{}, error), func()),
) {
	wg.Go(func() { c.loop.Run(ctx) })
	wg.Go(func() { events(ctx, changes, c.loop.Wake) })
}

// pass has the kernel hold what there is. It tells of a failure once: traffic goes on. One that nobody woke looks at all links' settings, which
// systemd writes soon after a link has come.
func (c *Cache) pass(woken bool) time.Duration {
	if !woken {
		c.spared = nil
	}
	want, err := c.links.Sources()
	if err == nil {
		_, err = c.table.Sources(want)
		if errors.Is(err, fs.ErrNotExist) { // who has to make it tells of it
			c.spared = nil
			if err = Remove(); err == nil {
				return retry
			}
		}
	}
	if err == nil {
		c.spared, err = spareLookups(c.spared)
	}
	if err == nil {
		c.said = ""
		return fullCheck
	}
	if text := err.Error(); text != c.said {
		c.said = text
		c.log.Warn("keep the cache of pods' sources; pods talk, a little slower", "err", err)
	}
	return retry
}

// changes signals soon after a pod's link, or a route to a single address, came or went.
func changes(ctx context.Context) (<-chan struct{}, error) {
	out, err := nlwatch.Watch(ctx, unix.NETLINK_ROUTE, wait, relevant, unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("subscribe to events of links and routes: %w", err)
	}
	return out, nil
}

func relevant(typ uint16, msg []byte) bool {
	switch typ {
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		l, err := rtnl.ParseLink(msg)
		return err != nil || strings.HasPrefix(l.Name, names.PodLinkPrefix)
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		if len(msg) < unix.SizeofRtMsg {
			return true
		}
		// struct rtmsg {u8 family, dst_len, src_len, tos, table, ...}
		bits := map[byte]byte{unix.AF_INET: 32, unix.AF_INET6: 128}[msg[0]]
		return msg[1] == bits && msg[4] == unix.RT_TABLE_MAIN
	}
	return false
}
