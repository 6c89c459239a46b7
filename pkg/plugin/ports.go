package plugin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"slices"

	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/headcni/headcni/internal/cnimain"
	"github.com/headcni/headcni/pkg/networking/hostport"
	"github.com/headcni/headcni/pkg/networking/podlink"
)

// portmapVersion is the newest version of results that every portmap in use takes.
const portmapVersion = "1.0.0"

// ports gives a pod ports of the node (capability portMappings, CONVENTIONS.md of CNI) by the CNI project's plugin portmap,
// where the configuration says so. It is run only for pods that ask for a port: as a plugin of its own in the list it would be
// run for every pod, and takes longer than all that is done here. What it is told is what the runtime would tell it in the
// list. DEL and CHECK undo and check what ADD did.
func (r *Request) ports(ctx context.Context, command string, result *types100.Result) error {
	if r.Config.PortMap == nil || r.Config.Runtime.Ports == nil {
		return nil
	}
	r.stage = stagePorts
	stdin, err := r.portmapConfig(result)
	if err != nil {
		return err
	}
	portmap, err := newDelegate(r, "runtimeConfig.portMappings", "portmap", stdin)
	if err != nil {
		return err
	}
	if command == "ADD" {
		r.keepPorts() // first, so that whoever is killed now leaves no rule that nobody knows of
	}
	_, err = portmap.run(ctx, command)
	return err
}

// returnPorts has portmap take back what ADD had it give, whatever DEL's configuration says of that: multus calls with one that has lost
// half of its keys, and the node's may be another by now.
func (r *Request) returnPorts(ctx context.Context) error {
	record, ok := hostport.Of(hostport.Folder(r.Config.DaemonSocket), podlink.Name(r.ContainerID, r.IfName))
	if ok && record.ContainerID == r.ContainerID && record.IfName == r.IfName {
		given := r.of(record)
		given.Netns = r.Netns
		return given.ports(ctx, "DEL", nil)
	}
	return r.ports(ctx, "DEL", nil)
}

// keepPorts tells the daemon of the ports, which leads to them where portmap's rules are lost. ADD does not depend on it.
func (r *Request) keepPorts() {
	record := hostport.Record{
		Link: podlink.Name(r.ContainerID, r.IfName), Addrs: r.record.Addrs,
		Network: r.Config.Name, ContainerID: r.ContainerID, IfName: r.IfName, PortMap: r.Config.PortMap,
	}
	err := json.Unmarshal(r.Config.Runtime.Ports, &record.Ports)
	if err == nil {
		err = hostport.Keep(hostport.Folder(r.Config.DaemonSocket), record)
	}
	if err != nil {
		r.Log.Warn("the pod's ports of the node will not come back where somebody flushes the firewall", "err", err)
	}
}

// takePortsBack ends what pods that are gone were given, of which wanted says that it is to end. Who never got a DEL, as after a crash of
// the runtime, leaves portmap's rules, and the first rule for a port counts: it would lead to nobody, or to the next pod with the
// address, until the node reboots. What fails here leaves things as they were, and is logged.
func (p *Plugin) takePortsBack(ctx context.Context, r *Request, wanted func(hostport.Record) bool) {
	folder := hostport.Folder(r.Config.DaemonSocket)
	records, err := hostport.List(folder)
	if err != nil {
		r.Log.Warn("look for ports of the node of pods that are gone", "err", err)
	}
	for _, dead := range records {
		if dead.ContainerID == "" || !wanted(dead) || p.Links.There(dead.Link) {
			continue
		}
		err := r.of(dead).delPorts(ctx)
		if err == nil {
			err = errors.Join(dead.EndFlows(), hostport.Forget(folder, dead.Link))
		}
		if err != nil {
			r.Log.Warn("take the ports of the node back from a pod that is gone", "gone", dead.ContainerID, "err", err)
		}
	}
}

// of is the request as it would be about another attachment that has no namespace any more.
func (r *Request) of(dead hostport.Record) *Request {
	other := *r
	other.ContainerID, other.IfName, other.Netns, other.Config.Name = dead.ContainerID, dead.IfName, "", dead.Network
	// Older versions gave portmap ports that it refuses, at DEL too.
	ports := slices.DeleteFunc(slices.Clone(dead.Ports), func(m hostport.Mapping) bool { return m.HostPort == 0 || m.ContainerPort == 0 })
	if other.Config.Runtime.Ports = nil; len(ports) > 0 {
		other.Config.Runtime.Ports, _ = json.Marshal(ports) // they came out of JSON
	}
	switch {
	case dead.PortMap != nil:
		other.Config.PortMap = dead.PortMap
	case other.Config.PortMap == nil:
		other.Config.PortMap = map[string]json.RawMessage{}
	}
	return &other
}

// delPorts has portmap take the ports of the request's attachment back, whoever runs us.
func (r *Request) delPorts(ctx context.Context) error {
	stdin, err := r.portmapConfig(nil)
	if err != nil {
		return err
	}
	portmap, err := newDelegate(r, "portmap", "portmap", stdin)
	if err != nil {
		return err
	}
	portmap.env = []string{"CNI_CONTAINERID=" + r.ContainerID, "CNI_IFNAME=" + r.IfName, "CNI_NETNS=" + r.Netns}
	_, err = portmap.run(ctx, "DEL")
	return err
}

// askedPorts are those that the runtime asks for. What cannot be read portmap refuses.
func (r *Request) askedPorts() (asked []hostport.Mapping) {
	_ = json.Unmarshal(r.Config.Runtime.Ports, &asked) // see above
	return asked
}

// endPorts is when rules and link are gone, before the address is free: it ends the flows that the ports led to the pod, and what was
// noted of them after that, unless it is to be kept.
func (r *Request) endPorts(keep bool) {
	folder, link := hostport.Folder(r.Config.DaemonSocket), podlink.Name(r.ContainerID, r.IfName)
	record, _ := hostport.Of(folder, link)
	err := record.EndFlows()
	if !keep {
		err = errors.Join(err, hostport.Forget(folder, link))
	}
	if err != nil {
		r.Log.Warn("end what the pod's ports of the node led to it", "err", err)
	}
}

// portmapConfig is portmap's configuration; result is nil for DEL, which needs none.
func (r *Request) portmapConfig(result *types100.Result) ([]byte, error) {
	speak := r.Config.CNIVersion
	if newer, err := version.GreaterThan(speak, portmapVersion); err != nil || newer {
		speak = portmapVersion
	}
	conf := map[string]any{}
	for key, value := range r.Config.PortMap {
		// DEL needs to know where to look. Of the others portmap refuses what is wrong at DEL as at ADD, which has then made nothing.
		if result != nil || key == "backend" {
			conf[key] = value
		}
	}
	conf["cniVersion"], conf["name"], conf["type"] = speak, r.Config.Name, "portmap"
	conf["runtimeConfig"] = map[string]json.RawMessage{"portMappings": r.Config.Runtime.Ports}
	if result != nil {
		var previous bytes.Buffer
		if err := cnimain.PrintResult(&previous, speak, result); err != nil {
			return nil, err
		}
		conf["prevResult"] = json.RawMessage(previous.Bytes())
	}
	return json.Marshal(conf)
}
