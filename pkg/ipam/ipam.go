// Package ipam gives addresses to attachments: which address is a pure function of the strategy and of what is taken
// (pick), what is taken is in package store. It runs in process under the headcni plugin and as the IPAM plugin
// headcni-ipam under any other.
//
// # Guarantees
//
//   - No address is ever given to two attachments at once, whatever dies at whatever moment, however many processes run.
//   - Release, lookup and garbage collection need no range: they work when the configuration changed since the lease was
//     given.
//   - Every address of a pool is given before the pool is reported exhausted.
//   - An address that a killed process took is named by the record of its owner and goes with that owner's release, its
//     next allocation, or garbage collection.
//   - Allocation and release cost a fixed number of system calls, whatever the number of leases and the size of the pool,
//     from an IPv4 /30 to an IPv6 /64.
//   - Leases belong to one boot; a new boot starts empty.
//
// The layout on disk is described in package store.
//
// # Addresses that others gave
//
// The leases of another program, such as host-local, and of other networks are not read. Under the headcni plugin that does
// no harm: it asks the kernel about each address (Config.InUse) and passes over those that live pods have, so a network may
// be renamed, or change from host-local, while pods run. Under bridge, macvlan and others nobody can be asked: change the
// IPAM plugin while the node has no pods, give the new ranges other addresses, or exclude the old ones.
//
// # Strategies
//
// Sequential gives the next free address after the last one given, round robin, so that an address rests for as long as
// there are others. Random is uniform over the free addresses. Dense-pack gives the lowest free address of the block of
// 16 addresses (IPv4 /28, IPv6 /124) that has most of them taken, so that leases stay in few blocks; in a set of more
// than 2^24 addresses it packs into windows of 2^20, the lowest first.
package ipam

import (
	"errors"
	"fmt"

	"github.com/headcni/headcni/pkg/ipam/store"
)

// Strategy is how a free address is chosen.
type Strategy string

// The strategies. The empty string means Sequential.
const (
	Sequential Strategy = "sequential"
	Random     Strategy = "random"
	DensePack  Strategy = "dense-pack"
)

// Writers of leases: the daemon's sweep and a rebuild touch only what InProcess wrote.
const (
	InProcess  = "headcni"
	Standalone = "headcni-ipam"
)

// Types of package store that are part of this package's API.
type (
	// Owner is the attachment that holds a lease.
	Owner = store.Owner
	// Lease is what an attachment holds.
	Lease = store.Lease
	// LeasedAddr is one address of a lease.
	LeasedAddr = store.LeasedAddr
	// Problem is one thing that Check found.
	Problem = store.Problem
)

var (
	// ErrExhausted means that no address is free.
	ErrExhausted = errors.New("no address is free")
	// ErrInUse means that a requested address has another owner.
	ErrInUse = errors.New("address is in use")
	// ErrNotInRange means that a requested address is not one that the configuration lets us give.
	ErrNotInRange = errors.New("address is not in any range")
	// ErrOwnerHasLease means that the attachment has a lease already; Allocate returns that lease with it.
	ErrOwnerHasLease = errors.New("attachment has a lease already")
	// ErrNoRanges means that the configuration has no range to give addresses from.
	ErrNoRanges = errors.New("no ranges")
	// ErrConfig means that the configuration is wrong; the error names every fault.
	ErrConfig = errors.New("invalid ipam configuration")
	// ErrUnsupported means that the configuration has keys that are unknown. It is an ErrConfig.
	ErrUnsupported = fmt.Errorf("%w: unsupported field", ErrConfig)
	// ErrArgs means that CNI_ARGS asks for something that is no address.
	ErrArgs = errors.New("invalid CNI_ARGS")

	// ErrOwner means that nothing can be leased to such an attachment.
	ErrOwner = store.ErrOwner
	// ErrNotFound means that the attachment has no lease.
	ErrNotFound = store.ErrNotFound
	// ErrCorrupt means that the store must be rebuilt (Rebuild) or removed.
	ErrCorrupt = store.ErrCorrupt
	// ErrLocked means that another process held the store's lock for too long.
	ErrLocked = store.ErrLocked
)

func validOwner(containerID, ifName string) error {
	if containerID == "" || ifName == "" {
		return fmt.Errorf("%w: %q/%q: want a container ID and an interface name", ErrOwner, containerID, ifName)
	}
	return nil
}
