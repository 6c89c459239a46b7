#!/usr/bin/env bash
# Installs or upgrades HeadCNI in a cluster with Helm, waits until every node has its pod network, and tries it.
# `./deploy-with-helm.sh --help` says how.
#
# The key never stands on a command line of a process started here, in a variable handed on, in a file on this machine
# or in what is printed. It goes through a pipe into the Secret headcni-auth, and Helm gets that Secret's name only:
# Helm keeps all values of a release, so a key among them would be in the cluster a second time, in every revision.
{ set +x; } 2>/dev/null
set -euo pipefail

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 402)); then
	echo "deploy-with-helm.sh: bash $BASH_VERSION is too old: run it with bash 4.2 or later" >&2
	exit 1
fi

self=${BASH_SOURCE[0]}
if type -P readlink >/dev/null && [[ -L $self ]]; then
	self=$(readlink -f "$self")
fi
[[ $self == */* ]] || self=./$self
chart=$(cd "${self%/*}" && pwd)/chart
release=headcni
secret=headcni-auth

usage() {
	cat <<'HELP'
Usage: ./deploy-with-helm.sh -u URL -k KEY [options]

Installs or upgrades HeadCNI, waits until every node's pod range is routed and pods on all nodes answer.

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
HELP
}

# Progress goes to standard output, or beside it where that is for the manifests.
say() { printf '%s\n' "$*" >&3; }
ok() { say "ok    $*"; }
# What is wrong, and what to do about it.
warn() { say "warn  $1" && { [[ -z ${2:-} ]] || say "      $2"; }; }
fail() { say "FAIL  $1" && { [[ -z ${2:-} ]] || say "      $2"; }; }
# fault is a fail that lets the other checks go on.
failed=''
fault() { failed=1 && fail "$@"; }
usage_error() {
	printf 'deploy-with-helm.sh: %s\n' "$*" >&2
	exit 2
}

url='' key='' key_from='' ca='' namespace=kube-system image='' kubeconfig='' context='' timeout=5m dry_run='' skip_url=''
values=() sets=() rest=()

# parse reads the command line. rest collects all of it but the key.
parse() {
	local option value
	while (($#)); do
		option=$1
		shift
		case $option in
		-h | --help) usage && exit 0 ;;
		--dry-run) dry_run=1 rest+=("$option") && continue ;;
		--skip-url-check) skip_url=1 rest+=("$option") && continue ;;
		--*=*)
			set -- "${option#*=}" "$@"
			option=${option%%=*}
			;;
		esac
		(($#)) || usage_error "$option needs a value, or is unknown: see --help"
		value=$1
		shift
		case $option in
		-k | --key) key=$value key_from=-k && continue ;;
		-u | --url) url=${value%/} ;;
		--ca) ca=$value ;;
		-n | --namespace) namespace=$value ;;
		-f | --values) values+=("$value") ;;
		--set) sets+=("$value") ;;
		--image) image=$value ;;
		--kubeconfig) kubeconfig=$value ;;
		--context) context=$value ;;
		--timeout) timeout=$value ;;
		*) usage_error "unknown option $option: see --help" ;;
		esac
		rest+=("$option" "$value")
	done
}

# hide_key starts this script anew with the key on standard input: else it would be in the list of processes as long as
# the script runs. What fails before shows no key either.
hide_key() {
	[[ $key_from == -k && $key != - ]] || return 0
	exec "$BASH" "$self" ${rest[@]+"${rest[@]}"} -k - < <(printf '%s\n' "$key")
}

# read_key finds the key: -k, then the variables in the specification's order. A source that is set and unreadable is an
# error: falling through would use a key nobody meant.
read_key() {
	local name file=''
	if [[ $key == - ]]; then
		key=$(</dev/stdin)
		key_from='standard input'
	else
		for name in HEADSCALE_API_KEY HEADCNI_AUTH_KEY; do
			[[ -z $key_from && ${!name:-} == *[![:space:]]* ]] && key=${!name} key_from=$name
		done
		for name in HEADSCALE_API_KEY_FILE HEADCNI_AUTH_KEY_FILE; do
			[[ -z $key_from && -n ${!name:-} ]] && file=${!name} key_from="$name ($file)"
		done
		if [[ -n $file ]]; then
			[[ -r $file && ! -d $file ]] || usage_error "$key_from cannot be read: write the key into it, mode 0600"
			key=$(<"$file")
		fi
	fi
	key=${key#"${key%%[![:space:]]*}"} key=${key%"${key##*[![:space:]]}"}
	[[ -z $key_from || -n $key ]] || usage_error "the key from $key_from is empty"
	# No key has other characters, and these need no quoting anywhere.
	[[ $key != *[!A-Za-z0-9._~+/=:-]* ]] || usage_error "the key from $key_from is not one word of letters, digits and ._~+/=:-"
}

# kind_of_key says api, preauth, or nothing where it cannot be told: 0.28 gave keys prefixes, before it API keys had a
# dot and pre-auth keys 48 hexadecimal digits.
kind_of_key() {
	case $key in
	hskey-api-*) echo api ;;
	hskey-auth-* | tskey-auth-*) echo preauth ;;
	*.*) echo api ;;
	*) [[ ! $key =~ ^[0-9a-f]{48}$ ]] || echo preauth ;;
	esac
}

# sets_value tells whether the user's values have a key of this name, anywhere.
sets_value() {
	local item line
	for item in ${sets[@]+"${sets[@]}"}; do
		[[ $item =~ (^|[.,{])($1)= ]] && return 0
	done
	for item in ${values[@]+"${values[@]}"}; do
		while IFS= read -r line || [[ -n $line ]]; do
			[[ $line =~ (^|[[:space:]{,\"\'])($1)[\"\']?[[:space:]]*:[[:space:]]*(.*) ]] || continue
			case ${BASH_REMATCH[3]} in '' | '#'* | '""'* | "''"* | '}'* | ','*) ;; *) return 0 ;; esac
		done <"$item"
	done
	return 1
}

check_arguments() {
	local file
	for file in ${values[@]+"${values[@]}"} ${ca:+"$ca"}; do
		[[ -r $file && ! -d $file ]] || usage_error "$file cannot be read"
	done
	[[ -z $ca || $(<"$ca") == *'BEGIN CERTIFICATE'* ]] || usage_error "--ca $ca holds no certificate in PEM (-----BEGIN CERTIFICATE-----)"
	for file in ${sets[@]+"${sets[@]}"}; do
		[[ $file == *=* ]] || usage_error "--set takes KEY=VALUE"
	done
	! sets_value 'authKey|apiKey' ||
		usage_error "--set and -f must not hold the key, which Helm would keep and --set would show: give it by -k -, or HEADSCALE_API_KEY_FILE"
	[[ -n $url ]] || usage_error "-u URL is missing: see --help"
	[[ $url =~ ^https?://(\[[0-9A-Fa-f:]+\]|[A-Za-z0-9.-]+)(:[0-9]{1,5})?(/[A-Za-z0-9._~/-]*)?$ ]] ||
		usage_error "-u $url is not a URL such as https://headscale.example.com"
	case ${BASH_REMATCH[1]} in
	localhost | 127.* | '[::1]') usage_error "-u $url is the node itself on every node: give a name or address that all nodes reach" ;;
	esac
	lasting_url ||
		usage_error "-u $url: tailscaled comes back to an http:// URL only where its host is a private address, written as one: use https://"
	[[ $namespace =~ ^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$ ]] || usage_error "-n $namespace is not a namespace's name"
	[[ $timeout =~ ^(([0-9]+)h)?(([0-9]+)m)?(([0-9]+)s)?$ ]] || usage_error "--timeout $timeout is not a time such as 90s or 5m"
	time_limit=$((10#${BASH_REMATCH[2]:-0} * 3600 + 10#${BASH_REMATCH[4]:-0} * 60 + 10#${BASH_REMATCH[6]:-0}))
	((time_limit > 0)) || usage_error "--timeout must be longer than nothing"
	[[ -z $image || $image == *@sha256:* || ${image##*/} == *?:?* ]] || usage_error "--image $image has no tag: give NAME:TAG"
	if sets_value existingSecret; then
		foreign_secret=1
		[[ -z $key ]] || usage_error "a key and existingSecret were given: leave one of them out"
	fi
}

kube() { kubectl ${kube_flags[@]+"${kube_flags[@]}"} --request-timeout=20s "$@" 3>&-; }
in_namespace() { kube --namespace "$namespace" "$@"; }

# lasting_url holds where tailscaled comes back to: at any other URL it insists on TLS at port 443 after a while.
lasting_url() {
	local byte='(\.[0-9]{1,3})'
	[[ $url != http://* || $url =~ ^http://((127|10)$byte{3}|192\.168$byte{2}|172\.(1[6-9]|2[0-9]|3[01])$byte{2}|\[[fF][cCdD][0-9A-Fa-f]{2}:[0-9A-Fa-f:]*\])(:|/|$) ]]
}

# prepare says how kubectl and helm are to be called.
prepare() {
	local item
	kube_flags=() helm_flags=(--namespace "$namespace")
	[[ -z $kubeconfig ]] || kube_flags+=(--kubeconfig "$kubeconfig") helm_flags+=(--kubeconfig "$kubeconfig")
	[[ -z $context ]] || kube_flags+=(--context "$context") helm_flags+=(--kube-context "$context")
	chart_flags=(--set-string "config.headscale.url=$url")
	# Without this the chart would take over a Secret of an earlier install that was given the key by Helm, and its copy.
	[[ -n $foreign_secret ]] || chart_flags+=(--set-string "existingSecret=$secret")
	[[ -z $ca ]] || chart_flags+=(--set-file "caBundle=$ca")
	for item in ${values[@]+"${values[@]}"}; do
		chart_flags+=(--values "$item")
	done
	for item in ${sets[@]+"${sets[@]}"}; do
		chart_flags+=(--set "$item")
	done
	case $image in
	'') ;;
	*@*) chart_flags+=(--set-string "image.repository=${image%@*}" --set-string "image.digest=${image#*@}") ;;
	*) chart_flags+=(--set-string "image.repository=${image%:*}" --set-string "image.tag=${image##*:}") ;;
	esac
}

check_tools() {
	local version=missing
	! type -P helm >/dev/null || version=$(helm version --short 2>/dev/null) || version='of an unknown version'
	if [[ $version =~ ^v?([0-9]+)\. ]] && ((BASH_REMATCH[1] >= 3)); then
		ok "helm $version"
	else
		fault "helm is $version" "install Helm 3 or later: https://helm.sh/docs/intro/install/"
	fi
	[[ -n $dry_run ]] || type -P kubectl >/dev/null ||
		fault "kubectl is missing" "install it: https://kubernetes.io/docs/tasks/tools/ (K3s: ln -s /usr/local/bin/k3s /usr/local/bin/kubectl)"
	[[ -r $chart/Chart.yaml ]] || fault "there is no chart in $chart" "run the script from HeadCNI's source, which has chart/ beside it"
	[[ -z $failed ]] || exit 1
}

# check_url asks URL for the key that every control server shows to its clients. Headscale shows it to none that it takes
# for too old; no client has version 1000 yet.
check_url() {
	local answer status=0
	[[ -z $skip_url ]] || return 0
	if ! type -P curl >/dev/null; then
		warn "curl is missing, so $url was not tried"
		return
	fi
	curl=(curl --silent --max-time 15 ${ca:+--cacert "$ca"})
	answer=$("${curl[@]}" --show-error "$url/key?v=1000" 2>&1 3>&-) || status=$?
	[[ $status == 0 ]] || answer=${answer%%$'\n'*} answer=${answer##*) } # of several lines curl's first says it
	case $status:$answer in
	0:*publicKey*) ok "$url answers" && check_key ;;
	0:*) fault "$url answers, but is no Headscale" "-u takes the server_url of Headscale's configuration, without a path" ;;
	60:*) fault "$url has a certificate that is not trusted: $answer" \
		"give its authority's by --ca FILE; or --skip-url-check where the image and the nodes trust it all the same" ;;
	*) fault "$url does not answer: $answer" "check -u; or --skip-url-check where only the nodes reach it" ;;
	esac
}

# check_key asks Headscale whether the key is one for its API. curl reads the key from a pipe.
check_key() {
	local code
	[[ -n $key && $kind != preauth ]] || return 0
	code=$(printf 'header = "Authorization: Bearer %s"\n' "$key" |
		"${curl[@]}" --config - --output /dev/null --write-out '%{http_code}' "$url/api/v1/apikey" 3>&-) || true
	case $code:$kind in
	200:*) kind=api && ok "Headscale takes the API key" ;;
	401:api | 403:api) fault "Headscale refuses the API key" "make another one: headscale apikeys create" ;;
	401: | 403:) kind=preauth ;;
	*) warn "Headscale's API answers with status $code" ;;
	esac
}

check_cluster() {
	local version right name owner
	name=${context:-$(kube config current-context 2>/dev/null)} || true
	if ! version=$(kube get --raw /version 2>&1); then
		fail "the cluster${name:+ of context $name} does not answer: ${version##*$'\n'}" \
			"check --kubeconfig, --context or KUBECONFIG; on K3s: export KUBECONFIG=/etc/rancher/k3s/k3s.yaml"
		exit 1
	fi
	[[ $version =~ \"gitVersion\":[[:space:]]*\"([^\"]*)\" ]] && version=${BASH_REMATCH[1]}
	ok "the cluster${name:+ of context $name} answers: Kubernetes $version"
	for right in "create daemonsets.apps -n $namespace" "create secrets -n $namespace" "create clusterrolebindings.rbac.authorization.k8s.io" \
		"escalate clusterroles.rbac.authorization.k8s.io" "list nodes"; do
		# shellcheck disable=SC2086 # words of a command
		kube auth can-i --quiet $right >/dev/null 2>&1 || fault "you may not $right" "use a kubeconfig with the rights of cluster-admin"
	done
	owner=$(kube get clusterrole headcni --ignore-not-found -o 'jsonpath={.metadata.annotations.meta\.helm\.sh/release-name} -n {.metadata.annotations.meta\.helm\.sh/release-namespace}' 2>/dev/null) || true
	case $owner in
	'' | ' -n ') ;;
	*" -n $namespace") release=${owner%% *} ;;
	*) fault "HeadCNI is in this cluster already: helm status $owner" "upgrade it: -n ${owner##* }; or take it off first: helm uninstall $owner" ;;
	esac
	if ! kube get namespace "$namespace" >/dev/null 2>&1; then
		ok "the namespace $namespace will be made"
		new_namespace=1
	fi
	[[ -n $key$foreign_secret || -n $(in_namespace get secret "$secret" --ignore-not-found -o 'jsonpath={.data.api-key}' 2>/dev/null) ]] ||
		fault "no key was given, and the cluster has none" "give one: -k -, or HEADSCALE_API_KEY_FILE"
}

# read_nodes lists the nodes of ours, with Ready, pod CIDRs, the controller's view and a trace of flannel of each.
declare -A node_ready node_cidrs node_view node_flannel
selector=kubernetes.io/os=linux
read_nodes() {
	local all name ready cidrs view flannel
	all=$(kube get nodes --selector "$selector" -o "jsonpath={range .items[*]}{.metadata.name}|{.status.conditions[?(@.type=='Ready')].status}|{.spec.podCIDRs[*]}|{.metadata.annotations.headcni\.io/headscale}|{.metadata.annotations.flannel\.alpha\.coreos\.com/backend-type}{'\n'}{end}") || return 1
	nodes=()
	while IFS='|' read -r name ready cidrs view flannel; do
		[[ -n $name ]] || continue
		nodes+=("$name")
		node_ready[$name]=$ready node_cidrs[$name]=$cidrs node_view[$name]=$view node_flannel[$name]=$flannel
	done <<<"$all"
}

# check_nodes warns of other pod networks and of nodes without pod CIDRs.
check_nodes() {
	local name other='' none=''
	read_nodes
	if ((${#nodes[@]} == 0)); then
		fail "the cluster has no Linux nodes" "let one join"
		exit 1
	fi
	ok "${#nodes[@]} node(s)"
	for name in "${nodes[@]}"; do
		[[ -n ${node_cidrs[$name]} ]] || none+=" $name"
		[[ -z ${node_flannel[$name]} ]] || other+=" flannel on $name,"
	done
	while read -r name; do
		case ${name#*/} in
		*flannel* | calico-node | canal | rke2-canal | cilium | weave-net | kindnet | antrea-agent | kube-router | aws-node | \
			azure-cns | ovnkube-node | kube-ovn-cni | netd) other+=" $name," ;;
		esac
	done < <(kube get daemonsets --all-namespaces -o 'jsonpath={range .items[*]}{.metadata.namespace}/{.metadata.name}{"\n"}{end}')
	[[ -z $other ]] || warn "another pod network is here:${other%,}" "take it off first, or have the nodes prefer ours: --set config.cni.exclusive=true"
	if [[ -n $none ]] && ! sets_value clusterCIDRs; then
		warn "without pod CIDRs:$none" "start kube-controller-manager with --allocate-node-cidrs and --cluster-cidr, or give the pool: --set 'config.network.clusterCIDRs={10.244.0.0/16}'"
	fi
	# Its snap has folders of its own, and a pod cannot find that out.
	if [[ -n $(kube get nodes --selector microk8s.io/cluster=true -o name) ]] && ! sets_value 'binDir|confDir'; then
		chart_flags+=(--set config.cni.binDir=/var/snap/microk8s/current/opt/cni/bin --set config.cni.confDir=/var/snap/microk8s/current/args/cni-network)
	fi
}

# secret_manifest prints the Secret with a key in base64. printf is the shell's own; a here-document would be a file in
# bash before 5.1. The annotation: an earlier release may own the Secret, and would take it along.
secret_manifest() {
	printf '%s\n' 'apiVersion: v1' 'kind: Secret' 'metadata:' "  name: $secret" "  namespace: $namespace" \
		'  annotations:' '    helm.sh/resource-policy: keep' 'type: Opaque' 'data:' "  api-key: $1"
}

# put_secret brings the key into the cluster. Applied by the server, because else kubectl leaves a second copy in an
# annotation. rekeyed says that it replaced another key.
put_secret() {
	local before version=(get secret "$secret" --ignore-not-found -o 'jsonpath={.metadata.resourceVersion}')
	if [[ -n $new_namespace ]]; then
		# Its pods use the host's network.
		kube apply --filename - >/dev/null <<YAML
apiVersion: v1
kind: Namespace
metadata:
  name: $namespace
  labels:
    pod-security.kubernetes.io/enforce: privileged
YAML
	fi
	if [[ -z $key ]]; then
		ok "the key in the cluster stays"
		return
	fi
	before=$(in_namespace "${version[@]}")
	secret_manifest "$(printf '%s' "$key" | base64 | tr -d '\n')" |
		in_namespace apply --server-side --force-conflicts --field-manager headcni-deploy --filename - >/dev/null
	[[ -z $before || $before == "$(in_namespace "${version[@]}")" ]] || rekeyed=1
	ok "the key from $key_from is in the Secret $namespace/$secret"
}

# Programs that take long are started in the background, so that a signal is answered at once, and files are gone with the
# script.
scratch='' child='' tested='' installing=''
cleanup() {
	trap '' INT TERM HUP
	if [[ -n $child ]]; then
		kill "$child" 2>/dev/null || true # helm notes in the release that it was interrupted
		wait "$child" 2>/dev/null || true
	fi
	[[ -z $tested ]] || remove_test
	[[ -z $scratch ]] || rm -rf "$scratch"
}
interrupted() {
	say "Interrupted${installing:+; HeadCNI may be installed in part}. Run this again to go on${installing:+, or take it off: $removal}" || true # the terminal may be gone
	exit "$1"
}

# logged runs a command, its output in a file, and returns what it does. The name of the file comes first.
logged() {
	local file=$scratch/$1 status=0
	shift
	"$@" >"$file" 2>&1 3>&- &
	child=$!
	wait "$child" || status=$?
	child=''
	return "$status"
}

install_chart() {
	local line
	say "wait  helm upgrade --install $release"
	removal="helm uninstall $release -n $namespace" installing=1
	if ! logged helm helm upgrade --install "$release" "$chart" "${helm_flags[@]}" "${chart_flags[@]}" --timeout "${time_limit}s"; then
		fail "helm upgrade --install $release:"
		while IFS= read -r line; do
			say "      ${line:0:1000}" # it may hold whole objects
		done <"$scratch/helm"
		if grep -q 'another operation' "$scratch/helm"; then
			say "      An earlier run was cut off. Take it back: helm rollback $release -n $namespace, or for the first install: $removal"
		fi
		exit 1
	fi
	[[ -z $rekeyed ]] || in_namespace rollout restart deployment/headcni-controller >/dev/null
	# Pods of an earlier run look for their image at once: kubelet would for up to five minutes not.
	# shellcheck disable=SC2046 # names of pods
	[[ -z $(imageless) ]] || in_namespace delete pod --wait=false $(imageless) >/dev/null 2>&1 || true
	ok "the chart is installed"
	# shellcheck disable=SC2016 # variables of the template
	selector=$(in_namespace get daemonset headcni -o 'go-template={{range $k, $v := .spec.template.spec.nodeSelector}}{{$k}}={{$v}},{{end}}')
	selector=${selector%,}
}

# The functions that wait_for calls print what is missing, one a line.

workloads() {
	local all kind name generation seen want ready updated
	all=$(in_namespace get daemonset/headcni daemonset/headcni-tailscaled deployment/headcni-controller --ignore-not-found -o 'jsonpath={range .items[*]}{.kind}|{.metadata.name}|{.metadata.generation}|{.status.observedGeneration}|{.status.desiredNumberScheduled}{.spec.replicas}|{.status.numberReady}{.status.readyReplicas}|{.status.updatedNumberScheduled}{.status.updatedReplicas}{"\n"}{end}') || return 1
	[[ $all == *DaemonSet* && $all == *Deployment* ]] || echo 'not made yet'
	while IFS='|' read -r kind name generation seen want ready updated; do
		# tailscaled's pods are replaced when their node's administrator says so.
		[[ $name != headcni-tailscaled ]] || updated=$want
		if [[ $generation != "$seen" || -z $want || ${ready:-0} -lt $want || ${updated:-0} -lt $want ]]; then
			echo "$kind $name (${ready:-0} of ${want:-?} ready)"
		fi
	done <<<"$all"
}

# unrouted: with a pre-auth key the controller can see nothing. Then the pods have to tell.
unrouted() {
	local name state
	read_nodes || return 1
	for name in "${nodes[@]}"; do
		state=$(field_of state "${node_view[$name]}")
		[[ $state == routed || ($kind != api && $state == unseen) ]] || echo "$name"
	done
}

unready() {
	local name
	read_nodes || return 1
	for name in "${nodes[@]}"; do
		[[ ${node_ready[$name]} == True ]] || echo "$name"
	done
}

# field_of prints a text field of the JSON in an annotation.
field_of() {
	local pattern="\"$1\":\"(([^\"\\\\]|\\\\.)*)\""
	[[ $2 =~ $pattern ]] || return 0
	local text=${BASH_REMATCH[1]//\\\"/\"}
	printf '%s' "${text//\\n/ }"
}

# imageless prints the pods whose image their node cannot get.
imageless() {
	local pod reasons
	while IFS='|' read -r pod reasons; do
		[[ ! $reasons =~ ImagePullBackOff|InvalidImageName|ErrImageNeverPull ]] || printf '%s\n' "$pod"
	done < <(in_namespace get pods -l app.kubernetes.io/name=headcni -o 'jsonpath={range .items[*]}{.metadata.name}|{.status.initContainerStatuses[*].state.waiting.reason} {.status.containerStatuses[*].state.waiting.reason}{"\n"}{end}' 2>/dev/null)
}

# wait_for runs a function until it finds nothing missing, and says $2 then; $3 with what is missing else.
wait_for() {
	local missing before='' imageless_since=''
	while :; do
		missing=$("$1") || missing='the API server'
		[[ -n $missing ]] || break
		missing="$3: ${missing//$'\n'/, }"
		if ((SECONDS >= deadline)); then
			fail "$missing"
			return 1
		fi
		if [[ $1 == workloads && -n $(imageless) ]]; then
			: "${imageless_since:=$SECONDS}" # waiting longer does not help
			if ((SECONDS - imageless_since >= 10)); then
				fail "nodes cannot get the image"
				no_image=1
				return 1
			fi
		fi
		[[ $missing == "$before" ]] || say "wait  $missing"
		before=$missing
		sleep 2
	done
	ok "$2"
}

# remove_test takes away what `helm test` left: its pod, and after a failure all of it.
remove_test() {
	tested=''
	in_namespace delete --ignore-not-found --wait=false pod/headcni-test daemonset/headcni-test serviceaccount/headcni-test \
		role/headcni-test rolebinding/headcni-test >/dev/null 2>&1 || true
}

# try_pods has the chart start a pod on every node, and another ask all of them by their addresses.
try_pods() {
	local left=$((deadline - SECONDS)) line
	((left > 30)) || left=30
	say "wait  pods on all nodes answer"
	tested=1
	if logged test helm test "$release" "${helm_flags[@]}" --timeout "${left}s"; then
		remove_test
		ok "a pod on every node answers another pod"
		return
	fi
	fail "not every pod answers:"
	while IFS= read -r line; do
		say "      $line"
	done < <(in_namespace logs pod/headcni-test --tail=20 2>/dev/null || tail -n 3 "$scratch/test")
	while read -r line; do
		say "      on $line the pod has not started"
	done < <(in_namespace get pods -l headcni.io/test=answer -o 'jsonpath={range .items[?(@.status.phase!="Running")]}{.spec.nodeName}{"\n"}{end}' 2>/dev/null)
	return 1
}

# pods_of prints the names of a component's pods.
pods_of() {
	in_namespace get pods -l "app.kubernetes.io/name=headcni,app.kubernetes.io/component=$1" "${@:2}" -o 'jsonpath={.items[*].metadata.name}' 2>/dev/null || true
}

# report says of each node what is not as it should be.
report() {
	local name pod line view
	read_nodes || true
	for name in "${nodes[@]}"; do
		view=${node_view[$name]}
		say ""
		say "node $name: Ready is ${node_ready[$name]:-unknown}; pod CIDRs: ${node_cidrs[$name]:-none}; Headscale: $(field_of state "$view")${view:+. }$(field_of message "$view")"
		[[ -n $view ]] || say "  nothing yet from the controller about it"
		pod=$(pods_of daemon --field-selector "spec.nodeName=$name")
		pod=${pod%% *}
		if [[ -z $pod ]]; then
			say "  no pod of DaemonSet headcni"
		else
			while read -r line; do
				[[ $line != *' '* ]] || say "  $pod: $line"
			done < <(in_namespace get pod "$pod" -o 'jsonpath={range .status.initContainerStatuses[*]}{.name} {.state.waiting.reason} {.state.waiting.message}{"\n"}{end}{range .status.containerStatuses[*]}{.name} {.state.waiting.reason} {.state.waiting.message}{"\n"}{end}' 2>/dev/null)
			line=$(in_namespace logs "$pod" -c headcni-daemon --tail=1 2>/dev/null) || true
			[[ -z $line ]] || say "  last log line: $line"
		fi
		print_events "involvedObject.kind=Node,involvedObject.name=$name"
	done
	say ""
	say "controller:"
	for pod in $(pods_of controller); do
		line=$(in_namespace logs "$pod" --tail=1 2>/dev/null) || true
		say "  $pod: ${line:-no log}"
	done
	print_events involvedObject.kind!=Node
}

# print_events prints our warnings about something, but those that a later event takes back: what is before the colon says
# what they are about.
print_events() {
	local reporter reason message subject
	local -A open=()
	while IFS='|' read -r reporter reason message; do
		[[ $reporter == headcni.io/* && -n $message ]] || continue
		open[${message%%:*}]="$reason: $message"
		[[ $reason != *Right || $reason == *NotRight ]] || unset "open[${message%%:*}]"
	done < <(kube get events --all-namespaces --field-selector "$1" --sort-by .metadata.creationTimestamp -o 'jsonpath={range .items[*]}{.reportingComponent}|{.reason}|{.message}{"\n"}{end}' 2>/dev/null)
	for subject in "${!open[@]}"; do
		say "  ${open[$subject]}"
	done
}

# quoted prints words as a list in JSON, each with $1 behind it.
quoted() {
	local out='' word
	for word in "${@:2}"; do
		out+="${out:+, }\"$word$1\""
	done
	printf '[%s]' "$out"
}

# policy prints what Headscale's policy must say. Where the cluster's pool is known it stands for the nodes' ranges, so
# that another node needs no change.
policy() {
	local text tags=() ranges=() name approvers='' owners=''
	text=$(in_namespace get configmap headcni-config -o 'jsonpath={.data.daemon\.yaml}' 2>/dev/null) || true
	while [[ $text =~ tag:[a-z0-9-]+ ]]; do
		tags+=("${BASH_REMATCH[0]}")
		text=${text#*"${BASH_REMATCH[0]}"}
	done
	((${#tags[@]})) || tags=(tag:headcni)
	text=$(kube --namespace kube-system get configmap kubeadm-config -o 'jsonpath={.data.ClusterConfiguration}' 2>/dev/null) || true
	if [[ $text =~ podSubnet:[[:space:]]*\"?([0-9A-Fa-f.:/,]+) ]]; then
		IFS=, read -r -a ranges <<<"${BASH_REMATCH[1]}"
	else
		for name in "${nodes[@]}"; do
			# shellcheck disable=SC2206 # prefixes, one or two
			ranges+=(${node_cidrs[$name]})
		done
	fi
	for name in "${tags[@]}"; do
		owners+="${owners:+, }\"$name\": []"
	done
	if [[ $kind != api ]]; then
		for name in ${ranges[@]+"${ranges[@]}"}; do
			approvers+="${approvers:+, }\"$name\": $(quoted '' "${tags[@]}")"
		done
		approvers=$'\n'"  \"autoApprovers\": { \"routes\": { $approvers } },"
	fi
	cat >&3 <<POLICY

Headscale's policy must say this. Add what it lacks (headscale policy get and set, or the file policy.path):

{
  "tagOwners": { $owners },
  "acls": [{
    "action": "accept",
    "src": $(quoted '' "${tags[@]}" ${ranges[@]+"${ranges[@]}"}),
    "dst": $(quoted ':*' "${tags[@]}" ${ranges[@]+"${ranges[@]}"}),
  }],$approvers
  "nodeAttrs": [{ "target": $(quoted '' "${tags[@]}"), "attr": ["cache-network-maps"] }],
}

The ranges are the nodes' pod CIDRs; the range they are cut from (--cluster-cidr) covers new nodes too.
POLICY
}

# give_up ends a deployment that is not whole.
give_up() {
	report
	if [[ -z $no_image ]]; then
		policy
	else
		cat >&3 <<'IMAGE'

No image is published: make one and import it on every node:
  make image; ctr -n k8s.io images import bin/headcni-image-amd64.tar   (K3s: k3s ctr images import ...)
or push it to a registry and give it with --image
IMAGE
	fi
	say ""
	say "Not done. HeadCNI stays installed; run this again when it is put right, or take it off: $removal"
	exit 1
}

# dry prints the manifests, and looks at the cluster where it answers: what the chart makes depends on it.
dry() {
	local look=()
	[[ -n $foreign_secret && -z $key ]] || secret_manifest '"***"'
	if type -P kubectl >/dev/null && kube get --raw /version >/dev/null 2>&1; then
		look=(--validate)
	fi
	helm template "$release" "$chart" "${helm_flags[@]}" "${chart_flags[@]}" ${look[@]+"${look[@]}"} 3>&-
}

main() {
	foreign_secret='' new_namespace='' rekeyed='' kind='' no_image='' nodes=()
	parse "$@"
	export -n HEADSCALE_API_KEY HEADCNI_AUTH_KEY HEADSCALE_API_KEY_FILE HEADCNI_AUTH_KEY_FILE # no program gets them
	hide_key
	exec 3>&1
	[[ -z $dry_run ]] || exec 3>&2
	read_key
	kind=$(kind_of_key)
	check_arguments
	deadline=$((SECONDS + time_limit))
	trap cleanup EXIT
	trap 'interrupted 130' INT
	trap 'interrupted 143' TERM
	trap 'interrupted 129' HUP
	scratch=$(umask 077 && mktemp -d)
	prepare
	check_tools
	if [[ -n $dry_run ]]; then
		dry
		return
	fi
	check_cluster
	check_url
	check_nodes
	[[ -z $failed ]] || exit 1
	put_secret
	install_chart
	wait_for workloads "the daemon and the controller are ready" "not ready" || give_up
	wait_for unrouted "every node's pod range is routed" "not routed yet" || give_up
	wait_for unready "every node is Ready" "nodes not Ready" || give_up
	try_pods || give_up
	[[ $kind != preauth ]] || warn "with a pre-auth key any tagged node may announce any pod range that the policy approves" "an API key lets the controller approve exactly each node's own"
	say "done  HeadCNI runs in namespace $namespace. Its end: $removal; kubectl -n $namespace delete secret $secret"
}

main "$@"
