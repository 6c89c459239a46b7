# shellcheck shell=bash
# Makes a machine of the lab a host for kubelet and containerd. Runs once a boot, in the machine's mount namespace.
# $1 = folder of its disk, $2 = name of its cgroup
set -eu
disk=$1 group=$2

# What a node keeps over a reboot: folders of its own instead of the caller's.
for dir in /etc/cni /etc/kubernetes /etc/headcni /opt/cni /var/lib/cni /var/lib/containerd /var/lib/etcd /var/lib/headcni \
	/var/lib/kubelet /var/lib/tailscale; do
	mkdir -p "$disk$dir"
	[ ! -L "$dir" ] || rm -f "$dir" # to the caller's
	mkdir -p "$dir"
	mount --bind "$disk$dir" "$dir"
done
mkdir -p "$disk/var/log" /etc/cni/net.d /opt/cni/bin
mount --bind "$disk/var/log" /var/log

# The fresh /sys has no cgroups: mount what this kernel has once more, and make the node's own root in each.
# cgroup v1 where it is used at all, else v2.
hierarchies=$(sed -n 's/^[1-9][0-9]*:\([^:]*\):.*/\1/p' /proc/self/cgroup)
if [ -n "$hierarchies" ]; then
	mount -t tmpfs -o mode=0755 cgroup /sys/fs/cgroup
	for controllers in $hierarchies; do
		dir=/sys/fs/cgroup/${controllers#name=}
		mkdir -p "$dir"
		mount -t cgroup -o "$controllers" cgroup "$dir"
		mkdir -p "$dir/$group"
		for file in cpuset.cpus cpuset.mems; do # empty ones hold no process
			[ ! -e "$dir/$group/$file" ] || cat "$dir/$file" >"$dir/$group/$file"
		done
		case $controllers in
		*,*) for one in ${controllers//,/ }; do ln -s "$controllers" "/sys/fs/cgroup/$one"; done ;;
		esac
	done
else
	mount -t cgroup2 cgroup2 /sys/fs/cgroup
	read -ra controllers </sys/fs/cgroup/cgroup.controllers
	for controller in "${controllers[@]}"; do
		echo "+$controller" >/sys/fs/cgroup/cgroup.subtree_control || :
	done
	mkdir -p "/sys/fs/cgroup/$group"
fi

# kubelet sets these for the whole machine, which is not only its own here: it finds them set.
mkdir -p /run/sysctl
while read -r name value; do
	[ -e "/proc/sys/$name" ] || continue
	echo "$value" >"/run/sysctl/${name//\//.}"
	mount --bind "/run/sysctl/${name//\//.}" "/proc/sys/$name"
done <<-EOF
	vm/overcommit_memory 1
	vm/panic_on_oom 0
	kernel/panic 10
	kernel/panic_on_oops 1
	kernel/keys/root_maxkeys 1000000
	kernel/keys/root_maxbytes 25000000
EOF

# Mounts that pods ask for must reach them, and theirs kubelet.
mount --make-rshared /
