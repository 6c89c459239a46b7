# shellcheck shell=bash
# PID 1 of one machine of the lab: gives it mounts of its own, then waits until its standard input ends.
# $1 = host name, $2 = folder of the machine's own /etc/resolv.conf and hosts
set -eu
mount --make-rprivate /
mount -t proc proc /proc
# The kernel copies IPv4's settings from the host: one with Docker forwards, a distribution's may filter reverse paths.
echo 0 > /proc/sys/net/ipv4/ip_forward
for i in all default lo; do echo 0 > /proc/sys/net/ipv4/conf/$i/rp_filter; done
# A fresh sysfs shows this network namespace's devices. Some hosts forbid it to an ordinary user; nothing depends on it.
mount -t sysfs sysfs /sys 2>/dev/null || :

# /run: a fresh one; the host's files that links below point to stay reachable under /run/host.
kept=$2/host
mkdir "$kept"
mount -t tmpfs -o mode=0755 tmpfs "$kept"
for dir in /etc /var/lib /opt; do
	mkdir -p "$kept$dir"
	mount --rbind "$dir" "$kept$dir"
done
mount -t tmpfs -o mode=0755 tmpfs /run
mkdir -p /run/host /run/lock /run/netns
mount --move "$kept" /run/host
rmdir "$kept"
# As `ip netns add` would make it, but it races with itself.
mount --bind /run/netns /run/netns
mount --make-shared /run/netns

# A boot of its own: whoever asks the kernel for its ID is answered by this file.
cat /proc/sys/kernel/random/uuid > /run/boot_id
mount --bind /run/boot_id /proc/sys/kernel/random/boot_id

# An ordinary user cannot make folders in /etc, /var/lib and /opt, and root should not: a tmpfs of links covers each.
for dir in /etc /var/lib /opt; do
	mount -t tmpfs -o mode=0755 tmpfs "$dir"
	find "/run/host$dir" -mindepth 1 -maxdepth 1 -type l -exec cp -P -t "$dir" {} +
	find "/run/host$dir" -mindepth 1 -maxdepth 1 ! -type l -exec ln -s -t "$dir" {} +
done
rm -f /etc/cni /etc/headcni /etc/resolv.conf /etc/hosts /etc/hostname
rm -f /var/lib/headcni /var/lib/tailscale /var/lib/headscale /var/lib/cni /opt/cni
mkdir -p /etc/cni/net.d /etc/headcni /opt/cni/bin /var/lib/headcni /var/lib/tailscale /var/lib/headscale /var/lib/cni
echo "$1" > /etc/hostname
cp "$2/resolv.conf" "$2/hosts" /etc/

echo ready
while read -r line; do
	[ "$line" != keep ] || keep=1
done
# The lab has ended. With `keep`, the world stays until `demo down`.
while [ -n "${keep-}" ]; do
	sleep 1000 || :
done
