# Shared by the scripts of this folder. To be sourced, not run.
# shellcheck shell=bash

# say prints one line of progress. Standard output is for results only.
say() { printf '%s\n' "$*" >&2; }

# die says what is wrong and what to do, and ends the script.
die() {
	say "${0##*/}: $*"
	exit 1
}

# home_of prints the home folder of a user.
home_of() { getent passwd "$1" | cut -d: -f6; }

# sudo_user prints the ordinary user behind sudo, or nothing.
sudo_user() {
	if [[ $EUID -eq 0 && ${SUDO_UID:-0} -ne 0 && -n ${SUDO_USER:-} ]]; then
		printf '%s\n' "$SUDO_USER"
	fi
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

# find_go puts go on PATH. sudo's secure_path usually lacks the folder Go was
# unpacked to, so the common ones are tried.
find_go() {
	command -v go >/dev/null && return
	local dir user
	user=$(sudo_user)
	for dir in /usr/local/go/bin /usr/lib/go/bin /snap/bin ${user:+"$(home_of "$user")/go/bin" "$(home_of "$user")/.local/go/bin" "$(home_of "$user")/sdk"/go*/bin}; do
		if [[ -x $dir/go ]]; then
			PATH=$PATH:$dir
			return
		fi
	done
	die "go is not on PATH: install Go 1.26 (https://go.dev/dl/) or add its bin folder to PATH"
}
