// Package conformance goes through the CNI specification, rule by rule, with the programs as they ship: run as a runtime runs
// them, in network namespaces of their own. libcni plays the runtime where it can.
package conformance

// program is what a rule is for.
type program string

const (
	plugin program = "headcni"
	ipams  program = "headcni-ipam"
	both   program = "both"
)

// rule is a sentence of the specification in our words, and what holds it: tests of this package, or of another as
// "folder.Test".
type rule struct {
	section string
	rule    string
	of      program
	tests   []string
}

// rules are in the order of SPEC.md 1.1.0, then what conventions and older versions add, then what no specification says.
var rules = []rule{
	{"1 Configuration", "cniVersion 0.3.0, 0.3.1, 0.4.0, 1.0.0 and 1.1.0 are taken, and the answer is in the version asked in", both, []string{"TestResult", "TestVersionSelection", "cmd/headcni-ipam.TestVerbsInEveryVersion", "cmd/headcni-ipam.TestSameAsHostLocal"}},
	{"1 Configuration", "0.1.0 and 0.2.0, whose results have no interfaces, are error 1; no cniVersion means 0.1.0", both, []string{"TestVersionSelection", "TestErrorResults", "internal/cnimain.TestErrors"}},
	{"1 Configuration", "cniVersions: the runtime takes the highest that both know; the shipped file says so", plugin, []string{"TestVersionSelection", "TestShippedConflist"}},
	{"1 Configuration", "name begins with a letter or digit and holds nothing that a path must not", both, []string{"internal/cnimain.TestErrors"}},
	{"1 Configuration", "disableCheck and disableGC: the command is not sent, and the keys are known", plugin, []string{"TestCheckDeviations", "TestGC", "pkg/config/netconf.TestAccepted"}},
	{"1 Configuration", "loadOnlyInlinedPlugins is the runtime's, and known", plugin, []string{"pkg/config/netconf.TestAccepted"}},
	{"1 Configuration", "ipam.type is a file name without a folder", plugin, []string{"pkg/config/netconf.TestFaults"}},
	{"1 Configuration", "runtimeConfig, args and every key under cni.dev/ are the runtime's: what is not understood there is no error", plugin, []string{"TestCapabilities", "TestArgs", "pkg/config/netconf.TestAccepted"}},
	{"1 Configuration", "null is as if the key was not there, whatever the key: Go programs write it for what they left nil", both, []string{"TestNull", "TestPrevResultWithNull", "internal/jsonobj.TestNullIsNotGiven", "pkg/config/netconf.TestNullIsNotGiven", "pkg/ipam.TestParseConfig"}},
	{"1 Configuration", "ipMasq: the daemon masquerades, so true is refused with those words", plugin, []string{"pkg/config/netconf.TestFaults"}},
	{"1 Configuration", "dns is respected", plugin, []string{"TestDNS", "pkg/plugin.TestMergeDNS"}},
	{"1 Configuration", "ipam belongs to the IPAM plugin and reaches it whole", plugin, []string{"TestDelegation"}},
	{"1 Configuration", "an unknown key is an error (which the specification allows), named with its value and the key that was meant, if it is like one", plugin, []string{"TestErrorResults", "TestInjected", "pkg/config/netconf.TestFaults"}},
	{"1 Configuration", "what meta-plugins put in is no error: multus's deviceID and pciBusID, and keys with a domain in their name", plugin, []string{"TestInjected", "pkg/config/netconf.TestWhatOthersInject"}},
	{"1 Configuration", "unknown keys of ipam are an error; the others are the calling plugin's", ipams, []string{"pkg/ipam.TestParseConfigFaults"}},

	{"2 Parameters", "CNI_COMMAND: none, or an unknown one, is error 4; where there is none, standard error says who we are", both, []string{"TestErrorResults", "internal/cnimain.TestErrors", "internal/cnimain.TestByHand", "internal/cnimain.TestInputThatDoesNotEnd"}},
	{"2 Parameters", "CNI_CONTAINERID: not empty, a letter or digit, then letters, digits, _ . -; of any length", both, []string{"TestNames", "internal/cnimain.TestErrors"}},
	{"2 Parameters", "CNI_NETNS is a path to a network namespace, and not the runtime's own", plugin, []string{"TestErrorResults", "pkg/networking/podlink.TestVacant", "cmd/headcni.TestBadInput"}},
	{"2 Parameters", "CNI_IFNAME: a name that cannot be used is an error", plugin, []string{"TestNames", "internal/cnimain.TestErrors"}},
	{"2 Parameters", "CNI_ARGS: pairs separated by semicolons; keys of others mean nothing, and none is too long", both, []string{"TestArgs", "TestLongArgs", "pkg/plugin.TestParseArgs", "pkg/ipam.TestOwnerOf"}},
	{"2 Parameters", "CNI_PATH is where IPAM plugins are looked for; only GC requires it", both, []string{"internal/cnimain.TestOptional", "pkg/plugin.TestDelegate"}},
	{"2 Parameters", "what a command does not require may be missing", both, []string{"internal/cnimain.TestOptional"}},
	{"2 Errors", "exit code 0 on success, another on failure, with an error result on standard output", both, []string{"TestErrorResults", "TestAnyInput", "internal/cnimain.TestErrors"}},
	{"2 Errors", "standard output holds the result and nothing else", both, []string{"TestLogs", "TestOutputIsJSON", "TestAnyInput"}},

	{"2 ADD", "the interface CNI_IFNAME is made inside CNI_NETNS, and works when ADD is over", plugin, []string{"TestFirstPacket", "cmd/headcni.TestPods", "pkg/networking/podlink.TestAttach"}},
	{"2 ADD", "a result is printed", both, []string{"TestResult", "cmd/headcni-ipam.TestVerbsInEveryVersion"}},
	{"2 ADD", "prevResult is passed on, with what the plugin added", plugin, []string{"TestPrevResult", "pkg/plugin.TestChained"}},
	{"2 ADD", "an interface of that name is an error, and is not touched", plugin, []string{"TestExistingInterface", "TestSecondInterface", "cmd/headcni.TestPods"}},
	{"2 ADD", "a container may have more than one attachment, each by another interface name", plugin, []string{"TestSecondInterface", "TestBesideAnother", "pkg/networking/podlink.TestSecondInterface"}},
	{"2 ADD", "ADD twice without DEL, which a runtime should not do, is an error and harms nothing", both, []string{"cmd/headcni.TestPods", "pkg/plugin.TestSecondAddTouchesNothing", "cmd/headcni-ipam.TestVerbsInEveryVersion"}},
	{"2 DEL", "the interface is deleted, and is gone when DEL is over", plugin, []string{"cmd/headcni.TestPods"}},
	{"2 DEL", "no prevResult is no error", both, []string{"TestDelIsLenient", "cmd/headcni-ipam.TestVerbsInEveryVersion"}},
	{"2 DEL", "whatever is missing or in the way, as much as possible is deleted without an error: the namespace, the link, the store, a valid configuration", plugin, []string{"TestDelIsLenient", "cmd/headcni.TestDelAfterTheSandbox", "pkg/plugin.TestDelIsLenient"}},
	{"2 DEL", "an address is released although the namespace is gone and the ranges are others now", ipams, []string{"TestDelOfNothing", "cmd/headcni-ipam.TestErrorsAndUndo"}},
	{"2 DEL", "any number of DELs succeed, also of what was never added, and leave no trace", both, []string{"TestDelIsLenient", "TestDelOfNothing"}},
	{"2 DEL", "a runtime that deletes by its cache finds the plugin after uninstall too (docs/adr/0018-plugins-that-stay.md)", plugin, []string{"TestDelFromCacheAfterUninstall", "pkg/install.TestRemoveWaitsForDel"}},
	{"2 DEL", "an address stays taken while its link cannot be removed (our own rule: nothing is given twice)", plugin, []string{"pkg/plugin.TestDelThatCannotDetachKeepsTheAddress"}},
	{"2 CHECK", "prevResult says what to expect; without one it is an error", plugin, []string{"TestCheckNeedsPrevResult", "pkg/plugin.TestCheck"}},
	{"2 CHECK", "what later plugins changed is allowed: more addresses, routes and interfaces, routes in other tables, a smaller MTU", plugin, []string{"TestCheckAllowsLaterPlugins", "TestTuning"}},
	{"2 CHECK", "interface, address and route: each is missed, or found to be wrong, in its own words", plugin, []string{"TestCheckDeviations", "pkg/networking/podlink.TestCheck"}},
	{"2 CHECK", "what the result does not hold is checked too: neighbours, the host's side, the reservation of the address", plugin, []string{"TestCheckDeviations", "pkg/networking/podlink.TestCheck"}},
	{"2 CHECK", "a container that is generally unreachable is an error: the node's own network is looked at (gate)", plugin, []string{"pkg/plugin.TestCheck"}},
	{"2 CHECK", "right after ADD it succeeds", plugin, []string{"TestCheckAtOnce", "TestManyAtOnce"}},
	{"2 CHECK", "the IPAM plugin is asked, and its error passed on", plugin, []string{"TestDelegation"}},
	{"2 CHECK", "the addresses of prevResult are those that are leased", ipams, []string{"cmd/headcni-ipam.TestVerbsInEveryVersion"}},
	{"2 CHECK", "where disableCheck is set or there is no CHECK (before 0.4.0), none is sent", plugin, []string{"TestCheckDeviations", "internal/cnimain.TestErrors"}},
	{"2 STATUS", "success if ADD would work; 50 if not; 51 if running pods may be cut off too", plugin, []string{"TestStatus", "cmd/headcni.TestGateAndStatus", "pkg/plugin.TestStatus"}},
	{"2 STATUS", "a store that cannot be used is 50", ipams, []string{"cmd/headcni-ipam.TestDisk", "cmd/headcni-ipam.TestLockIsHeld", "cmd/headcni-ipam.TestErrorsAndUndo", "pkg/ipam.TestStatusOfALockedStore"}},
	{"2 STATUS", "exhausted addresses should be an error: not here, for the Node's pods would be evicted (docs/adr/0011-full-pool.md)", both, []string{"TestStatus"}},
	{"2 STATUS", "other commands work whatever STATUS said", plugin, []string{"TestStatus"}},
	{"2 STATUS", "the IPAM plugin is asked, and its error is an error", plugin, []string{"TestStatus", "TestDelegation"}},
	{"2 VERSION", "cniVersion as asked and all supported versions are printed, with or without an input", both, []string{"TestVersionSelection", "internal/cnimain.TestVersion", "cmd/headcni.TestVersion", "cmd/headcni-ipam.TestVersion"}},
	{"2 GC", "links and leases that are not in cni.dev/valid-attachments go; of another network, and of nobody, they stay", plugin, []string{"TestGC", "cmd/headcni.TestGC"}},
	{"2 GC", "leases that are not in cni.dev/valid-attachments go; without the list, or with half an entry in it, none does", ipams, []string{"cmd/headcni-ipam.TestGC"}},
	{"2 GC", "the list is known as cni.dev/attachments too, its name in the specification as first released; what is in either is valid", both, []string{"TestGCByItsFirstName", "pkg/config/netconf.TestAttachments"}},
	{"2 GC", "a list that is null is an empty list", both, []string{"TestGCOfNothing", "pkg/plugin.TestGC", "cmd/headcni-ipam.TestGC"}},
	{"2 GC", "past an error it goes on, and the error is told", plugin, []string{"TestGCGoesOn", "pkg/plugin.TestGC"}},
	{"2 GC", "it is forwarded to the IPAM plugin", plugin, []string{"TestDelegation", "TestGCGoesOn"}},
	{"2 GC", "nothing is printed", both, []string{"TestGC", "cmd/headcni-ipam.TestGC"}},

	{"3 Execution", "many attachments at once", both, []string{"TestManyAtOnce", "cmd/headcni-ipam.TestManyUnderBridge", "pkg/ipam.TestManyProcesses"}},
	{"3 Execution", "DEL after an ADD that failed", plugin, []string{"TestFailedAddIsDeleted"}},
	{"3 Execution", "as first of a list, and as any plugin of it with those before it left alone", plugin, []string{"TestWholeChain", "TestPrevResult"}},
	{"3 Execution", "runtimeConfig holds what capabilities declare and the runtime has; it is taken, or is an error", plugin, []string{"TestCapabilities", "TestWholeChain"}},
	{"3 Execution", "capabilities must not be passed on to plugins; libcni does it all the same, and it does not matter", plugin, []string{"TestCapabilities"}},

	{"4 Delegation", "the IPAM plugin is found by CNI_PATH and gets the same environment and the whole configuration", plugin, []string{"TestDelegation", "pkg/plugin.TestDelegate"}},
	{"4 Delegation", "its standard error comes out of ours", plugin, []string{"TestDelegation"}},
	{"4 Delegation", "CHECK, DEL, GC and STATUS run it too, and its error is ours", plugin, []string{"TestDelegation"}},
	{"4 Delegation", "where it fails at ADD, it is run again with DEL", plugin, []string{"pkg/plugin.TestDelegate"}},
	{"4 Delegation", "the answer is a result without interfaces", ipams, []string{"cmd/headcni-ipam.TestVerbsInEveryVersion"}},
	{"4 Delegation", "it serves bridge, ptp and macvlan as host-local does", ipams, []string{"cmd/headcni-ipam.TestUnderOtherPlugins", "cmd/headcni-ipam.TestSameAsHostLocal"}},

	{"5 ADD Success", "interfaces: all that were made, the host's too, with name, mac, mtu (1.1.0) and sandbox, as the kernel has them", plugin, []string{"TestResult"}},
	{"5 ADD Success", "ips: address with its length, gateway, index of the interface; with the version of IP before 1.0.0", plugin, []string{"TestResult", "pkg/plugin.TestResultVersions"}},
	{"5 ADD Success", "routes: dst and gw; from 1.1.0 on mtu, advmss, priority, table and scope, all of which the kernel is given", plugin, []string{"TestResult", "TestRouteScope", "pkg/networking/podlink.TestRoutes"}},
	{"5 ADD Success", "routes: all keys of 1.1.0 are passed on", ipams, []string{"pkg/ipam.TestResult"}},
	{"5 ADD Success", "dns: of IPAM, dns, magic_dns and the capability dns", plugin, []string{"TestDNS", "pkg/plugin.TestMergeDNS"}},
	{"5 ADD Success", "dns: of resolvConf", ipams, []string{"pkg/ipam.TestResult"}},
	{"5 ADD Success", "each version has its own keys and no others", both, []string{"internal/cnimain.TestPrintResult", "pkg/plugin.TestResultVersions"}},
	{"5 Error", "cniVersion, code, msg and details, on one line each", both, []string{"TestErrorResults", "internal/cnimain.TestErrors"}},
	{"5 Error", "1: incompatible version, or a command that the version does not have", both, []string{"TestErrorResults", "internal/cnimain.TestErrors"}},
	{"5 Error", "2: unsupported field, with key and value in the message; the value is hidden where it may be a secret", plugin, []string{"TestErrorResults", "TestNothingLeaksOut", "pkg/config/netconf.TestFaults"}},
	{"5 Error", "3: container unknown. It tells the runtime that no DEL is needed, which we never say", plugin, []string{"TestDelOfNothing"}},
	{"5 Error", "4: environment, with the names of the variables in the message", both, []string{"TestErrorResults", "TestNames", "internal/cnimain.TestErrors"}},
	{"5 Error", "5: input and output", both, []string{"internal/cnimain.TestUnreadableInput", "pkg/plugin.TestAddFailsAtEachStep"}},
	{"5 Error", "6: what is not JSON", both, []string{"TestErrorResults", "internal/cnimain.TestErrors"}},
	{"5 Error", "7: a configuration that is wrong; all faults at once", both, []string{"TestErrorResults", "pkg/config/netconf.TestFaults", "pkg/ipam.TestParseConfigFaults"}},
	{"5 Error", "8: an invalid network namespace (of the CNI library; the specification lists none)", plugin, []string{"TestErrorResults", "TestNetnsDisappears"}},
	{"5 Error", "11: try again later: the node's network is not programmed, the store is locked", plugin, []string{"TestErrorResults", "cmd/headcni.TestGateAndStatus"}},
	{"5 Error", "50 and 51 at STATUS", plugin, []string{"TestStatus", "cmd/headcni.TestGateAndStatus"}},
	{"5 Error", "100 and above are ours; an IPAM plugin's code is passed on", both, []string{"TestErrorResults", "TestGCGoesOn", "cmd/headcni-ipam.TestErrorsAndUndo"}},
	{"5 Error", "standard error is for logs: silent at the level warn, HEADCNI_LOG_LEVEL before log_level, a file with rotation", plugin, []string{"TestLogs", "pkg/plugin.TestLog"}},

	{"Conventions", "capabilities ips, mac and dns; args.cni.ips and args.cni.mac before CNI_ARGS IP and MAC", plugin, []string{"TestCapabilities", "TestArgs", "TestDNS"}},
	{"Conventions", "capabilities ips and ipRanges; args.cni.ips; all of them before CNI_ARGS IP", ipams, []string{"TestArgsOfIPAM", "cmd/headcni-ipam.TestRequestedAddresses", "pkg/ipam.TestRequestedIPs"}},
	{"Conventions", "portMappings: portmap run by headcni or behind it, by iptables and nftables", plugin, []string{"TestPortmap"}},
	{"Conventions", "portMappings: DEL takes back what ADD was told to give, whatever its own configuration says, as multus's", plugin, []string{"TestPortsAreReturnedWhateverDELSays"}},
	{"Conventions", "portMappings: what portmap refuses to read is refused before an address is taken, and keeps no DEL from its end", plugin, []string{"TestPortsThatPortmapRefuses"}},
	{"Conventions", "portMappings: DEL ends the UDP flows that led to the pod, before another has its address", plugin, []string{"TestPortOfAPodThatWent"}},
	{"Conventions", "portMappings: a pod that is gone without DEL keeps its ports from no other, and GC takes them back", plugin, []string{"TestPortOfTheDead"}},
	{"Conventions", "tuning behind headcni: sysctls, MTU; a MAC is for headcni to set, and CHECK says so where tuning did", plugin, []string{"TestTuning"}},
	{"Conventions", "firewall behind headcni, on a host that drops what it forwards", plugin, []string{"TestFirewall"}},
	{"Conventions", "bandwidth behind headcni; where the kernel has no ifb or tbf, its words come out and nothing is left", plugin, []string{"TestBandwidth"}},
	{"Conventions", "all of them in one list, with the capabilities of CRI-O, containerd and podman, in every version", plugin, []string{"TestWholeChain"}},

	{"Robustness", "any input and environment: no panic, no hang, an error of the right form, nothing left", both, []string{"TestAnyInput", "FuzzConfig", "pkg/config/netconf.FuzzConfig", "pkg/ipam.FuzzParseConfig"}},
	{"Robustness", "an environment that no runtime should give: namespaces of the node itself and of the machine's first process, paths that are none, names, arguments; nothing of the node changes, and no other pod suffers", plugin, []string{"TestHostileEnvironment", "TestFirstProcess"}},
	{"Robustness", "a plugin of CNI_PATH is run only from an absolute folder, and not where anybody may write it", plugin, []string{"TestHostilePath"}},
	{"Robustness", "dataDir, log_file and daemon_socket where others have planted links, FIFOs and files: no file of others is written, and the error says what to do", plugin, []string{"TestHostileDataDir", "TestHostileLogFile", "TestHostileSpool"}},
	{"Robustness", "a link, FIFO, folder or junk in the place of a file of the leases: nobody waits for it, no address is given twice, what is only a hint is made anew, and GC goes on", both, []string{"pkg/ipam.TestJunkInAnyFile", "cmd/headcni-ipam.TestDisk"}},
	{"Robustness", "an IPAM plugin or portmap that prints without end is ended, and the error says so", plugin, []string{"pkg/plugin.TestDelegateWithoutEnd"}},
	{"Robustness", "input without end", both, []string{"internal/cnimain.TestInputWithoutEnd", "internal/cnimain.TestInputThatDoesNotEnd"}},
	{"Robustness", "neither the input nor a secret in it comes out in errors or logs", both, []string{"TestNothingLeaksOut"}},
	{"Robustness", "system calls that signals interrupt", plugin, []string{"TestSignals"}},
	{"Robustness", "instructions of one ADD, CHECK, DEL and VERSION are bounded", plugin, []string{"TestInstructions"}},
	{"Robustness", "the namespace goes away in the middle of ADD", plugin, []string{"TestNetnsDisappears", "pkg/networking/podlink.TestNetnsDisappears"}},
	{"Robustness", "300 ADDs, CHECKs and DELs at once beside 2,000 foreign links", plugin, []string{"TestManyAtOnce", "cmd/headcni.TestConcurrent"}},
	{"Robustness", "ADD and DEL of one attachment race", plugin, []string{"TestRacingAddAndDel", "pkg/plugin.TestLock"}},
	{"Robustness", "ADDs of one attachment race: one succeeds, the others fail, and its pod works", plugin, []string{"TestTwoAddsAtOnce", "pkg/plugin.TestLock"}},
	{"Robustness", "ADDs of one attachment race: one succeeds, the others fail and leave its lease alone", ipams, []string{"cmd/headcni-ipam.TestAddsOfOneAtOnce"}},
	{"Robustness", "kill -9 at any moment of any command", plugin, []string{"TestKilled", "cmd/headcni.TestKilledAdd", "cmd/headcni.TestKilledDel"}},
	{"Robustness", "kill -9 at any moment of any command", ipams, []string{"cmd/headcni-ipam.TestKilled", "pkg/ipam.TestKill9", "pkg/ipam.TestEveryStepFails"}},
	{"Robustness", "IPv6 switched off, on the node or in the pod, by all or by default; /proc/sys that is read-only", plugin, []string{"TestSysctls", "pkg/networking/podlink.TestIPv6Disabled"}},
	{"Robustness", "the link's name or the address is taken already", plugin, []string{"TestCollisions", "pkg/networking/podlink.TestNameCollision", "pkg/networking/podlink.TestAddressElsewhere"}},
	{"Robustness", "an IPAM plugin that is just being replaced", plugin, []string{"TestBusyProgram"}},
}
