# Shared by the scripts of this folder. To be sourced, not run.
# shellcheck shell=bash

# say prints one line of progress. Standard output is for results only.
say() { printf '%s\n' "$*" >&2; }

# die says what is wrong and what to do, and ends the script.
die() {
	say "${0##*/}: $*"
	exit 1
}

# progress says what goes on, and for how long: one line that moves on a terminal, elsewhere a line every half minute.
next_line=0
progress() {
	local text=$1 end=" ... $SECONDS s" width
	if [[ -t 2 ]]; then
		# A line that wraps could not be overwritten.
		width=$(stty size <&2 2>/dev/null | cut -d' ' -f2)
		printf '\r\033[K%s%s' "${text:0:$((${width:-80} - ${#end} - 1))}" "$end" >&2
	elif ((SECONDS >= next_line)); then
		say "$text$end"
		next_line=$((SECONDS + 30))
	fi
}

# progress_end takes the moving line away.
progress_end() {
	if [[ -t 2 ]]; then
		printf '\r\033[K' >&2
	fi
}

# spend_memory has Go's compiler collect garbage above 800 MiB only, which saves a seventh
# of its time, where there is that much for each of four at once.
spend_memory() {
	local free
	free=$(sed -n 's/^MemAvailable: *\([0-9]*\) kB$/\1/p' /proc/meminfo)
	if [[ -z ${GOGC-} ]] && ((${free:-0} >> 20 >= 5)); then
		export GOGC=off GOMEMLIMIT=800MiB
	fi
}

# home_of prints the home folder of a user.
home_of() { getent passwd "$1" | cut -d: -f6; }

# sudo_user prints the ordinary user behind sudo if the work tree is theirs, or
# nothing. What is built then belongs to them too, and one cache serves
# `make demo` and `sudo make test`.
sudo_user() {
	local tree
	tree=$(dirname "${BASH_SOURCE[0]}")
	if [[ $EUID -eq 0 && ${SUDO_UID:-0} -ne 0 && -n ${SUDO_USER:-} && $(stat -c %u "$tree") == "$SUDO_UID" ]]; then
		printf '%s\n' "$SUDO_USER"
	fi
}

# exec_as_user becomes a command, run by the user behind sudo if there is one.
exec_as_user() {
	local user
	user=$(sudo_user)
	if [[ -z $user ]]; then
		exec "$@"
	fi
	exec runuser -u "$user" -- env -u XDG_CACHE_HOME -u GOCACHE -u GOMODCACHE -u GOPATH \
		HOME="$(home_of "$user")" PATH="$PATH" "$@"
}

# cache_dir prints HeadCNI's cache folder, outside every work tree.
cache_dir() {
	if [[ -n ${HEADCNI_CACHE:-} ]]; then
		printf '%s\n' "$HEADCNI_CACHE"
	elif [[ -n ${XDG_CACHE_HOME:-} ]]; then
		printf '%s\n' "$XDG_CACHE_HOME/headcni"
	elif [[ -n ${HOME:-} ]]; then
		printf '%s\n' "$HOME/.cache/headcni"
	else
		die "neither HEADCNI_CACHE nor HOME is set: set HEADCNI_CACHE to a folder to build tools in"
	fi
}

# go_dir prints the folder of the go command, or nothing. sudo's secure_path
# usually lacks the one Go was unpacked to, so the common ones are tried.
go_dir() {
	local dir home
	if command -v go >/dev/null; then
		dirname "$(command -v go)"
		return
	fi
	home=$(home_of "${SUDO_USER:-$(id -un)}")
	for dir in /usr/local/go/bin /usr/lib/go/bin /snap/bin "$home/go/bin" "$home/.local/go/bin" "$home/sdk"/go*/bin; do
		if [[ -x $dir/go ]]; then
			printf '%s\n' "$dir"
			return
		fi
	done
}

# find_go puts go on PATH.
find_go() {
	local dir
	dir=$(go_dir)
	[[ -n $dir ]] || die "go is not on PATH: install Go 1.26 (https://go.dev/dl/) or add its bin folder to PATH"
	PATH=$PATH:$dir
}
