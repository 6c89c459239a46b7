#!/usr/bin/env bash
# Installs or upgrades HeadCNI in a cluster with Helm, waits until every node has its pod network, and tries it: it finds or builds headcnictl,
# and runs `headcnictl install` with the chart beside this script. `./deploy-with-helm.sh --help` says how.
#
# The key never stands on a command line of a process started here, in a file on this machine or in what is printed.
{ set +x; } 2>/dev/null
set -euo pipefail

self=${BASH_SOURCE[0]}
if type -P readlink >/dev/null && [[ -L $self ]]; then
	self=$(readlink -f "$self")
fi
[[ $self == */* ]] || self=./$self
here=$(cd "${self%/*}" && pwd)

usage() {
	cat <<'HELP'
Usage: ./deploy-with-helm.sh -u URL -k KEY [options]

Installs or upgrades HeadCNI, waits until every node is right and pods on all nodes answer.

  -u, --url URL          Headscale, for instance https://headscale.example.com
  -k, --key KEY          its API key (recommended) or a pre-auth key; - reads it from standard input.
                         Without -k: HEADSCALE_API_KEY, HEADCNI_AUTH_KEY, or the file that HEADSCALE_API_KEY_FILE or
                         HEADCNI_AUTH_KEY_FILE names, in this order; else the key that the cluster has already
      --ca FILE          the certificate (PEM) that signed Headscale's, where it is not a public authority's
  -n, --namespace NAME   where HeadCNI's objects are (default kube-system)
  -f, --values FILE      values for the chart; repeatable
      --set KEY=VALUE    one value for the chart; repeatable
      --image NAME:TAG   the image (default: the chart's)
      --kubeconfig FILE  as for kubectl
      --context NAME     as for kubectl
      --timeout TIME     for all the waiting, such as 90s or 5m (default 5m)
      --skip-url-check   do not ask URL from this machine: only the nodes reach it
      --dry-run          print what would be applied, the key masked, and change nothing
  -h, --help             print this

A key after -k is in the shell's history and, for a moment, in the list of processes. A file or standard input is not:

  HEADSCALE_API_KEY_FILE=api-key ./deploy-with-helm.sh -u https://headscale.example.com

It runs `headcnictl install`, which does the same without this folder.
HELP
}

die() {
	printf 'deploy-with-helm.sh: %s\n' "$*" >&2
	exit 2
}

# take_key reads the command line: into key what -k says, into rest everything else.
key='' rest=()
take_key() {
	while (($#)); do
		case $1 in
		-h | --help) usage && exit 0 ;;
		-k | --key)
			(($# > 1)) || die "$1 needs a value: see --help"
			key=$2
			shift
			;;
		--key=*) key=${1#*=} ;;
		-k*) key=${1#-k} ;;
		*) rest+=("$1") ;;
		esac
		shift
	done
}

# find_program prints where headcnictl is: beside this script, in PATH, or built now.
find_program() {
	[[ ! -x $here/bin/headcnictl ]] || { echo "$here/bin/headcnictl" && return; }
	! type -P headcnictl || return 0
	type -P make >/dev/null || die "headcnictl is missing: put a release's into PATH, or install make and Go and run 'make build' here"
	echo "deploy-with-helm.sh: building headcnictl, once" >&2
	env -u HEADSCALE_API_KEY -u HEADCNI_AUTH_KEY make -C "$here" build BUILD=headcnictl >&2 || die "headcnictl is missing and was not built (above): put a release's into PATH"
	echo "$here/bin/headcnictl"
}

take_key "$@"
# Anew with the key on standard input: else it would be in the list of processes as long as this script runs.
if [[ -n $key && $key != - ]]; then
	exec "$BASH" "$self" ${rest[@]+"${rest[@]}"} -k - < <(printf '%s\n' "$key")
fi
program=$(find_program </dev/null)
exec "$program" install --chart "$here/chart" ${key:+--key-file -} ${rest[@]+"${rest[@]}"}
