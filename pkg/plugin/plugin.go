// Package plugin is the CNI plugin headcni: what each command of the CNI specification does, over small interfaces for the
// kernel and for address management.
package plugin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"time"

	"github.com/headcni/headcni/internal/cnimain"
	"github.com/headcni/headcni/pkg/cmdlog"
	"github.com/headcni/headcni/pkg/config/names"
	"github.com/headcni/headcni/pkg/config/netconf"
	"github.com/headcni/headcni/pkg/networking/hostport"
	"github.com/headcni/headcni/pkg/networking/podlink"
)

// Links makes, removes and looks at the links of pods. podlink.Handle is the real one.
type Links interface {
	// OpenVacant opens a pod's network namespace for Attach, and fails where the pod has the interface already.
	OpenVacant(netns, ifName string) (*podlink.Netns, error)
	Attach(*slog.Logger, *podlink.Netns, podlink.Pod) (podlink.Pair, error)
	// Detach tells whether there was a link to remove.
	Detach(containerID, ifName, netns string) (removed bool, err error)
	Check(podlink.State) error
	// There tells whether the node has a link of that name, or may have one.
	There(linkName string) bool
}

// Node looks at the node as a whole. podlink.Handle is the real one.
type Node interface {
	Gate(podCIDRs []netip.Prefix, policy bool) error
	// Sweep removes the links of a network for which keep is false and returns those that it could not remove.
	Sweep(network string, keep func(linkName string) bool) (left []string, err error)
	HasPods() bool
	// InUse tells whether something on the node has an address, whatever the leases say.
	InUse(netip.Addr) bool
	// Live lists the pods whose links are there.
	Live(network string) ([]podlink.LivePod, error)
}

// Plugin answers the commands. All fields must be set; New does so.
type Plugin struct {
	Links Links
	Node  Node
	// ChooseIPAM returns the IPAM plugin that a request needs.
	ChooseIPAM func(*Request) (IPAM, error)
	// Record tells the daemon of a finished command. Its failure changes nothing.
	Record func(socket string, r cmdlog.Record) error
	Stdout io.Writer
	Stderr io.Writer
	Start  time.Time
}

// New makes the plugin on the kernel it runs on.
func New(start time.Time) *Plugin {
	kernel := &podlink.Handle{} // open until the program ends
	return &Plugin{
		Links: kernel, Node: kernel, ChooseIPAM: chooseIPAM(kernel, kernel), Record: cmdlog.Send,
		Stdout: os.Stdout, Stderr: os.Stderr, Start: start,
	}
}

// Request is one command on one attachment.
type Request struct {
	Command     string
	ContainerID string
	IfName      string
	Netns       string
	Path        string // CNI_PATH
	Stdin       []byte
	Config      netconf.Config
	Args        Args
	Log         *slog.Logger

	stage  stage
	record cmdlog.Record
	locked *os.File // the attachment's lock; nil: not taken
}

// begin reads the configuration and CNI_ARGS. On an error the Request is still good for what DEL needs.
func (p *Plugin) begin(command string, a cnimain.Call) (*Request, error) {
	r := &Request{
		Command: command, ContainerID: a.ContainerID, IfName: a.IfName, Netns: a.Netns, Path: a.Path, Stdin: a.Stdin,
		stage: stageConfig,
	}
	var faults, argsFault error
	r.Config, faults = netconf.ParseObject(a.Config)
	r.Args, argsFault = parseArgs(a.Args)
	r.Log = newLogger(p.Stderr, r.Config).With("command", command, "container", a.ContainerID, "interface", a.IfName)
	for _, w := range r.Config.Warnings {
		r.Log.Warn(w)
	}
	r.record = cmdlog.Record{
		Command: command, ContainerID: a.ContainerID, IfName: a.IfName,
		PodNamespace: r.Args.PodNamespace, PodName: r.Args.PodName,
		HostIfName: podlink.Name(a.ContainerID, a.IfName),
	}
	return r, errors.Join(faults, argsFault)
}

// finish logs the outcome, tells the daemon of an ADD or a DEL, and gives an error its code.
func (p *Plugin) finish(r *Request, err error) error {
	var failed error
	if err != nil {
		e := cniError(r.stage, err)
		failed, r.record.ErrorCode, r.record.Stage = e, e.Code, string(r.stage)
	}
	r.record.Duration = time.Since(p.Start)
	r.Log.Debug("done", "duration", r.record.Duration, "code", r.record.ErrorCode, "err", err)
	if r.Command == "ADD" || r.Command == "DEL" {
		if err := p.Record(r.Config.DaemonSocket, r.record); err != nil {
			r.Log.Debug("the daemon was not told of the command", "err", err) // it is for metrics, and for what a link loses at once
		}
	}
	return failed
}

// Add attaches a pod (specification section 2, ADD) and prints the result.
//
// With a prevResult, as a later plugin of a chain, it adds its own interface beside those of the plugins before it and
// passes their result on with its own appended.
func (p *Plugin) Add(ctx context.Context, a cnimain.Call) error {
	r, faults := p.begin("ADD", a)
	ipamPlugin, err := p.ChooseIPAM(r)
	if err = errors.Join(faults, err); err == nil {
		err = p.add(ctx, r, ipamPlugin)
	}
	return p.finish(r, err)
}

func (p *Plugin) add(ctx context.Context, r *Request, ipamPlugin IPAM) (err error) {
	previous, err := r.previous()
	if err != nil {
		return err
	}
	if gate := r.Config.Gate; gate != nil {
		r.stage = stageGate
		if err := p.Node.Gate(gate.PodCIDRs, r.Config.NetworkPolicy); err != nil {
			return err
		}
	}
	r.stage = stageNetns
	if err := checkIfName(r.IfName); err != nil {
		return err
	}
	defer r.unlock()
	if err := r.lock(ctx); err != nil {
		return err
	}
	// Before anything is taken: where the interface exists, the attachment may be alive, and undoing would end it.
	netns, err := p.Links.OpenVacant(r.Netns, r.IfName)
	if err != nil {
		return err
	}
	defer netns.Close()
	defer func() {
		if err != nil {
			failed := r.stage
			// The caller may have given up; what was made must go all the same.
			undo := p.detachAndRelease(context.WithoutCancel(ctx), r, ipamPlugin)
			if undo != nil {
				undo = fmt.Errorf("undo: %w", undo)
			}
			err = errors.Join(cniError(failed, err), undo)
			r.stage = failed
		}
	}()
	r.stage = stageIPAM
	assigned, err := ipamPlugin.Add(ctx)
	if err != nil {
		return err
	}
	pod, err := planPod(r, assigned)
	if err != nil {
		return err
	}
	r.record.Addrs = pod.Addrs
	r.stage = stageAttach
	links, err := p.Links.Attach(r.Log, netns, pod)
	if err != nil {
		return err
	}
	result := buildResult(r, previous, pod, links, assigned)
	if asked := r.askedPorts(); len(asked) > 0 {
		p.takePortsBack(ctx, r, func(dead hostport.Record) bool { return dead.Overlaps(asked) })
	}
	if err := r.ports(ctx, "ADD", result); err != nil {
		return err
	}
	r.stage = stageResult
	return cnimain.PrintResult(p.Stdout, r.Config.CNIVersion, result)
}

// Del detaches a pod (specification section 2, DEL): without netns, without prevResult, any number of times. A fault of
// the configuration does not stop it: the link's name follows from the attachment alone, and a lease is found by its
// owner.
func (p *Plugin) Del(ctx context.Context, a cnimain.Call) error {
	r, faults := p.begin("DEL", a)
	if faults != nil {
		r.Log.Warn("the configuration has faults; deleting all the same", "err", faults)
	}
	defer r.unlock()
	if err := r.lock(ctx); err != nil {
		r.Log.Warn("going on all the same", "err", err) // DEL must delete as much as it can
	}
	r.stage = stageIPAM
	ipamPlugin, err := p.ChooseIPAM(r)
	if err != nil {
		// Without an IPAM plugin to ask, the link can go all the same. The runtime comes again for the address.
		_, stuck := p.Links.Detach(r.ContainerID, r.IfName, r.Netns)
		return p.finish(r, errors.Join(withCode(stageDetach, stuck), withCode(stageIPAM, err)))
	}
	return p.finish(r, p.detachAndRelease(ctx, r, ipamPlugin))
}

// detachAndRelease is DEL, and the undoing of ADD. An address is never free while a pod still has it, or while a port of the
// node still leads to it.
func (p *Plugin) detachAndRelease(ctx context.Context, r *Request, ipamPlugin IPAM) error {
	mapped := r.returnPorts(ctx)
	lost := errors.Is(mapped, errNoDelegate)
	if lost {
		r.Log.Warn("cannot take the pod's ports of the node back, if it had any", "err", mapped)
		mapped = nil
	}
	mapped = withCode(stagePorts, mapped)
	r.stage = stageDetach
	removed, err := p.Links.Detach(r.ContainerID, r.IfName, r.Netns)
	if err != nil || mapped != nil {
		err = errors.Join(withCode(stageDetach, err), mapped)
		return fmt.Errorf("detach %s of container %s (its address stays taken): %w", r.IfName, r.ContainerID, err)
	}
	r.endPorts(lost) // their record stays for who comes when portmap is there again
	r.stage = stageIPAM
	released, err := ipamPlugin.Del(ctx)
	if r.record.Addrs = released; len(released) == 0 && removed && err == nil {
		r.record.Addrs = r.previousAddrs() // what the IPAM plugin does not tell
	}
	return err
}

// Check compares the kernel and the lease with prevResult (specification section 2, CHECK). Each deviation is named.
func (p *Plugin) Check(ctx context.Context, a cnimain.Call) error {
	r, err := p.begin("CHECK", a)
	if err == nil {
		err = p.check(ctx, r)
	}
	return p.finish(r, err)
}

func (p *Plugin) check(ctx context.Context, r *Request) error {
	state, err := expectedState(r)
	if err != nil {
		return err
	}
	if gate := r.Config.Gate; gate != nil {
		r.stage = stageGate
		if err := p.Node.Gate(gate.PodCIDRs, r.Config.NetworkPolicy); err != nil {
			return err
		}
	}
	r.stage = stageIPAM
	ipamPlugin, err := p.ChooseIPAM(r)
	if err != nil {
		return err
	}
	leased := withCode(stageIPAM, ipamPlugin.Check(ctx, state.Addrs))
	previous, err := r.previous()
	if err != nil {
		return err
	}
	mapped := withCode(stagePorts, r.ports(ctx, "CHECK", previous))
	return errors.Join(withCode(stageCheck, p.Links.Check(state)), leased, mapped)
}

// GC removes links and leases of attachments that are not in cni.dev/valid-attachments (specification section 2, GC). It
// goes on past errors.
func (p *Plugin) GC(ctx context.Context, a cnimain.Call) error {
	r, err := p.begin("GC", a)
	if err == nil {
		err = p.gc(ctx, r)
	}
	return p.finish(r, err)
}

func (p *Plugin) gc(ctx context.Context, r *Request) error {
	if !r.Config.HasValidAttachments {
		return fmt.Errorf("%w: %s: missing; without it nothing can be told to be stale", netconf.ErrInvalid, names.ValidAttachments)
	}
	valid := map[string]bool{}
	for _, v := range r.Config.ValidAttachments {
		valid[podlink.Name(v.ContainerID, v.IfName)] = true
	}
	r.stage = stageDetach
	left, linkErr := p.Node.Sweep(r.Config.Name, func(name string) bool { return valid[name] })
	if linkErr != nil && len(left) == 0 {
		return linkErr // which links there are is not known, so no address is known to be free
	}
	for _, name := range left {
		valid[name] = true // its address stays taken
	}
	p.takePortsBack(ctx, r, func(dead hostport.Record) bool { return dead.Network == r.Config.Name && !valid[dead.Link] })
	r.stage = stageIPAM
	ipamPlugin, err := p.ChooseIPAM(r)
	if err != nil {
		return errors.Join(withCode(stageDetach, linkErr), err)
	}
	return errors.Join(withCode(stageDetach, linkErr), ipamPlugin.GC(ctx, func(containerID, ifName string) bool {
		return valid[podlink.Name(containerID, ifName)]
	}))
}

// Status tells whether ADD would work (specification section 2, STATUS): error 50 if not, 51 if pods that run may be cut
// off as well.
func (p *Plugin) Status(ctx context.Context, a cnimain.Call) error {
	r, err := p.begin("STATUS", a)
	if err == nil {
		err = p.status(ctx, r)
	}
	return p.finish(r, err)
}

func (p *Plugin) status(ctx context.Context, r *Request) error {
	r.stage = stageStatus
	if gate := r.Config.Gate; gate != nil {
		if err := p.Node.Gate(gate.PodCIDRs, r.Config.NetworkPolicy); err != nil {
			if p.Node.HasPods() {
				r.stage = stageStatusLimited
			}
			return err
		}
	}
	ipamPlugin, err := p.ChooseIPAM(r)
	if err != nil {
		return err
	}
	return ipamPlugin.Status(ctx)
}
