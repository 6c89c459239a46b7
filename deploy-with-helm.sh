#!/usr/bin/env bash
# Installs or upgrades HeadCNI with Helm, and does not call it done before pods on all
# nodes reach each other.
#
#   ./deploy-with-helm.sh -u https://headscale.example.com -k KEY
#
# `--help` lists the options. Progress goes to standard error.
set -euo pipefail

chart=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)/chart
release=headcni
key_variables=(HEADSCALE_API_KEY HEADCNI_AUTH_KEY)
file_variables=(HEADSCALE_API_KEY_FILE HEADCNI_AUTH_KEY_FILE)

usage() {
	cat <<'EOF'
usage: deploy-with-helm.sh -u URL [-k KEY] [options]

  -u, --url URL         the Headscale server, as the nodes reach it
  -k, --key KEY         an API key (recommended: the controller then approves the nodes'
                        routes) or a reusable pre-auth key (Headscale's policy must then
                        approve them). "-" reads it from standard input. Without -k:
                        HEADSCALE_API_KEY, HEADCNI_AUTH_KEY, the files that
                        HEADSCALE_API_KEY_FILE or HEADCNI_AUTH_KEY_FILE name, else the
                        Secret headcni-auth (key api-key) that is in the cluster already
  -n, --namespace NAME  namespace (default kube-system)
  -f, --values FILE     values for the chart; may be given several times
      --set KEY=VALUE   one value, such as config.network.mtu=1400; may be given several times
      --image IMAGE     REPOSITORY[:TAG] or REPOSITORY@sha256:..., where it is not the chart's
      --timeout TIME    how long everything may take, such as 300, 90s or 5m (default 5m)
      --no-url-check    do not ask the URL from this machine, which may not reach what nodes do
      --dry-run         show what would be installed (without the key), change nothing
  -h, --help            this text

kubectl's current context says which cluster it is. KUBECONFIG works as usual.
EOF
}

say() { printf '%s\n' "$*" >&2; }

die() {
	say "deploy-with-helm.sh: $*"
	exit 1
}

# A process's arguments can be read by everybody on the machine, and this one lives for
# minutes: a key on the command line goes into a file, and we start anew without it.
hide_key() {
	local args=("$@") i
	for ((i = 0; i < ${#args[@]}; i++)); do
		case ${args[i]} in
		-k | --key)
			if ((i + 1 < ${#args[@]})) && [[ ${args[i + 1]} != - ]]; then
				start_without_key "${args[i + 1]}" "${args[@]:0:i}" "${args[@]:i+2}"
			fi
			return 0
			;;
		--key=?*) start_without_key "${args[i]#--key=}" "${args[@]:0:i}" "${args[@]:i+1}" ;;
		-u | --url | -n | --namespace | -f | --values | --set | --image | --timeout) ((++i)) ;;
		esac
	done
}

start_without_key() {
	key_to_file "$1"
	shift
	HEADCNI_DEPLOY_KEY_FILE=$key_file exec "$BASH" "${BASH_SOURCE[0]}" "$@"
}

# key_to_file writes the key to a file in a folder that only we may enter.
key_to_file() {
	local dir=${XDG_RUNTIME_DIR:-/dev/shm}
	[[ -d $dir && -w $dir ]] || dir=${TMPDIR:-/tmp}
	dir=$(mktemp -d "$dir/headcni-deploy.XXXXXX")
	key_file=$dir/key
	(umask 077 && printf '%s' "$1" >"$key_file")
}

# forget_key removes the file, if it is of our own making.
forget_key() {
	if [[ ${key_file:-} == */headcni-deploy.??????/key ]]; then
		rm -f "$key_file"
		rmdir "${key_file%/*}" 2>/dev/null || true
	fi
	key_file=''
}

clean_up() {
	rm -f "${error_file:-}"
	forget_key
}

parse() {
	url='' namespace=kube-system image='' timeout=5m check_url=yes dry_run='' read_key=''
	helm_args=()
	local option value
	while (($#)); do
		option=$1
		shift
		case $option in
		-h | --help)
			usage
			exit 0
			;;
		--dry-run) dry_run=yes && continue ;;
		--no-url-check) check_url='' && continue ;;
		--*=*) value=${option#*=} option=${option%%=*} ;;
		-*)
			(($#)) || die "$option needs a value; see --help"
			value=$1
			shift
			;;
		*) die "unexpected argument $option; see --help" ;;
		esac
		case $option in
		-u | --url) url=$value ;;
		-k | --key) # any other has been hidden
			[[ $value == - ]] || die "give the key once"
			read_key=yes
			;;
		-n | --namespace) namespace=$value ;;
		-f | --values)
			[[ -r $value ]] || die "cannot read the values file $value"
			helm_args+=(--values "$value")
			;;
		--set)
			[[ $value != *authKey=* && $value != apiKey=* ]] || die "give the key with -k: --set would show it to everybody on this machine"
			helm_args+=(--set "$value")
			;;
		--image) image=$value ;;
		--timeout) timeout=$value ;;
		*) die "no such option: $option; see --help" ;;
		esac
	done
	[[ -n $url ]] || die "-u is missing: give the Headscale server's URL, such as -u https://headscale.example.com"
	url=${url%/}
	case $timeout in
	*[!0-9sm]* | '') die "--timeout $timeout: want seconds or minutes, such as 90s or 5m" ;;
	*m) deadline=$((SECONDS + 60 * ${timeout%m})) ;;
	*) deadline=$((SECONDS + ${timeout%s})) ;;
	esac
}

# find_key looks where the specification says, unless there was one on the command line.
find_key() {
	local name text
	if [[ -n $read_key ]]; then
		IFS= read -r text || [[ -n $text ]] || die "no key on standard input"
		key_to_file "$text"
	fi
	[[ -z $key_file ]] || return 0
	for name in "${key_variables[@]}"; do
		if [[ -n ${!name:-} ]]; then
			key_to_file "${!name}"
			return
		fi
	done
	for name in "${file_variables[@]}"; do
		if [[ -n ${!name:-} ]]; then
			[[ -r ${!name} ]] || die "$name: cannot read ${!name}"
			key_to_file "$(tr -d ' \t\r\n' <"${!name}")"
			return
		fi
	done
}

check_programs() {
	command -v kubectl >/dev/null || die "kubectl is not on PATH: see https://kubernetes.io/docs/tasks/tools/"
	command -v helm >/dev/null || die "helm is not on PATH: see https://helm.sh/docs/intro/install/ (version 3.8 or later)"
	local version
	version=$(helm version --short 2>/dev/null) || die "helm does not run: try 'helm version'"
	if [[ $version =~ ^v([0-9]+)\.([0-9]+) ]] && ((BASH_REMATCH[1] < 3 || BASH_REMATCH[1] == 3 && BASH_REMATCH[2] < 8)); then
		die "helm $version is too old: version 3.8 or later is needed"
	fi
	[[ -r $chart/Chart.yaml ]] || die "the chart is not beside this script: $chart; clone the whole repository"
}

check_cluster() {
	local answer
	if ! answer=$(kubectl get --raw /version --request-timeout=10s 2>&1); then
		die "the cluster does not answer: ${answer##*$'\n'}
  Is 'kubectl config current-context' the right one, and KUBECONFIG set? Try 'kubectl get nodes'."
	fi
	[[ $(kubectl auth can-i create clusterroles 2>/dev/null) == yes ]] ||
		die "you may not create ClusterRoles in this cluster: use an administrator's kubeconfig"
	nodes=$(kubectl get nodes -o jsonpath='{range .items[*]}{.metadata.name}{"\n"}{end}')
	[[ -n $nodes ]] || die "the cluster has no Nodes yet: join one first (they stay NotReady until HeadCNI is there)"
	if [[ -z $key_file ]] && ! kubectl -n "$namespace" get secret headcni-auth -o name >/dev/null 2>&1; then
		die "no key: give one with -k, or make the Secret headcni-auth (key api-key) in the namespace $namespace"
	fi
}

# ask_url prints the HTTP status of a path of the server's, 000 where there is none.
# The key goes to curl by standard input.
ask_url() {
	local header=''
	[[ -z ${2:-} ]] || header=$(printf 'header = "Authorization: Bearer %s"' "$(<"$2")")
	printf '%s\n' "$header" | curl -sS -m 10 -o /dev/null -w '%{http_code}' -K - "$url$1" 2>"$error_file" || true
}

check_url() {
	local code
	[[ $url =~ ^https?://([^/@:]+|\[[0-9a-fA-F:]+\])(:[0-9]+)?(/.*)?$ ]] || die "-u $url: want https://HOST[:PORT]"
	case ${BASH_REMATCH[1]} in
	localhost | 127.* | '[::1]') die "-u $url: on every node that is the node itself; give a name or address that all nodes reach" ;;
	esac
	[[ -n $check_url ]] || return 0
	if ! command -v curl >/dev/null; then
		say "  (without curl the URL is not checked)"
		return
	fi
	code=$(ask_url /health)
	case $code in
	000) die "Headscale does not answer at $url: $(<"$error_file")
  Does it run, and is the URL its server_url? If only the nodes reach it, give --no-url-check." ;;
	200) ;;
	*) die "$url/health answers HTTP $code: is this Headscale, and the port its listen_addr? --no-url-check goes on all the same." ;;
	esac
}

# what_key finds out which kind the key is: api, preauth or unknown.
what_key() {
	local key code
	[[ -n $key_file ]] || return 0
	key=$(<"$key_file")
	[[ -n $key && $key != *[[:space:]]* ]] || die "the key is empty or more than one word"
	case $key in
	hskey-auth-* | tskey-*) kind=preauth ;;
	hskey-api-*) kind=api ;;
	esac
	if [[ $kind != preauth && -n $check_url ]] && command -v curl >/dev/null; then
		code=$(ask_url /api/v1/apikey "$key_file")
		case $kind:$code in
		*:200) kind=api ;;
		api:401 | api:403) die "Headscale refuses the API key: it is wrong or has expired (they do after 90 days). Make one: headscale apikeys create" ;;
		unknown:401 | unknown:403) kind=preauth ;; # before 0.28 only asking tells them apart
		esac
	fi
}

# own_values are what this cluster needs beyond what the user gave.
own_values() {
	set_args=(--set-string "config.headscale.url=$url")
	if [[ -n $image ]]; then
		case ${image##*/} in
		*@*) set_args+=(--set-string "image.repository=${image%@*}" --set-string "image.digest=${image#*@}") ;;
		*:*) set_args+=(--set-string "image.repository=${image%:*}" --set-string "image.tag=${image##*:}") ;;
		*) set_args+=(--set-string "image.repository=$image") ;;
		esac
	fi
	if (($(wc -l <<<"$nodes") == 1)); then
		set_args+=(--set controller.replicas=1)
	fi
	if [[ -n $(kubectl get nodes -l microk8s.io/cluster=true -o name 2>/dev/null) ]]; then
		local data=/var/snap/microk8s/current
		set_args+=(--set "config.cni.binDir=$data/opt/cni/bin" --set "config.cni.confDir=$data/args/cni-network")
	fi
	if [[ -n $dry_run && -n $key_file ]]; then
		set_args+=(--set-string 'config.headscale.authKey=THE-KEY-IS-NOT-SHOWN')
	elif [[ -n $key_file ]]; then
		set_args+=(--set-file "config.headscale.authKey=$key_file")
	fi
	# The user's come last, so that they win.
	set_args+=(${helm_args[@]+"${helm_args[@]}"})
}

left() { printf '%d' $((deadline > SECONDS ? deadline - SECONDS : 0)); }

# wait_for calls a function every 2 s until it succeeds. The function says in $status
# what it waits for, and may end the script where waiting is no use.
wait_for() {
	local what=$1 shown=''
	status=
	until "$what"; do
		if ((SECONDS >= deadline)); then
			fail "after $timeout: $status"
		fi
		if [[ $status != "$shown" ]]; then
			say "  $status"
			shown=$status
		fi
		sleep 2
	done
}

daemons_ready() {
	local want ready updated generation observed
	no_image
	IFS=, read -r want ready updated generation observed < <(kubectl -n "$namespace" get daemonset headcni -o \
		jsonpath='{.status.desiredNumberScheduled},{.status.numberReady},{.status.updatedNumberScheduled},{.metadata.generation},{.status.observedGeneration}' && echo)
	status="nodes whose network is programmed: ${ready:-0} of ${want:-?}"
	[[ -n $want && $want != 0 && $ready == "$want" && ${updated:-0} == "$want" && $observed == "$generation" ]]
}

# no_image ends the script where the runtimes have given up on the image.
no_image() {
	local reasons
	reasons=$(kubectl -n "$namespace" get pods -l app.kubernetes.io/part-of=headcni \
		-o jsonpath='{..state.waiting.reason}' 2>/dev/null || true)
	case " $reasons " in
	*ImagePullBackOff* | *ErrImageNeverPull* | *InvalidImageName*)
		: "${image_missing:=$SECONDS}"
		if ((SECONDS - image_missing >= 10)); then
			fail "nodes have no image $(kubectl -n "$namespace" get daemonset headcni -o jsonpath='{.spec.template.spec.containers[0].image}').
  None is published. Build it with 'make image', push it to a registry or import it on each node
  (ctr -n k8s.io images import FILE), and name it with --image."
		fi
		;;
	*) image_missing= ;;
	esac
}

controller_ready() {
	local available
	available=$(kubectl -n "$namespace" get deployment headcni-controller -o jsonpath='{.status.availableReplicas}')
	status="controllers that are ready: ${available:-0}"
	((${available:-0} > 0))
}

# views prints each Node's name and the controller's view of it (JSON), with a tab between.
views() {
	kubectl get nodes -o jsonpath='{range .items[*]}{.metadata.name}{"\t"}{.metadata.annotations.headcni\.io/headscale}{"\n"}{end}'
}

# routes_approved: Headscale sends every node's pods to it. With a pre-auth key nobody can
# see that; traffic shows it then.
routes_approved() {
	local node view waiting=()
	while IFS=$'\t' read -r node view; do
		case $view in
		*'"state":"routed"'* | *'"state":"unseen"'*) ;;
		*) waiting+=("$node") ;;
		esac
	done < <(views)
	status="nodes whose routes Headscale has not approved yet: ${waiting[*]:-none}"
	((${#waiting[@]} == 0))
}

# pool prints the ranges that pods have addresses from.
pool() {
	local found
	found=$(kubectl -n kube-system get configmap kubeadm-config -o jsonpath='{.data.ClusterConfiguration}' 2>/dev/null |
		sed -n 's/^ *podSubnet: *"\{0,1\}\([^"]*\)"\{0,1\}$/\1/p') || true
	if [[ -z $found ]]; then
		found=$(kubectl get nodes -o jsonpath='{range .items[*]}{.spec.podCIDRs[*]}{"\n"}{end}' 2>/dev/null) || true
	fi
	tr ', ' '\n' <<<"$found" | sed '/^$/d' | sort -u
}

# policy_lines prints what Headscale's policy needs where nobody approves routes by API.
policy_lines() {
	local cidr routes='' names='' targets=''
	while read -r cidr; do
		routes+="${routes:+, }\"$cidr\": [\"tag:headcni\"]"
		names+=", \"$cidr\"" targets+=", \"$cidr:*\""
	done < <(pool)
	cat >&2 <<EOF

With a pre-auth key Headscale's policy has to approve the nodes' routes, and to let pods through. It needs
(beside what it has; the pool that all nodes' pod CIDRs are cut from will do for nodes to come):

  "tagOwners": {"tag:headcni": []},
  "autoApprovers": {"routes": {$routes}},
  "acls": [{"action": "accept", "src": ["tag:headcni"$names], "dst": ["tag:headcni:*"$targets]}],

An API key instead of the pre-auth key (headscale apikeys create) needs no autoApprovers.
EOF
}

# fail says what is wrong, what the parts say about it, and ends the script.
fail() {
	local node view
	say
	say "NOT READY: $1"
	while IFS=$'\t' read -r node view; do
		case $view in
		*'"state":"routed"'* | *'"state":"unseen"'*) ;;
		'') say "  Node $node: the controller has said nothing of it yet" ;;
		*) say "  Node $node: $(sed -n 's/.*"message":"\(\([^"\\]\|\\.\)*\)".*/\1/p' <<<"$view")" ;;
		esac
	done < <(views 2>/dev/null || true)
	events=$(kubectl get events -A --field-selector type=Warning \
		-o jsonpath='{range .items[*]}{.reportingComponent}{"\t"}{.involvedObject.name}: {.message}{"\n"}{end}' 2>/dev/null |
		sed -n 's/^headcni[^\t]*\t/  /p' | sort -u | tail -n 10) || true
	[[ -z $events ]] || say "$events"
	if [[ $kind != api ]] && grep -q '"state":"unseen"' < <(views 2>/dev/null); then
		kind=preauth
	fi
	if [[ $kind == preauth ]]; then
		policy_lines
	fi
	say
	say "Look at: kubectl -n $namespace get pods -o wide -l app.kubernetes.io/part-of=headcni"
	say "         kubectl -n $namespace logs deployment/headcni-controller"
	say "         kubectl -n $namespace exec daemonset/headcni -- headcni-daemon status"
	exit 1
}

main() {
	key_file=${HEADCNI_DEPLOY_KEY_FILE:-} kind=unknown image_missing=
	unset HEADCNI_DEPLOY_KEY_FILE
	trap clean_up EXIT
	trap 'exit 130' INT
	trap 'exit 143' TERM
	parse "$@"
	error_file=$(mktemp)
	find_key
	check_programs
	check_url
	check_cluster
	what_key
	own_values
	local helm_command=(helm upgrade --install "$release" "$chart" --namespace "$namespace" --create-namespace --timeout "$(left)s" "${set_args[@]}")
	if [[ -n $dry_run ]]; then
		"${helm_command[@]}" --dry-run
		return
	fi
	say "HeadCNI: installing into $(kubectl config current-context 2>/dev/null || echo 'the cluster'), namespace $namespace"
	"${helm_command[@]}" >"$error_file" 2>&1 || die "helm failed:
$(<"$error_file")"
	forget_key
	wait_for daemons_ready
	wait_for controller_ready
	wait_for routes_approved
	say "  every node's network is programmed; trying it from pod to pod"
	if ! helm test "$release" --namespace "$namespace" --timeout "$(left)s" >"$error_file" 2>&1; then
		kubectl -n "$namespace" logs headcni-test >>"$error_file" 2>&1 || true
		fail "a pod does not reach the pods of all nodes:
$(tail -n 15 "$error_file")"
	fi
	say "HeadCNI is ready: pods on all $(wc -l <<<"$nodes") nodes reach each other (after $SECONDS s)"
}

hide_key "$@"
main "$@"
