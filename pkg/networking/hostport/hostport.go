// Package hostport remembers which pods were given ports of the node, so that the node's own table can lead to them when somebody
// has taken portmap's rules away (`nft flush ruleset`, a reload of firewalld).
package hostport

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/headcni/headcni/internal/atomicfile"
	"github.com/headcni/headcni/internal/trusted"
	"github.com/headcni/headcni/pkg/config/names"
)

// Mapping is one port of the node (capability portMappings, CONVENTIONS.md of CNI).
type Mapping struct {
	HostPort      uint16 `json:"hostPort"`
	ContainerPort uint16 `json:"containerPort"`
	// Protocol is tcp, udp or sctp, in any case; "" means tcp.
	Protocol string `json:"protocol,omitempty"`
	// HostIP is the address of the node that has the port; "" and the unspecified ones mean all.
	HostIP string `json:"hostIP,omitempty"`
}

// Record is what one pod was given.
type Record struct {
	// Link is the host's end of the pod's link.
	Link  string       `json:"link"`
	Addrs []netip.Addr `json:"addrs"`
	Ports []Mapping    `json:"ports"`
	// Whose it is, by which portmap takes the ports back. Records of older versions do not say.
	Network     string `json:"network,omitempty"`
	ContainerID string `json:"containerID,omitempty"`
	IfName      string `json:"ifName,omitempty"`
	// PortMap is the plugin portmap's options by which it gave them; nil in records of older versions, which do not say.
	PortMap map[string]json.RawMessage `json:"portmap"`
}

// Overlaps tells whether one of the ports is one of the record's too.
func (r Record) Overlaps(ports []Mapping) bool {
	return slices.ContainsFunc(ports, func(p Mapping) bool { return slices.ContainsFunc(r.Ports, p.overlaps) })
}

func (m Mapping) overlaps(o Mapping) bool {
	return m.HostPort == o.HostPort && strings.EqualFold(cmp.Or(m.Protocol, "tcp"), cmp.Or(o.Protocol, "tcp")) &&
		(m.HostIP == o.HostIP || m.everywhere() || o.everywhere())
}

// everywhere: at all addresses of the node.
func (m Mapping) everywhere() bool {
	a, err := netip.ParseAddr(m.HostIP)
	return err != nil || a.IsUnspecified()
}

// maxRecord bounds a record in bytes: a pod has some ports, not thousands.
const maxRecord = 1 << 20

// Folder is where records are, beside the daemon's socket. It is on a tmpfs, which ends with the rules.
func Folder(socket string) string { return filepath.Join(filepath.Dir(socket), "ports") }

// Keep writes what a pod was given, whole or not at all. Where no daemon has ever run it does nothing.
func Keep(folder string, r Record) error {
	if err := trusted.Folder(folder); err != nil {
		return err
	}
	if err := os.Mkdir(folder, 0o700); errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return atomicfile.WriteUnsynced(filepath.Join(folder, r.Link), b, 0o600)
}

// Forget removes the record of a pod; that there is none is fine.
func Forget(folder, link string) error {
	if err := trusted.Folder(folder); err != nil {
		return err
	}
	err := os.Remove(filepath.Join(folder, link))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// Of reads the record of a pod's link; ok is false where there is none, or none that can be read.
func Of(folder, link string) (r Record, ok bool) {
	r, err := read(filepath.Join(folder, link))
	return r, err == nil && r.Link == link
}

// List reads all records. What cannot be read is left out, and told.
func List(folder string) (all []Record, err error) {
	entries, err := os.ReadDir(folder)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the pods' ports of this node: %w", err)
	}
	var faults []error
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), names.PodLinkPrefix) {
			continue // one that is being written
		}
		r, err := read(filepath.Join(folder, e.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue // its pod has just gone
		}
		if err == nil && r.Link != e.Name() {
			err = errors.New("it is of another link than its name says")
		}
		if err != nil {
			faults = append(faults, fmt.Errorf("read the ports of pod link %s: %w; remove %s", e.Name(), err, filepath.Join(folder, e.Name())))
			continue
		}
		all = append(all, r)
	}
	return all, errors.Join(faults...)
}

func read(path string) (r Record, err error) {
	info, err := os.Lstat(path)
	if err != nil {
		return r, err
	}
	if !info.Mode().IsRegular() || info.Size() > maxRecord {
		return r, errors.New("no file of ours")
	}
	b, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(b, &r)
	}
	return r, err
}
