// Package paths names every place on a node where HeadCNI keeps or looks for files.
package paths

const (
	// ConfigFile is the daemon's configuration.
	ConfigFile = "/etc/headcni/daemon.yaml"
	// EnvFile holds the variables that the systemd units give the daemon.
	EnvFile = "/etc/headcni/env"

	// StateDir holds what must survive a restart of any of our processes.
	StateDir = "/var/lib/headcni"
	// IPAMDir holds the address leases, one folder per network.
	IPAMDir = StateDir + "/ipam"
	// TailscaleStateDir is the state of the dedicated tailscaled in daemon mode.
	TailscaleStateDir = StateDir + "/tailscale"

	// RunDir is on a tmpfs and holds sockets.
	RunDir = "/run/headcni"
	// DaemonSocket is where the CNI plugin wakes the daemon.
	DaemonSocket = RunDir + "/daemon.sock"
	// APISocket answers what the daemon knows of its node, to root alone.
	APISocket = RunDir + "/api.sock"
	// DaemonTailscaleSocket is the LocalAPI of the dedicated tailscaled in daemon mode.
	DaemonTailscaleSocket = RunDir + "/tailscaled.sock"
	// HostTailscaleSocket is where a host's own tailscaled listens.
	HostTailscaleSocket = "/var/run/tailscale/tailscaled.sock"

	// CNIConfDir and CNIBinDir are the defaults of containerd, CRI-O and kubelet.
	CNIConfDir = "/etc/cni/net.d"
	CNIBinDir  = "/opt/cni/bin"
	// ImageCNIDir is where the container image has the plugins that go to the host.
	ImageCNIDir = "/opt/headcni/cni"
	// ConflistName is the file the daemon writes into the CNI configuration folder.
	ConflistName = "10-headcni.conflist"

	// BootID changes with every boot (random(4)).
	BootID = "/proc/sys/kernel/random/boot_id"
)
