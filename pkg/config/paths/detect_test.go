package paths

import (
	"os"
	"path/filepath"
	"testing"
)

func TestDetectCNI(t *testing.T) {
	const (
		k3s   = "/var/lib/rancher/k3s/agent/etc/containerd/config.toml"
		rke2  = "/var/lib/rancher/rke2/agent/etc/containerd/config.toml"
		micro = "/var/snap/microk8s/current/args/containerd.toml"
		plain = "/etc/containerd/config.toml"
	)
	for name, tc := range map[string]struct {
		files     map[string]string
		bin, conf string
	}{
		"nothing": {nil, "/opt/cni/bin", "/etc/cni/net.d"},
		"K3s with flannel": {map[string]string{k3s: `
version = 3
[plugins.'io.containerd.cri.v1.runtime']
  enable_selinux = false
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dir = "/var/lib/rancher/k3s/data/cni"
  conf_dir = "/var/lib/rancher/k3s/agent/etc/cni/net.d"
[plugins.'io.containerd.cri.v1.images'.registry]
  config_path = "/x"
`}, "/var/lib/rancher/k3s/data/cni", "/var/lib/rancher/k3s/agent/etc/cni/net.d"},
		// A containerd beside it is not the one that K3s runs.
		"K3s without flannel": {map[string]string{
			k3s:   "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd]\n  snapshotter = \"overlayfs\"\n",
			plain: "[plugins.\"io.containerd.grpc.v1.cri\".cni]\nbin_dir = \"/else\"\n",
		}, "/opt/cni/bin", "/etc/cni/net.d"},
		"RKE2": {map[string]string{rke2: "version = 3\n"}, "/opt/cni/bin", "/etc/cni/net.d"},
		"MicroK8s": {map[string]string{micro: `
  [plugins."io.containerd.grpc.v1.cri".cni]
    # bin_dir = "/not/this"
    bin_dir = "${SNAP_DATA}/opt/cni/bin"
    conf_dir = "${SNAP_DATA}/args/cni-network"
`}, "/var/snap/microk8s/current/opt/cni/bin", "/var/snap/microk8s/current/args/cni-network"},
		"containerd 2.1": {map[string]string{plain: `
[plugins]
  [plugins.'io.containerd.cri.v1.runtime']
    [plugins.'io.containerd.cri.v1.runtime'.cni]
      bin_dir = ''
      bin_dirs = ['/usr/lib/cni/', '/opt/cni/bin'] # the first
      conf_dir = '/etc/cni/net.d'
`}, "/usr/lib/cni", "/etc/cni/net.d"},
		"another section, a relative folder, half a line": {map[string]string{
			plain: "[plugins.x.other]\nbin_dir = \"/no\"\n[plugins.x.cni]\nbin_dir = \"no\"\nconf_dir = \"/no\n",
		}, "/opt/cni/bin", "/etc/cni/net.d"},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			for file, text := range tc.files {
				file = filepath.Join(root, file)
				if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if bin, conf := DetectCNI(root); bin != tc.bin || conf != tc.conf {
				t.Errorf("%s, %s; want %s, %s", bin, conf, tc.bin, tc.conf)
			}
		})
	}
}
