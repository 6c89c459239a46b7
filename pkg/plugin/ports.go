package plugin

import (
	"bytes"
	"context"
	"encoding/json"

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
	_, err = portmap.run(ctx, command)
	if err == nil && command == "ADD" {
		r.keepPorts()
	}
	return err
}

// keepPorts tells the daemon of the ports, which leads to them where portmap's rules are lost. ADD does not depend on it.
func (r *Request) keepPorts() {
	record := hostport.Record{Link: podlink.Name(r.ContainerID, r.IfName), Addrs: r.record.Addrs}
	err := json.Unmarshal(r.Config.Runtime.Ports, &record.Ports)
	if err == nil {
		err = hostport.Keep(hostport.Folder(r.Config.DaemonSocket), record)
	}
	if err != nil {
		r.Log.Warn("the pod's ports of the node will not come back where somebody flushes the firewall", "err", err)
	}
}

// forgetPorts is before anything of the attachment is free.
func (r *Request) forgetPorts() {
	if err := hostport.Forget(hostport.Folder(r.Config.DaemonSocket), podlink.Name(r.ContainerID, r.IfName)); err != nil {
		r.Log.Warn("forget the pod's ports of the node", "err", err)
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
		conf[key] = value
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
