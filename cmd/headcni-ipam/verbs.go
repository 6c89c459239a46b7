package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"syscall"
	"time"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/headcni/headcni/internal/cnimain"
	"github.com/headcni/headcni/pkg/config/names"
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

// open parses the configuration. ADD and STATUS are strict; the other commands accept wrong or missing ranges as long as the leases
// can be found.
func open(a cnimain.Call, strict bool) (*ipam.Pool, error) {
	name := str(a.Config["name"])
	if a.Config["ipam"] == nil {
		return nil, types.NewError(types.ErrInvalidNetworkConfig, "the network configuration has no ipam object", "")
	}
	c, err := parse(name, a)
	if err != nil && !strict {
		c, err = leaseLocation(name, a.Config["ipam"])
	}
	if err != nil {
		return nil, cniError(err)
	}
	p, err := ipam.Open(c)
	return p, cniError(err)
}

func parse(name string, a cnimain.Call) (ipam.Config, error) {
	var runtime struct {
		IPRanges json.RawMessage `json:"ipRanges"`
	}
	if v := a.Config["runtimeConfig"]; v != nil && json.Unmarshal(v, &runtime) != nil {
		return ipam.Config{}, fmt.Errorf("%w: runtimeConfig: want an object", ipam.ErrConfig)
	}
	object, err := ipam.WithRanges(a.Config["ipam"], runtime.IPRanges)
	if err != nil {
		return ipam.Config{}, err
	}
	return ipam.ParseConfig(name, object)
}

// str decodes a value that cnimain has checked to be a string.
func str(v json.RawMessage) (s string) {
	_ = json.Unmarshal(v, &s)
	return s
}

// leaseLocation reads only the folder of the leases from a configuration.
func leaseLocation(name string, object json.RawMessage) (ipam.Config, error) {
	var c struct {
		DataDir string `json:"dataDir"`
	}
	if err := json.Unmarshal(object, &c); err != nil {
		return ipam.Config{}, fmt.Errorf("%w: ipam: want an object with a path called dataDir", ipam.ErrConfig)
	}
	return ipam.Config{Network: name, DataDir: c.DataDir}, nil
}

func (v verbs) add(a cnimain.Call) error {
	p, err := open(a, true)
	if err != nil {
		return err
	}
	requested, err := ipam.RequestedIPs(a.Args, a.Config)
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
	if err := v.print(p.Config(), lease, str(a.Config["cniVersion"])); err != nil {
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
	p, err := open(a, false)
	if err != nil {
		return err
	}
	_, err = p.Release(context.Background(), a.ContainerID, a.IfName)
	return cniError(err)
}

// check fails where there is no lease, or where prevResult, if given, lacks an address of the lease.
func (v verbs) check(a cnimain.Call) error {
	p, err := open(a, false)
	if err != nil {
		return err
	}
	lease, err := p.Lookup(context.Background(), a.ContainerID, a.IfName)
	prevResult := a.Config["prevResult"]
	if err != nil || prevResult == nil {
		return cniError(err)
	}
	// Only the addresses matter, and all versions from 0.3.0 on write them alike.
	var prev struct {
		IPs []struct {
			Address string `json:"address"`
		} `json:"ips"`
	}
	if err := json.Unmarshal(prevResult, &prev); err != nil {
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
	p, err := open(a, false)
	if err != nil {
		return err
	}
	valid, told := map[types.GCAttachment]bool{}, false
	for _, key := range []string{names.ValidAttachments, names.AttachmentsAsReleased} {
		list, given := a.Config[key]
		told = told || given
		if list == nil { // as where it is empty
			continue
		}
		var attachments []types.GCAttachment
		if err := json.Unmarshal(list, &attachments); err != nil {
			return types.NewError(types.ErrInvalidNetworkConfig, "GC needs a list called "+key+"; without it nothing is released", "")
		}
		for i, at := range attachments {
			if at.ContainerID == "" || at.IfName == "" { // its lease would go
				return types.NewError(types.ErrInvalidNetworkConfig,
					fmt.Sprintf("%s[%d]: want containerID and ifname; nothing is released", key, i), "")
			}
			valid[at] = true
		}
	}
	if !told {
		return types.NewError(types.ErrInvalidNetworkConfig, "GC needs a list called "+names.ValidAttachments+"; without it nothing is released", "")
	}
	_, err = p.GC(context.Background(), func(l ipam.Lease) bool {
		return valid[types.GCAttachment{ContainerID: l.ContainerID, IfName: l.IfName}] || l.Time.After(start)
	})
	return cniError(err)
}

func (v verbs) status(a cnimain.Call) error {
	p, err := open(a, true)
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
		{ipam.ErrUnsupported, types.ErrUnsupportedField},
		{ipam.ErrConfig, types.ErrInvalidNetworkConfig},
		{ipam.ErrNoRanges, types.ErrInvalidNetworkConfig},
		{ipam.ErrArgs, types.ErrInvalidEnvironmentVariables},
		{ipam.ErrOwner, types.ErrInvalidEnvironmentVariables},
		{ipam.ErrLocked, types.ErrTryAgainLater},
		{ipam.ErrExhausted, codeExhausted},
		{ipam.ErrInUse, codeInUse},
		{ipam.ErrNotInRange, codeNotInRange},
		{ipam.ErrNotFound, codeNoLease},
		{ipam.ErrCorrupt, codeCorrupt},
	} {
		if errors.Is(err, c.is) {
			e := types.NewError(c.code, text, "")
			if c.code == codeCorrupt {
				e.Details = "stop the containers of this network, remove the folder named above, start them again"
			}
			return e
		}
	}
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return types.NewError(types.ErrIOFailure, text, "")
	}
	return types.NewError(types.ErrInternal, text, "")
}
