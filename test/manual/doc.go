// Package manual holds docs/install-by-hand.md to its word: it is carried out, command by command as it is printed, on
// two machines that have a systemd of their own as their first process, Debian's containerd and nothing of ours. Their
// hardware is the lab's: its network namespaces, its underlay and its Headscale.
//
// A machine is a systemd-nspawn container without systemd-machined on the host. Its disk outlives its boots.
package manual
