package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"golang.org/x/sys/unix"

	"github.com/headcni/headcni/internal/cnimain"
	"github.com/headcni/headcni/pkg/ipam"
)

// Error codes of our own; below 100 they are the specification's.
const (
	codeExhausted  = 100
	codeInUse      = 101
	codeNotInRange = 102
	codeHasLease   = 103
	codeCorrupt    = 104
	codeNoLease    = 105
)

// verbs are the commands of CNI specification 1.1.0.
type verbs struct{ out io.Writer }

// netConf is what of a network configuration is not in the ipam object.
type netConf struct {
	CNIVersion  string                `json:"cniVersion"`
	Name        string                `json:"name"`
	IPAM        json.RawMessage       `json:"ipam"`
	PrevResult  json.RawMessage       `json:"prevResult"`
	Attachments *[]types.GCAttachment `json:"cni.dev/valid-attachments"`
}

// open parses the configuration. strict is for ADD; all else works with ranges that are wrong or missing by now, as long
// as the leases can be found.
func open(stdin []byte, strict bool) (netConf, *ipam.Pool, error) {
	var n netConf
	if err := json.Unmarshal(stdin, &n); err != nil {
		return n, nil, types.NewError(types.ErrDecodingFailure, "decode the network configuration", err.Error())
	}
	if len(n.IPAM) == 0 {
		return n, nil, types.NewError(types.ErrInvalidNetworkConfig, "the network configuration has no ipam object", "")
	}
	c, err := ipam.ParseConfig(n.Name, n.IPAM)
	if err != nil && !strict {
		if c, err = leniently(n); err != nil {
			return n, nil, cniError(err)
		}
	}
	if err != nil {
		return n, nil, cniError(err)
	}
	p, err := ipam.Open(c)
	return n, p, cniError(err)
}

// leniently takes from a configuration only where the leases are.
func leniently(n netConf) (ipam.Config, error) {
	var c struct {
		DataDir string `json:"dataDir"`
	}
	if err := json.Unmarshal(n.IPAM, &c); err != nil {
		return ipam.Config{}, fmt.Errorf("%w: %w", ipam.ErrConfig, err)
	}
	return ipam.Config{Network: n.Name, DataDir: c.DataDir}, nil
}

func (v verbs) add(a cnimain.Call) error {
	n, p, err := open(a.Stdin, true)
	if err != nil {
		return err
	}
	requested, err := ipam.RequestedIPs(a.Args, a.Stdin)
	if err != nil {
		return cniError(err)
	}
	ctx := context.Background()
	lease, err := p.Allocate(ctx, ipam.OwnerOf(a.ContainerID, a.IfName, a.Args), requested)
	if errors.Is(err, ipam.ErrOwnerHasLease) {
		return types.NewError(codeHasLease, fmt.Sprintf("%s/%s has a lease already: %s", a.ContainerID, a.IfName, addrs(lease)),
			"a runtime must DEL before it ADDs again")
	}
	if err != nil {
		return cniError(err)
	}
	if err := v.print(p.Config(), lease, n.CNIVersion); err != nil {
		_, undo := p.Release(ctx, a.ContainerID, a.IfName)
		return cniError(errors.Join(err, undo))
	}
	return nil
}

func (v verbs) print(c ipam.Config, lease ipam.Lease, cniVersion string) error {
	result, err := c.Result(lease)
	if err != nil {
		return err
	}
	return cnimain.PrintResult(v.out, cniVersion, result)
}

func addrs(l ipam.Lease) []netip.Addr {
	var out []netip.Addr
	for _, a := range l.Addrs {
		out = append(out, a.Addr.Addr())
	}
	return out
}

func (v verbs) del(a cnimain.Call) error {
	_, p, err := open(a.Stdin, false)
	if err != nil {
		return err
	}
	_, err = p.Release(context.Background(), a.ContainerID, a.IfName)
	return cniError(err)
}

// check wants a lease, and where the calling plugin tells what ADD gave, that all of it is in there.
func (v verbs) check(a cnimain.Call) error {
	n, p, err := open(a.Stdin, false)
	if err != nil {
		return err
	}
	lease, err := p.Lookup(context.Background(), a.ContainerID, a.IfName)
	if err != nil || len(n.PrevResult) == 0 {
		return cniError(err)
	}
	// Only the addresses matter, and all versions from 0.3.0 on write them alike.
	var prev struct {
		IPs []struct {
			Address string `json:"address"`
		} `json:"ips"`
	}
	if err := json.Unmarshal(n.PrevResult, &prev); err != nil {
		return types.NewError(types.ErrDecodingFailure, "decode prevResult", err.Error())
	}
	have := map[netip.Addr]bool{}
	for _, text := range prev.IPs {
		if prefix, err := netip.ParsePrefix(text.Address); err == nil {
			have[prefix.Addr()] = true
		}
	}
	for _, addr := range addrs(lease) {
		if !have[addr] {
			return types.NewError(codeNoLease, fmt.Sprintf("%s is leased to %s/%s, but prevResult lacks it", addr, a.ContainerID, a.IfName), "")
		}
	}
	return nil
}

// gc releases what is not in the list. The specification has the runtime stop ADD and DEL meanwhile; a lease that is
// younger than this process is kept all the same, for the list cannot know it.
func (v verbs) gc(a cnimain.Call) error {
	start := time.Now()
	n, p, err := open(a.Stdin, false)
	if err != nil {
		return err
	}
	if n.Attachments == nil {
		return types.NewError(types.ErrInvalidNetworkConfig, "GC needs cni.dev/valid-attachments; without it nothing is released", "")
	}
	valid := map[types.GCAttachment]bool{}
	for i, at := range *n.Attachments {
		if at.ContainerID == "" || at.IfName == "" { // its lease would go
			return types.NewError(types.ErrInvalidNetworkConfig,
				fmt.Sprintf("cni.dev/valid-attachments[%d]: want containerID and ifname; nothing is released", i), "")
		}
		valid[at] = true
	}
	_, err = p.GC(context.Background(), func(l ipam.Lease) bool {
		return valid[types.GCAttachment{ContainerID: l.ContainerID, IfName: l.IfName}] || l.Time.After(start)
	})
	return cniError(err)
}

func (v verbs) status(a cnimain.Call) error {
	_, p, err := open(a.Stdin, true)
	if err != nil {
		return err
	}
	if err := p.Status(context.Background()); err != nil {
		return types.NewError(types.ErrPluginNotAvailable, "no address can be given", err.Error())
	}
	return nil
}

// cniError gives an error the code that a runtime can act on.
func cniError(err error) error {
	if err == nil {
		return nil
	}
	text := strings.ReplaceAll(err.Error(), "\n", "; ")
	for _, c := range []struct {
		is   error
		code uint
	}{
		{ipam.ErrConfig, types.ErrInvalidNetworkConfig},
		{ipam.ErrNoRanges, types.ErrInvalidNetworkConfig},
		{ipam.ErrArgs, types.ErrInvalidEnvironmentVariables},
		{ipam.ErrLocked, types.ErrTryAgainLater},
		{ipam.ErrExhausted, codeExhausted},
		{ipam.ErrInUse, codeInUse},
		{ipam.ErrNotInRange, codeNotInRange},
		{ipam.ErrNotFound, codeNoLease},
		{ipam.ErrCorrupt, codeCorrupt},
		{unix.ENOSPC, types.ErrIOFailure},
		{unix.EROFS, types.ErrIOFailure},
		{unix.EACCES, types.ErrIOFailure},
		{unix.EIO, types.ErrIOFailure},
	} {
		if errors.Is(err, c.is) {
			e := types.NewError(c.code, text, "")
			if c.code == codeCorrupt {
				e.Details = "stop the containers of this network, remove the folder named above, start them again"
			}
			return e
		}
	}
	return types.NewError(types.ErrInternal, text, "")
}
