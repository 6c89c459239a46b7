package install

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Where libcni keeps the configuration of each attachment until its DEL: CRI-O's and podman's, and multus's for what it
// attached. It forgets what has been deleted.
const (
	cacheGlob       = "/var/lib/cni/results/*"
	multusCacheGlob = "/var/lib/cni/*/results/*"
)

// containerdTasks have a folder for each sandbox that containerd runs. It writes libcni's cache too, but never reads it: it
// deletes by the configuration that it finds then.
var containerdTasks = []string{
	"/run/containerd/io.containerd.runtime.v2.task", "/run/k3s/containerd/io.containerd.runtime.v2.task",
}

// cachedAttachment is what we read of an entry of libcni's cache.
type cachedAttachment struct {
	ContainerID string `json:"containerId"`
	IfName      string `json:"ifName"`
	Config      []byte `json:"config"`
}

// awaited lists the attachments, CONTAINERID/IFNAME, that a runtime will delete by its cache, and for which it will look for
// plugins of ours. What cannot be read is nobody's: libcni cannot use it either. runtime is the node's as its Node object says
// (containerd://2.1.0), "" where nobody says: then the folders of containerd's tasks tell, which a container does not see.
func awaited(runtime string) (attachments []string) {
	containerds := func(id string) bool {
		if runtime == "" {
			return isContainerds(id)
		}
		return strings.HasPrefix(runtime, "containerd:")
	}
	for _, glob := range []string{cacheGlob, multusCacheGlob} {
		files, _ := filepath.Glob(glob) // the pattern is right
		for _, path := range files {
			b, err := os.ReadFile(path)
			var a cachedAttachment
			if err != nil || json.Unmarshal(b, &a) != nil || !runsOurs(a.Config) || glob == cacheGlob && containerds(a.ContainerID) {
				continue
			}
			attachments = append(attachments, a.ContainerID+"/"+a.IfName)
		}
	}
	return attachments
}

// runsOurs reports whether a CNI configuration, of one plugin or a list, names a plugin of ours.
func runsOurs(conf []byte) bool {
	type plugin struct {
		Type string
		IPAM struct{ Type string }
	}
	var c struct {
		plugin
		Plugins []plugin
	}
	if json.Unmarshal(conf, &c) != nil {
		return false
	}
	return slices.ContainsFunc(append(c.Plugins, c.plugin), func(p plugin) bool {
		return slices.Contains(ownPlugins, p.Type) || slices.Contains(ownPlugins, p.IPAM.Type)
	})
}

func isContainerds(id string) bool {
	if id == "" || strings.ContainsAny(id, `/*?[\`) {
		return false
	}
	return slices.ContainsFunc(containerdTasks, func(dir string) bool {
		found, _ := filepath.Glob(filepath.Join(dir, "*", id)) // the pattern is right
		return len(found) > 0
	})
}
