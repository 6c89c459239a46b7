package paths

import (
	"os"
	"path/filepath"
	"strings"
)

// Distribution is a Kubernetes, or a container runtime, that may keep CNI files in folders of its own.
type Distribution struct {
	Name string
	// RuntimeConfig is the configuration that its containerd runs with. What it says counts.
	RuntimeConfig string
	// Socket is its containerd's.
	Socket string
	// BinDir and ConfDir are where it has them unless told otherwise.
	BinDir, ConfDir string
}

// Distributions lists those that are looked for, the particular before the general.
//
// K3s names folders of its own only while it runs flannel itself: with --flannel-backend=none, as for any other CNI, its
// containerd looks where everybody's does. Before the releases of November 2024 its plugins were in data/current/bin.
// RKE2 always has the usual ones. MicroK8s never has.
var Distributions = []Distribution{
	{"K3s with its own flannel", "/var/lib/rancher/k3s/agent/etc/containerd/config.toml", k3sSocket,
		"/var/lib/rancher/k3s/data/cni", "/var/lib/rancher/k3s/agent/etc/cni/net.d"},
	{"RKE2 or K3s without flannel", "/var/lib/rancher/rke2/agent/etc/containerd/config.toml", k3sSocket, CNIBinDir, CNIConfDir},
	{"MicroK8s", microk8sData + "/args/containerd.toml", "/var/snap/microk8s/common/run/containerd.sock",
		microk8sData + "/opt/cni/bin", microk8sData + "/args/cni-network"},
	{"containerd", "/etc/containerd/config.toml", "/run/containerd/containerd.sock", CNIBinDir, CNIConfDir},
}

// k3sSocket is RKE2's too.
const k3sSocket = "/run/k3s/containerd/containerd.sock"

// microk8sData is $SNAP_DATA in MicroK8s' own files.
const microk8sData = "/var/snap/microk8s/current"

// DetectCNI says where the container runtime of this host looks for plugins and configurations: what the first
// distribution found says, else the usual folders. In a pod, which does not see the host's files, these are the usual
// ones too. root is "/" but in tests.
func DetectCNI(root string) (binDir, confDir string) {
	for _, d := range Distributions {
		b, err := os.ReadFile(filepath.Join(root, d.RuntimeConfig))
		if err != nil {
			continue // not there, or not for us to read
		}
		binDir, confDir = cniSection(string(b))
		break
	}
	if binDir == "" {
		binDir = CNIBinDir
	}
	if confDir == "" {
		confDir = CNIConfDir
	}
	return binDir, confDir
}

// cniSection finds the folders in containerd's configuration (TOML), "" for one that is not there:
//
//	[plugins.'io.containerd.cri.v1.runtime'.cni]
//	  bin_dir = '/opt/cni/bin'        # or, since containerd 2.1, bin_dirs = ['/opt/cni/bin']
//	  conf_dir = '/etc/cni/net.d'
func cniSection(text string) (binDir, confDir string) {
	inside := false
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "[") {
			name, _, _ := strings.Cut(strings.TrimLeft(line, "["), "]")
			inside = strings.HasPrefix(name, "plugins.") && strings.HasSuffix(strings.TrimSpace(name), ".cni")
			continue
		}
		key, value, ok := strings.Cut(line, "=")
		if !inside || !ok {
			continue
		}
		dir := quoted(value)
		if !filepath.IsAbs(dir) {
			continue
		}
		switch strings.TrimSpace(key) {
		case "bin_dir", "bin_dirs":
			binDir = dir
		case "conf_dir":
			confDir = dir
		}
	}
	return binDir, confDir
}

// quoted returns the first string of a TOML value, which may be a list.
func quoted(value string) string {
	value = strings.TrimLeft(value, " \t[")
	if value == "" || value[0] != '"' && value[0] != '\'' {
		return ""
	}
	s, _, closed := strings.Cut(value[1:], value[:1])
	if !closed {
		return ""
	}
	return filepath.Clean(strings.NewReplacer("${SNAP_DATA}", microk8sData, "$SNAP_DATA", microk8sData).Replace(s))
}
