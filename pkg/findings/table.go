package findings

// Ids. One that is not used any more is not given to anything else.
const (
	ConfigUnusable    ID = "HC101"
	RangeOverlapsHost ID = "HC102"
	RangeTaken        ID = "HC103"
	NoPodCIDR         ID = "HC104"
	RangeOutside      ID = "HC105"
	FirewallRules     ID = "HC106"
	RoutingRules      ID = "HC107"
	Links             ID = "HC108"
	PodLinks          ID = "HC109"
	Conflist          ID = "HC110"
	OtherCNI          ID = "HC111"
	PluginMissing     ID = "HC112"
	RuntimeElsewhere  ID = "HC113"
	StateNotKept      ID = "HC114"
	GuardFails        ID = "HC115"
	ForeignFirewall   ID = "HC116"
	TakenBack         ID = "HC117"
	HostInTailnet     ID = "HC118"
	APIServer         ID = "HC119"
	NoDaemonPod       ID = "HC120"
	DaemonSilent      ID = "HC121"
	VersionsDiffer    ID = "HC122"
	NotReady          ID = "HC123"
	NodeRangesOverlap ID = "HC124"
	NoRangesLeft      ID = "HC125"
	ControllerSilent  ID = "HC126"
	GuardDropped      ID = "HC127"
	RuleAhead         ID = "HC128"
	PoolFull          ID = "HC129"
	NotRoot           ID = "HC131"
	NoNFT             ID = "HC132"
	NoTunDevice       ID = "HC133"
	KernelLacks       ID = "HC134"
	PortInUse         ID = "HC135"
	PodNoLink         ID = "HC136"
	PodLinkDown       ID = "HC137"
	NoLease           ID = "HC138"
	ConntrackFull     ID = "HC139"
	NamedAsPods       ID = "HC140"

	NotApproved         ID = "HC201"
	ApprovalUnseen      ID = "HC202"
	RoutedElsewhere     ID = "HC203"
	ApprovalRefused     ID = "HC204"
	NotInTailnet        ID = "HC210"
	TailscaledSilent    ID = "HC211"
	TailscaledStopped   ID = "HC212"
	JoinKeyRefused      ID = "HC213"
	NoKey               ID = "HC214"
	OtherControl        ID = "HC215"
	Prefs               ID = "HC216"
	NoTunnelDevice      ID = "HC217"
	TwoTailscaleds      ID = "HC218"
	ShieldsUp           ID = "HC219"
	HeadscaleUnreached  ID = "HC220"
	APIKeyRefused       ID = "HC221"
	APIKeyEnds          ID = "HC222"
	NodeKeyEnds         ID = "HC223"
	ClocksApart         ID = "HC224"
	NodeUnknown         ID = "HC225"
	URLNotLasting       ID = "HC226"
	KeyExposed          ID = "HC227"
	NotHeadscale        ID = "HC228"
	HeadscaleCert       ID = "HC229"
	RemovalsHeld        ID = "HC230"
	ForeignClaims       ID = "HC231"
	TailscaledUnwell    ID = "HC232"
	HeadscaleOther      ID = "HC233"
	HeadscaleUntried    ID = "HC234"
	TailscaledState     ID = "HC235"
	FamilyLacking       ID = "HC236"
	TailnetElsewhere    ID = "HC237"
	OtherMachine        ID = "HC238"
	PolicyLacksRanges   ID = "HC301"
	PolicyAutoApprovers ID = "HC302"
	PolicyLacksMaps     ID = "HC303"
	PolicyLacksCGNAT    ID = "HC304"
	PolicyRefuses       ID = "HC305"

	PeerRelayed   ID = "HC401"
	PathSmall     ID = "HC402"
	PeerOffline   ID = "HC403"
	TunnelRoutes  ID = "HC404"
	StrangeRoutes ID = "HC405"
	PeerSilent    ID = "HC406"
	NobodyListens ID = "HC407"
	HardNAT       ID = "HC408"
	UDPBlocked    ID = "HC409"
	RouterAnswers ID = "HC410"
	Lost          ID = "HC411"
	OffloadsOff   ID = "HC412"

	NameServer   ID = "HC501"
	NamesCircle  ID = "HC502"
	ResolverFar  ID = "HC503"
	NamesRisk    ID = "HC504"
	ClusterDNS   ID = "HC505"
	PolicyNot    ID = "HC601"
	PolicyWaits  ID = "HC602"
	PolicyStale  ID = "HC603"
	Subnets      ID = "HC604"
	PolicyDenies ID = "HC605"
	SubnetDenied ID = "HC606"
	EgressDenied ID = "HC607"

	ServicesNotHere ID = "HC701"
	ServicesNowhere ID = "HC702"

	TestPods     ID = "HC801"
	PodToPod     ID = "HC802"
	PacketSizes  ID = "HC803"
	ServicesFail ID = "HC804"
	NamesFail    ID = "HC805"
	PortsFail    ID = "HC806"
	EgressFails  ID = "HC807"
	PoliciesFail ID = "HC808"
	TailnetToPod ID = "HC809"
	Interrupted  ID = "HC810"

	Contradiction ID = "HC900"
)

// Table holds every finding, in the order of ids.
var Table = []Finding{
	{ConfigUnusable, Fail, "the configuration cannot work on this node",
		"What daemon.yaml, the environment and Kubernetes say together cannot be put in force here. Nothing of it was applied; what was in force before goes on.",
		"change what the text names, and check it with `headcni-daemon config validate`."},
	{RangeOverlapsHost, Fail, "a pod range overlaps a network of the host",
		"An interface of the node has an address inside a pod range, so that one of the two networks could not be reached. Pod ranges, the nodes' LANs and the services' ranges must not overlap.",
		"`ip -br addr` shows the host's networks. Choose other pod ranges: network.podCIDRs and network.clusterCIDRs, in Kubernetes kube-controller-manager's --cluster-cidr."},
	{RangeTaken, Fail, "another node has this pod range",
		"Two nodes say that a range of pods is theirs. Both pods' packets would go to one of them, so the second node does not use it.",
		"give each node a range of its own (network.podCIDRs); in Kubernetes delete the Node that came second and let kubelet register it anew. `headscale nodes list-routes` shows who advertises what."},
	{NoPodCIDR, Fail, "the node has no pod range",
		"Nobody has given the Node pod CIDRs, or the API server cannot be asked for them.",
		"`kubectl get nodes -o custom-columns=NAME:.metadata.name,CIDRS:.spec.podCIDRs`. Start kube-controller-manager with --allocate-node-cidrs and --cluster-cidr, or set network.clusterCIDRs and let headcni-controller do it. Without Kubernetes set network.podCIDRs."},
	{RangeOutside, Fail, "the node's pod range is outside the cluster's",
		"Other nodes let only network.clusterCIDRs through as pods, and drop the packets of this node's.",
		"give the node a range inside network.clusterCIDRs, or add its range to network.clusterCIDRs on every node (Helm: config.network.clusterCIDRs)."},
	{FirewallRules, Fail, "the node's nftables could not be written",
		"The tables headcni keep pods' packets from leaving in clear. Without them nothing else is set up.",
		"`nft list tables` as root says whether nft works here; nftables 1.0.1 or later and a kernel with nf_tables are needed."},
	{RoutingRules, Fail, "the node's rules and routes could not be written",
		"Rules 5185 to 5197 and the unreachable routes lead pods' packets into the tunnel or nowhere.",
		"compare `ip rule` and `ip route show table all` with docs/architecture.md, and end what removes them (the daemon puts them back)."},
	{Links, Fail, "the tunnel or a link of the node is not as it must be",
		"The tunnel is down, lacks its addresses, or a link does not forward packets.",
		"`ip -d link` and `sysctl net.ipv4.conf.all.forwarding` on the node; restart tailscaled where the tunnel lacks its addresses."},
	{PodLinks, Warn, "a pod's link is not as it must be",
		"Somebody has changed the host's end of a pod's link, or its address is outside the node's ranges. Only this pod is concerned.",
		"delete the pod, so that it is started anew."},
	{Conflist, Fail, "the CNI configuration could not be written",
		"Without the conflist the container runtime starts no pods here.",
		"see that cni.confDir is the runtime's folder and can be written (`df`, `mount`)."},
	{OtherCNI, Fail, "another CNI's configuration comes first",
		"The runtime uses the first file of its folder, which is not HeadCNI's: new pods get the other CNI's network.",
		"uninstall the other CNI and remove its file, or set cni.exclusive: true (Helm: config.cni.exclusive)."},
	{PluginMissing, Fail, "the CNI plugin is not on the node",
		"The conflist would name a program that is not in cni.binDir: HeadCNI's own, or one of an IPAM plugin or of a mesh that added itself to the list.",
		"run `headcni-daemon install`, or set cni.binDir to the runtime's folder; in Kubernetes delete the daemon's pod, whose first container copies it."},
	{RuntimeElsewhere, Fail, "the container runtime does not use the conflist",
		"kubelet still sees no network plugin although the conflist stands: the runtime looks in other folders.",
		"set cni.confDir and cni.binDir to the runtime's own; the text lists them for the distributions that seem to run here."},
	{StateNotKept, Warn, "the daemon cannot keep its state",
		"The disk is full or read-only. What runs goes on, but a start from here on knows less.",
		"make room on the file system of /var/lib/headcni, or make it writable."},
	{GuardFails, Fail, "the guard against packets in clear does not work with this kernel",
		"The self-test sent packets in clear in a namespace of its own, and not all of them were stopped and counted.",
		"run `headcni-daemon check` and send its output with `headcnictl sysdump`; use another kernel meanwhile."},
	{ForeignFirewall, Fail, "another program's firewall drops pods' packets",
		"An accept in HeadCNI's tables cannot overrule a drop in another.",
		"let hc* and the tunnel pass there; with firewalld: `firewall-cmd --permanent --zone=trusted --add-interface=hc+ --add-interface=headcni01 && firewall-cmd --reload`."},
	{TakenBack, Fail, "the routes were taken back, since they cut the node off",
		"With HeadCNI's routes the node could not reach Headscale or the API server, without them it could.",
		"find the peer that advertises a prefix of theirs (`headscale nodes list-routes`), set network.lanFirst: true or change the ranges; a changed configuration is tried again."},
	{HostInTailnet, Warn, "a network of the host is in the tailnet's range",
		"The host has addresses in 100.64.0.0/10 beside the tailnet's. tailscaled's firewall drops what the host itself gets from there.",
		"add `\"nodeAttrs\": [{\"target\": [\"*\"], \"attr\": [\"disable-linux-cgnat-drop-rule\"]}]` to Headscale's policy, and keep Headscale's prefixes.v4 clear of that network."},
	{APIServer, Warn, "the node cannot ask or write to the API server",
		"The API server does not answer this node, or refuses it. What runs goes on and new pods start; changes are not learned.",
		"`kubectl -n kube-system auth can-i patch nodes --as system:serviceaccount:kube-system:headcni`; see that the node reaches the API server, and that the chart's ClusterRole is there."},
	{NoDaemonPod, Fail, "the node has no daemon",
		"No pod of the DaemonSet headcni runs on the node: nothing keeps its network right, and a new node has none.",
		"`kubectl -n kube-system describe daemonset headcni`: taints, a nodeSelector or a missing image keep it away."},
	{DaemonSilent, Fail, "the node's daemon does not answer",
		"The daemon's pod does not run, or the node cannot be reached. Pods that run keep their network.",
		"`kubectl -n kube-system get pods -o wide -l app.kubernetes.io/component=daemon` and the pod's log; without Kubernetes `systemctl status headcni-daemon`."},
	{VersionsDiffer, Warn, "nodes run different versions",
		"An upgrade is under way, or stopped half-way.",
		"`kubectl -n kube-system rollout status daemonset headcni`."},
	{NotReady, Fail, "the node is not ready",
		"The daemon runs and says that a part is not as it should be yet; right after its start it has not tried all parts.",
		"wait a minute (`headcnictl status --wait`), then see `headcni-daemon status` on the node."},
	{NodeRangesOverlap, Fail, "two Nodes' pod ranges overlap",
		"Node.spec.podCIDRs of two Nodes have addresses in common; so one of them gets no packets.",
		"delete the Node that came second and let kubelet register it anew."},
	{NoRangesLeft, Fail, "no pod range is left to give to Nodes",
		"network.clusterCIDRs holds fewer ranges than the cluster has Nodes, or another program gives Nodes theirs.",
		"make network.clusterCIDRs wider (Helm: config.network.clusterCIDRs)."},
	{ControllerSilent, Warn, "headcni-controller does not answer",
		"No pod of the controller leads or answers. What runs goes on; new nodes are not approved and no join key is made.",
		"`kubectl -n kube-system get pods -l app.kubernetes.io/component=controller` and their log."},
	{GuardDropped, Warn, "the guard has dropped packets that nobody should send",
		"A packet for a pod or the tailnet was about to leave in clear, or came with an address that is not its sender's. It was stopped.",
		"`nft list counters table ip headcni` names the reason; docs/security.md says what each means. A few while tailscaled starts are usual."},
	{RuleAhead, Fail, "another program's routing rule stands before HeadCNI's",
		"A rule of a smaller number than 5186 leads elsewhere what pods send to pods of other nodes, or what the node sends to its own pods (a kubelet's probes, all answers): a VPN's, such as " +
			"wg-quick's or NetBird's, one for a host with several uplinks, or one that somebody made by hand.",
		"`ip rule` and `ip -6 rule` on the node: take it away (`ip rule del pref NUMBER`), or give it a number above 5197 where it is meant for other packets. Where it has to stay, lead pods' packets " +
			"past it, by two smaller numbers: `ip rule add pref NUMBER to RANGE lookup main` with the node's own range, and then `ip rule add pref NUMBER to RANGE lookup 52` with the cluster's."},
	{PoolFull, Warn, "no address is left for new pods", "Every address of the node's pod range is leased, or rests. Pods that run are not concerned; new ones wait for an address.",
		"`sudo headcnictl ipam list` says who has them, `headcnictl ipam check` whether pods that are gone still do (`ipam gc` frees them); else put fewer pods on the node, or give it a larger range."},
	{NotRoot, Fail, "this needs root", "Rules, routes, nftables and the daemon's socket are root's.", "run it with sudo, or in the daemon's pod."},
	{NoNFT, Fail, "nft is missing or too old", "The node's tables are written by the nft program, 1.0.1 or later.", "install nftables (`apt-get install nftables`, `dnf install nftables`); the image has its own."},
	{NoTunDevice, Fail, "/dev/net/tun cannot be opened", "tailscaled carries pods' packets by a tun device.", "`modprobe tun`; in a container mount /dev/net/tun and allow the device c 10:200."},
	{KernelLacks, Fail, "the kernel lacks what is needed", "Pods' links are veths, and the node's rules need nf_tables with NAT. The kernel loads what it has as a module by itself, unless that is forbidden or the module is not there.",
		"`modprobe` of a module that the text names says what keeps it away: a line of /etc/modprobe.d, or a package that is not installed, such as kernel-modules-core or linux-modules-extra; else use another kernel."},
	{PortInUse, Warn, "a port is in use", "Another program listens where HeadCNI would.", "end that program, or choose another port: monitoring.listen, tailscale.port."},

	{PodNoLink, Fail, "no pod of the node has the address",
		"The pod has no link on its node, or it is gone, or has no address yet: the CNI plugin did not attach it, or somebody deleted its link.",
		"`kubectl describe pod` says whether it waits for its network; delete the pod, so that it is started anew."},
	{PodLinkDown, Fail, "the pod's link is down",
		"Somebody, in the pod or on its node, has taken one end of the link down, or renamed or removed the pod's interface: nothing gets in or out.",
		"in the pod's network namespace `ip link set eth0 up`, on the node `ip link set LINK up`; or delete the pod, so that it is started anew."},
	{NoLease, Warn, "a pod's address has no lease",
		"The pod has the address, and headcni-ipam does not know that: another pod could be given it.",
		"`sudo headcnictl ipam check --repair` on the node, or delete the pod, so that it is started anew."},

	{ConntrackFull, Fail, "the kernel's table of connections is full, or nearly",
		"The node follows as many connections as it may (`net.netfilter.nf_conntrack_max`). Those that there are go on; a packet that begins one is dropped, whoever sends it, and nobody is told but the kernel's log (`nf_conntrack: table full, dropping packet`).",
		"allow more, by `sysctl -w net.netfilter.nf_conntrack_max=NUMBER` now and a file in /etc/sysctl.d for the next boot (a connection takes some 300 bytes); kube-proxy sets it at each start, by `conntrack.min` and `conntrack.maxPerCore`. `conntrack -L -o extended` shows whose they are."},
	{NamedAsPods, Fail, "a link of the host's is named as pods' links are",
		"HeadCNI knows pods' links by their names, which begin with hc. A network card, a VLAN or a VPN of such a name counts as one: what pods send by it keeps their own address, the guard lets it out, and IPv6 finds no neighbours there.",
		"give it another name, at once by `ip link set dev NAME down` and `ip link set dev NAME name OTHER`, and for the next boot where it has its name from: a .link file of systemd's, set-name of netplan's, the VPN's configuration."},

	{NotApproved, Fail, "the node's routes are advertised and not approved",
		"Headscale routes a node's pod range to it only once that is approved. Until then other nodes' pods do not reach this node's.",
		"give headcni-controller (without Kubernetes the daemon) an API key, which approves by itself, or run `headscale nodes approve-routes`; `headscale nodes list-routes` shows how it stands."},
	{ApprovalUnseen, Warn, "nobody here can see whether the routes are approved",
		"With a pre-auth key the node can neither see nor approve routes. They may be approved by autoApprovers.",
		"see `headscale nodes list-routes`; give the daemon an API key to have it done and seen."},
	{RoutedElsewhere, Fail, "the routes are approved and not routed to this node",
		"Another node advertises them too and came first, or Headscale 0.27 or 0.28 remembers a deleted node.",
		"`headscale nodes list-routes`; remove the range from the other node, or restart Headscale where no other node has it."},
	{ApprovalRefused, Fail, "headcni-controller does not approve the routes",
		"The range is outside the cluster's, belongs to another Node, or two Nodes claim one key.",
		"change what the text names; `kubectl -n kube-system logs deploy/headcni-controller` says more."},
	{NotInTailnet, Fail, "the node is not in the tailnet",
		"tailscaled is not logged in, or has not come up yet.",
		"see the text; `headcnictl key joined` lists keys, `journalctl -u headcni-tailscaled` or the tailscaled container's log the tries to join."},
	{TailscaledSilent, Fail, "tailscaled does not answer",
		"The process that carries the tailnet is not running or its socket is gone. Pods reach pods of their own node only; nothing leaves in clear.",
		"in daemon mode `systemctl start headcni-tailscaled` (Kubernetes: the DaemonSet headcni-tailscaled), in host mode `systemctl start tailscaled`."},
	{TailscaledStopped, Fail, "tailscaled is stopped",
		"Somebody ran `tailscale down` on the host. HeadCNI does not undo that.",
		"`tailscale up` on the node."},
	{JoinKeyRefused, Fail, "Headscale refuses the key to join with",
		"The pre-auth key has ended, was used before, or belongs to another server or user.",
		"`headscale preauthkeys create --reusable --tags tag:headcni` and put it where HEADCNI_AUTH_KEY_FILE or headscale.authKeyFile points."},
	{NoKey, Fail, "there is no key for Headscale",
		"The node has neither an API key nor a pre-auth key, and, in Kubernetes, headcni-controller has not made one.",
		"write one into the file that HEADSCALE_API_KEY_FILE or headscale.apiKeyFile names, mode 0600; in Kubernetes into the Secret kube-system/headcni-auth, key api-key."},
	{OtherControl, Fail, "tailscaled is logged in to another control server",
		"The host's tailscaled belongs to another tailnet than headscale.url. HeadCNI does not move it.",
		"set headscale.url to it, or run `tailscale logout` on the node first."},
	{Prefs, Fail, "tailscaled's settings could not be set",
		"Pods need it to advertise their range, to accept the other nodes' and to keep source addresses.",
		"`tailscale debug prefs` on the node; update tailscaled where it does not know a setting."},
	{NoTunnelDevice, Fail, "tailscaled's interface is not found",
		"tailscaled runs in another network namespace or in userspace mode, where pods' packets cannot use it.",
		"run it in the host's network namespace, without --tun=userspace-networking."},
	{TwoTailscaleds, Fail, "the dedicated tailscaled does not start beside the host's own",
		"Two in one network namespace break each other's routes.",
		"set tailscale.mode: host to use the host's, or stop and disable that."},
	{ShieldsUp, Fail, "tailscaled lets nothing in",
		"Somebody ran `tailscale set --shields-up` on the host: what other nodes and their pods begin towards this node's pods is dropped. HeadCNI does not undo that.",
		"`tailscale set --shields-up=false` on the node; what may reach the node itself is for Headscale's policy to say."},
	{HeadscaleUnreached, Fail, "Headscale cannot be reached",
		"Headscale is down, or the node's way to it, its name or a proxy is. Nodes that are in the tailnet go on; nobody joins and nothing is approved.",
		"`curl -v URL/health` on the node; see that Headscale runs and that headscale.url is right."},
	{APIKeyRefused, Fail, "Headscale refuses the API key",
		"The key has ended (after 90 days by default), was revoked, or is a pre-auth key. Nodes that are in stay; nobody joins and nothing is approved.",
		"`headscale apikeys create --expiration 365d`, its output into a file, and `headcnictl key rotate --from-file FILE`; without Kubernetes the same with sudo on the node. It is checked before it is written, and picked up without a restart."},
	{APIKeyEnds, Warn, "the API key ends soon", "API keys end, after 90 days by default.", "make another as in HC221; it is picked up without a restart."},
	{NodeKeyEnds, Warn, "the node's key ends soon",
		"With it the node leaves the tailnet, and its pods lose the others.",
		"give the daemon or the controller an API key, which ends expiry, or run `headscale nodes expire --disable -i ID`."},
	{ClocksApart, Warn, "clocks are apart", "Keys and certificates seem to have ended, or not to be valid yet.", "run an NTP client on both machines (`timedatectl set-ntp true`)."},
	{NodeUnknown, Fail, "Headscale does not know this node",
		"It was deleted there, or Headscale was restored from an older backup, or headscale.url is another server.",
		"in daemon mode it joins anew by itself within minutes; in host mode `tailscale up --force-reauth` on the node."},
	{URLNotLasting, Warn, "tailscaled will not come back to this control URL",
		"To an http:// URL tailscaled comes back only where its host is a private or loopback address, written as one, or localhost.",
		"serve Headscale by https, or write its private address into headscale.url."},
	{KeyExposed, Warn, "everybody on the machine can read the key", "The file's mode lets every user read it.", "`chmod 0600` the file that the text names."},
	{NotHeadscale, Fail, "what answers at headscale.url is not Headscale's API", "A proxy, a login page, an older Headscale or another program answers.", "set headscale.url to where Headscale 0.26 or later itself answers."},
	{HeadscaleCert, Fail, "Headscale's certificate is not accepted", "It has ended, is for another name, or its authority is not known here.", "renew it, set headscale.url to a name that it has, or headscale.caFile to its authority's PEM file."},
	{RemovalsHeld, Warn, "more nodes than usual are gone, and stay in Headscale", "headcni-controller removes few nodes at once, since a wrong list of Nodes looks the same as many deletions.", "see the controller's Event; remove them by `headscale nodes delete` where they are gone."},
	{ForeignClaims, Warn, "a node of the tailnet advertises pods of another", "It has a route inside a Node's pod range, which is not approved by HeadCNI.", "find out what it is (`headscale nodes list-routes`), and take the route from it."},
	{TailscaledUnwell, Warn, "tailscaled complains", "tailscaled's own checks of its health say that something is wrong.", "`tailscale status` and `tailscale netcheck` on the node."},
	{HeadscaleOther, Fail, "Headscale cannot do what was asked", "Headscale answers with an error.", "see the text and Headscale's own log."},
	{HeadscaleUntried, Warn, "HeadCNI was not tried with this version of Headscale", "It was run with 0.26 to 0.29. Headscale's API changes between minor versions.", "see the README for the versions of this release; before an upgrade of Headscale, upgrade HeadCNI."},
	{TailscaledState, Fail, "tailscaled cannot read its state",
		"The file tailscaled.state is damaged, as after a power failure, or sealed with a TPM that is another now. tailscaled runs without it, and joins no tailnet.",
		"in daemon mode `systemctl restart headcni-tailscaled` (Kubernetes: delete the node's pod of the DaemonSet headcni-tailscaled): a damaged file is put aside, and the node joins anew. " +
			"In host mode put a backup of the file back, or move it away, and `systemctl restart tailscaled`."},
	{FamilyLacking, Warn, "pods have a family of addresses that the tailnet lacks",
		"Headscale's prefixes leave IPv6 (or IPv4) out, or got it after the node had joined. Pods reach each other; nodes, their NodePorts and host-network pods do not reach pods of other nodes by it.",
		"set prefixes.v6 (or v4) in Headscale's configuration, start it again, and run `headscale nodes backfillips`; or take the family out of the pods' ranges."},
	{TailnetElsewhere, Fail, "the tailnet's addresses are not Tailscale's",
		"Headscale's prefixes are outside 100.64.0.0/10 and fd7a:115c:a1e0::/48, which Headscale takes with a warning. Nodes do not reach each other nor other nodes' pods by them, and nothing guards what is for the tailnet.",
		"set prefixes.v4 and prefixes.v6 in Headscale's configuration to these ranges or parts of them, start it again, delete its nodes, and have them join anew."},
	{OtherMachine, Fail, "this disk was another machine's",
		"Two machines with one state are one node to Headscale: whichever speaks to it last has the pods' traffic, the other is dark. So the dedicated tailscaled does not start on the " +
			"copy, and pods neither. The machine is told by its DMI UUID or serial number, in a container by its machine ID. With Kubernetes the controller sees two Nodes with one key.",
		"on a copy `rm -r /var/lib/headcni` (in host mode `systemctl stop tailscaled`, `rm /var/lib/tailscale/tailscaled.state`, `systemctl start tailscaled`; a `tailscale logout` would end the original too), " +
			"`network.podCIDRs` of its own, and `systemctl restart headcni-tailscaled`. Where the disk was moved and the other machine is gone for good: `rm /var/lib/headcni/machine`."},

	{PolicyLacksRanges, Fail, "Headscale's policy does not name the pod ranges", "From 0.29 on `*` means tailnet addresses only; a policy that does not name pods' ranges drops their packets. A line with `proto` is for that protocol alone. Nodes reach pods of other nodes from their tailnet addresses: their tag belongs into src.", "add the line that the text prints to acls in Headscale's policy."},
	{PolicyAutoApprovers, Warn, "autoApprovers lets nodes take each other's pods", "Any node with the tag may have any part of the range routed to it.", "with an API key headcni-controller approves by itself: remove the line from autoApprovers.routes."},
	{PolicyLacksMaps, Warn, "tailscaled cannot restart while Headscale is down", "The policy lacks the node attribute cache-network-maps.", "add the nodeAttrs line that the text prints to Headscale's policy."},
	{PolicyLacksCGNAT, Warn, "the policy lacks an attribute that hosts in 100.64.0.0/10 need", "tailscaled's firewall drops what these hosts get from their own network.", "add the nodeAttrs line that the text prints to Headscale's policy."},

	{PolicyRefuses, Fail, "Headscale's policy does not let it through", "The policy's acls or grants name both ends, and not the two together with this port. The far node's tailscaled drops the packet.", "add a line to acls in Headscale's policy that has the sender in src, and the receiver with the port in dst."},

	{PeerRelayed, Warn, "a peer with pods is reached through a relay only", "UDP is closed between the two nodes, or a NAT changes ports. A relay is slower, and all share it.", "open UDP 41641 (tailscale.port) to one of the two nodes, and have its router keep that port; `tailscale netcheck` says what the network does, docs/hybrid.md which pairs meet directly."},
	{PathSmall, Warn, "a path to a peer carries too little, and no router says so", "TCP of pods is clamped to it; larger UDP packets vanish.", "let ICMP \"fragmentation needed\" pass on the way, or set network.mtu to what the text says on every node."},
	{PeerOffline, Warn, "a node with pods is offline", "Headscale has no connection to it. Its pods are reached as long as both sides keep their session.", "see that the node runs and reaches Headscale."},
	{TunnelRoutes, Fail, "tailscaled's routes to its peers are missing", "Somebody has flushed table 52, and they could not be put back.", "restart tailscaled on the node."},
	{StrangeRoutes, Warn, "a node with our tag advertises ranges that are no pods here", "It belongs to another cluster, or network.clusterCIDRs differs between the nodes.", "make network.clusterCIDRs the same on both nodes, or name its ranges in network.remoteClusters or network.remoteCIDRs."},
	{PeerSilent, Fail, "a peer is online and does not answer", "Headscale has a connection to it, and neither a direct path nor a relay carries packets between the two nodes.", "`tailscale netcheck` on both nodes: UDP or the relays (DERP, mostly TCP 443) must be reachable from each; see that tailscaled runs there and did not hang."},
	{NobodyListens, Fail, "nobody listens on the port", "The pod or node refuses the connection, from its own node too: no program listens at the address, or at 127.0.0.1 alone.", "see which port the program in the pod listens on, that it runs, and that it listens on 0.0.0.0 or ::."},
	{HardNAT, Warn, "a node is relayed, and its router gives it another port for each peer", "Such a router (hard NAT: offices, NAT gateways of clouds, pfSense) keeps peers from sending to the node first. Two such nodes, or one and a home, meet at the relay only.", "pass UDP 41641 (tailscale.port) on the router to the node and have it keep that port for what the node sends (pfSense: an outbound rule with static port); or IPv6 on both sides; one of the two nodes is enough (docs/hybrid.md)."},
	{UDPBlocked, Warn, "a node is relayed to all others: no UDP gets out", "No relay has told tailscaled by UDP how it is seen from outside. The network lets only TCP out, or the relay's STUN port is closed.", "let UDP out: port 3478 to the relay, and from port 41641 (tailscale.port) to anywhere; open UDP 3478 at Headscale's host. Else the relay it is: slower, and shared."},
	{RouterAnswers, Warn, "two nodes are relayed although neither's router changes ports", "A router that accepts or rejects what comes to its own outside address, as a bare Linux does, notes the peer's first packet as a connection of its own; the node's next packet then gets another port. Or a firewall lets no UDP pass.", "on a router with Linux drop, do not accept or reject, what comes to its outside address: `nft add rule inet filter input iifname WAN ct state established,related accept`, `nft add rule inet filter input iifname WAN drop` (docs/hybrid.md)."},
	{Lost, Fail, "a packet was lost, and nothing that was looked at says why", "`headcnictl why --live` sent it, and it was not seen where it should have passed next, or no answer was. All that nodes were asked about it is right.", "look for a firewall of another program at that place (`nft list ruleset`, `iptables-save`; in the cloud its own rules), and, where it vanished between nodes, for one that lets no UDP pass (`tailscale netcheck`); where there is none, report it with the file that `headcnictl sysdump` makes."},
	{OffloadsOff, Warn, "the uplink sends and gets packet by packet", "Somebody has switched off offloads that its device could do (gso, gro, tx-udp-segmentation). tailscaled takes up to 1.4 times the processor's time for each byte.", "the `ethtool -K` line of the text switches them on, until the next start: keep it where the link is configured. Leave them off where they were switched off for a fault of the device."},

	{NameServer, Warn, "the node's name server for the tailnet does not work", "Pods' questions for names of the tailnet are not answered from this node.", "see the text; another program may have port 53 of the node's tailnet address."},
	{NamesCircle, Fail, "questions for names can go in a circle", "CoreDNS asks the host's resolver, which asks the tailnet's, which asks CoreDNS.", "change one of what the text names; docs/names.md shows the usual ways."},
	{ResolverFar, Warn, "the host's name server is where pods reach the tailnet only", "Pods with the host's resolver cannot ask it.", "make a route of its own to it on each host, or give kubelet another resolv.conf."},
	{NamesRisk, Warn, "a setting may lead questions for names in a circle", "One half of a circle is there; another change can close it.", "docs/names.md says which settings belong together."},
	{ClusterDNS, Warn, "the cluster's DNS does not have the tailnet's names", "headcni-controller could not write CoreDNS' configuration.", "see the text; `headcnictl dns corefile` prints what to put there."},

	{PolicyNot, Fail, "NetworkPolicies are not in force", "They could not be learned, compiled or written. New pods wait for them, and those that run keep what they had.", "see the text; `headcnictl policy list` on the node says how they stand."},
	{PolicyWaits, Warn, "pods wait for their policies", "The API server has not told of them yet, so they reach their own node only.", "see that the node's daemon reaches the API server."},
	{PolicyStale, Warn, "policies are those of before the daemon's start", "The API server has not answered since, and the last known ones are in force.", "see that the node reaches the API server."},
	{Subnets, Warn, "who may use subnets of the tailnet is not as Namespaces say", "Namespaces cannot be read, or the kernel did not take it. Pods keep what they had, and new ones have no consent.", "see the text: the chart's ClusterRole lets the daemon list and watch namespaces."},

	{PolicyDenies, Fail, "a NetworkPolicy denies it", "A policy isolates the pod in this direction, and no rule of any policy that selects it lets the other end through.", "`headcnictl policy explain POD` on the node lists what is let through; add a rule to one of the policies, or another policy that selects the pod."},
	{SubnetDenied, Fail, "the pod's Namespace may not use the network", "The address is in a network behind a device of the tailnet, `network.tailnetSubnets` is `deny`, and the annotation of the pod's Namespace does not name it.", "`kubectl annotate --overwrite namespace NAMESPACE headcni.io/tailnet-subnets=PREFIX`, with those that the annotation names already, separated by commas: it is replaced."},
	{EgressDenied, Fail, "pods may begin nothing towards the tailnet", "`network.tailnetEgress` is `deny`: a pod answers devices and other nodes' own addresses, and calls none.", "set `network.tailnetEgress: masquerade`, if all pods may call what Headscale's policy lets their node call."},

	{ServicesNotHere, Fail, "the tailnet does not reach services by this node", "The node is chosen by `network.advertiseServices`, and services do not work on it: its kube-proxy does not say that they do, or its own rules or links are not as they should be.", "see the text; it leads there again by itself once they work. Where kube-proxy's health is elsewhere, set `network.advertiseServices.healthURL`."},
	{ServicesNowhere, Warn, "the tailnet does not reach services as it is to", "No Node has the labels of `network.advertiseServices`, the ranges of services are not known or cannot be used, or Headscale's policy lets nobody there.", "see the text; `headcnictl dns headscale` prints the lines for Headscale."},

	{TestPods, Fail, "a test pod does not run", "`headcnictl connectivity test` and `perf` run pods on each node, with HeadCNI's own image. One was not started, or cannot be asked.", "see the text; `headcnictl doctor --node NODE`, and `kubectl -n kube-system get pods -o wide` for the node's kubelet and runtime."},
	{PodToPod, Fail, "a pod does not reach another", "A test pod got no answer from that of another node or of its own, or was seen by another address than its own.", "`headcnictl doctor` names what is wrong on both nodes; where it finds nothing, look for a firewall between them."},
	{PacketSizes, Fail, "packets of a size do not arrive", "UDP packets that may not be cut, as large as the pods' link allows, got no answer, and perhaps small ones neither. Where small ones do, a path between the nodes carries less.", "let ICMP \"fragmentation needed\" pass on the way, or set network.mtu to what `headcnictl doctor` says (HC402) on every node."},
	{ServicesFail, Fail, "pods do not reach Services", "A test pod reaches others by their own addresses and not by a ClusterIP, or no pods at all.", "see that kube-proxy, or what stands for it, runs on the node: `kubectl -n kube-system get pods -o wide`."},
	{NamesFail, Fail, "pods do not resolve names of the cluster", "The cluster's DNS does not answer test pods, or with another address.", "`kubectl -n kube-system get pods,endpointslices -l k8s-app=kube-dns`: see that CoreDNS runs, and that the node's pods reach it."},
	{PortsFail, Fail, "a port of a node does not lead to pods", "A NodePort, which is kube-proxy's, or a hostPort, which is portmap's, does not answer pods.", "for a NodePort see kube-proxy; for a hostPort that the plugin portmap is in cni.binDir, and that another firewall does not drop it."},
	{EgressFails, Fail, "pods do not reach nodes or the API server", "A test pod got no answer from a node's own address, or from the API server by its Service.", "`headcnictl doctor --node NODE`; see that the node's firewall lets pods' ranges in, and that network.masquerade is on where nodes have no routes to pods."},
	{PoliciesFail, Fail, "a NetworkPolicy does not hold", "What a policy denies was answered, or what it allows was not, for longer than policies take to hold.", "`headcnictl status` says on how many nodes policies are in force, `headcnictl policy list` on the node how they stand."},
	{TailnetToPod, Fail, "this machine does not reach pods by the tailnet", "The machine on which the test was started sends packets for pods into the tailnet, and gets no answer.", "let Headscale's policy accept from this machine to the pods' ranges; network.tailnetIngress and docs/security.md say what nodes let in."},
	{Interrupted, Fail, "a restart interrupted pods for long", "While `headcnictl connectivity test --disrupt` restarted a part of HeadCNI on a node, datagrams between pods were lost for longer than they should be: a second where the restart does not concern them, 30 seconds where they go through the tailscaled that starts anew, whose pod must be made first.", "`headcnictl doctor --node NODE`; a busy node starts pods slowly, which `kubectl -n kube-system get events` shows. docs/reliability.md says what each restart costs."},

	{Contradiction, Fail, "what the kernel does and what HeadCNI believes differ", "This is a fault of HeadCNI.", "please report it with the file that `headcnictl sysdump` makes."},
}
