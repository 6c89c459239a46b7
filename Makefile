# `make help` lists the targets. Each does all its own set-up.
#
# Under sudo, what is built belongs to the user who called it (test/tools/as-user).

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VERSION ?= $(shell scripts/version)
BIN     ?= bin
DESTDIR ?=
PREFIX  ?= /usr/local
CNI_BIN  ?= /opt/cni/bin
CNI_CONF ?= /etc/cni/net.d
UNITS    ?= $(PREFIX)/lib/systemd/system

PROGRAMS := headcni headcni-ipam headcni-daemon headcni-controller
PLUGINS  := host-local loopback portmap
# What `make compile` compiles: some of the above and of headcnictl.
BUILD    ?= $(PROGRAMS) headcnictl $(PLUGINS)
# What the nodes of internal/lab run of ours.
LAB      := headcni headcni-ipam headcni-daemon headcnictl
LDFLAGS  := -s -w -X github.com/headcni/headcni/internal/version.Version=$(VERSION)
# With -w the linker throws away what it costs the compiler a tenth of its time to make.
GCFLAGS  := all=-dwarf=false

# The work tree may belong to another user than the one who builds (sudo), in which case Git refuses to tell go about it.
export GOFLAGS += -buildvcs=false
export CGO_ENABLED = 0
export PATH := $(PATH):$(shell . test/tools/lib.sh && go_dir)

# One shell per recipe line: these lines begin those that need programs of ours, pinned real parts or system programs, and no more
# of them than the recipe runs. (`export X=$(...)` and `eval "$(...)"` would go on after a failure.)
PREPARE = prepared=$$(VERSION='$(VERSION)' test/tools/prepare $(1) '$(2)' $(3)); eval "$$prepared";
WITH_PACKAGES = programs=$$(test/tools/packages $(1)); eval "$$programs";
# One tailscaled, daemon mode's, is that of every node, and `tailscale` as well.
TRIMMED = HEADCNI_TOOLS="$$HEADCNI_TOOLS/trimmed:$$HEADCNI_TOOLS";

.PHONY: help
help: ## Print this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: need-go ## Two nodes, four pods, real Headscale and tailscaled, on this machine; ARGS=--keep leaves it running
	@$(call PREPARE,demo,$(LAB),headscale tailscale-trimmed) $(TRIMMED) bin/headcnictl demo $(ARGS)

.PHONY: build
build: need-go ## Compile everything into bin/, with host-local, loopback and portmap
	@test/tools/as-user $(MAKE) compile VERSION='$(VERSION)'

.PHONY: compile
compile:
	@mkdir -p $(BIN)
	$(if $(filter $(PROGRAMS),$(BUILD)),@go build -trimpath -gcflags '$(GCFLAGS)' -ldflags '$(LDFLAGS)' -o $(BIN)/ $(addprefix ./cmd/,$(filter $(PROGRAMS),$(BUILD))))
	$(if $(filter headcnictl,$(BUILD)),@go build -trimpath -gcflags '$(GCFLAGS)' -ldflags '$(LDFLAGS)' -o $(BIN)/headcnictl ./cmd/cli)
	$(if $(filter $(PLUGINS),$(BUILD)),@cd test/tools/cni-plugins && \
		release=$$(sed -n 's/^\tgithub\.com\/containernetworking\/plugins \(v[^ ]*\).*/\1/p' go.mod) && \
		go build -trimpath -gcflags '$(GCFLAGS)' -ldflags "-s -w -X github.com/containernetworking/plugins/pkg/utils/buildversion.BuildVersion=$$release" -o $(abspath $(BIN))/ \
		$(addprefix github.com/containernetworking/plugins/plugins/,ipam/host-local main/loopback meta/portmap))

ARCH     ?= $(shell . test/tools/lib.sh && find_go && go env GOARCH)
IMAGE    ?= ghcr.io/headcni/headcni:$(shell scripts/version --release)

.PHONY: image
image: need-go ## The container image bin/headcni-image-ARCH.tar, without a container engine; ARCH=amd64|arm64 IMAGE=name:tag
	@test/tools/as-user env VERSION='$(VERSION)' REVISION="$$(git rev-parse HEAD 2>/dev/null || true)" scripts/image '$(ARCH)' '$(IMAGE)'

.PHONY: image-at
image-at: need-go ## The image of another commit, by that commit's scripts, and its chart, in bin/; COMMIT=... ARCH= IMAGE=
	@if [[ -z '$(COMMIT)' ]]; then echo "make image-at: name a commit or a tag, such as COMMIT=v0.1.0" >&2; exit 1; fi
	@test/tools/as-user scripts/image-at '$(COMMIT)' '$(ARCH)' $(if $(filter command line environment,$(origin IMAGE)),'$(IMAGE)')

.PHONY: release
release: need-go ## dist/: archives, images, chart, lists of modules and checksums of a release, for amd64 and arm64; publishes nothing
	@test/tools/as-user env VERSION='$(VERSION)' REVISION="$$(git rev-parse HEAD 2>/dev/null || true)" scripts/release

# The packages that take longest begin first, or the last of them would run alone.
LONGEST := ./test/tailnet ./test/policy ./test/hosts ./test/sites ./test/conformance ./test/rearm
# Linking takes a quarter less without symbols and DWARF (-s -w), and traces of goroutines need neither.
# test/deploy's stand-ins for kubectl and helm are the test binary itself: with the race detector it takes a second to start.
.PHONY: test
test: need-go ## All tests but e2e's, test-manual's and test-kernel's, with the race detector, none skipped; needs root
	@if ((EUID != 0)); then \
		echo "make test: needs root for the kernel and tailnet tests: run 'sudo make test'" >&2; \
		echo "(as an ordinary user, 'go test ./...' runs what it can and says what it skips)" >&2; exit 1; fi
	@$(call PREPARE,test,$(LAB),headscale tailscale tailscale-trimmed cni-plugins helm cyclonedx-gomod derper oci simnodes) \
		prometheus=$$(test/tools/packages unpack prometheus); tinyproxy=$$(test/tools/packages unpack tinyproxy-bin); miniupnpd=$$(test/tools/packages unpack miniupnpd-nftables); \
		export PATH="$$PATH:$$prometheus/usr/bin:$$tinyproxy/usr/bin:$$miniupnpd/usr/sbin"; \
		go vet ./...; CGO_ENABLED=1 HEADCNI_TEST_REQUIRE=1 go test -race -ldflags='-s -w' -timeout 20m $(TESTFLAGS) $(LONGEST) $$(go list ./... | grep -v -e /test/e2e -e /test/deploy -e /test/manual -e /test/kernel -e /test/crio); \
		HEADCNI_TEST_REQUIRE=1 go test $(TESTFLAGS) ./test/deploy/; \
		(cd test/tools/oci; go vet ./...; go test ./...); cd test/tools/simnodes; go vet ./...

.PHONY: test-manual
test-manual: need-go ## docs/install-by-hand.md, command by command, on two machines with systemd; needs root, takes 2 minutes
	@if ((EUID != 0)); then echo "make test-manual: needs root: run 'sudo make test-manual'" >&2; exit 1; fi
	@$(call PREPARE,manual,$(PROGRAMS) headcnictl $(PLUGINS),headscale tailscale) HEADCNI_MACHINE=$$(test/manual/rootfs); export HEADCNI_MACHINE HEADCNI_TEST_REQUIRE=1; \
		go test -v -count 1 -timeout 20m ./test/manual/

.PHONY: test-crio
test-crio: need-go ## A node on which CRI-O's own module (ocicni) makes pods' networks: restarts, kill -9, a power cut, uninstall; needs root, takes a minute
	@if ((EUID != 0)); then echo "make test-crio: needs root: run 'sudo make test-crio'" >&2; exit 1; fi
	@$(call PREPARE,lab,$(LAB),headscale tailscale-trimmed ocicni) $(TRIMMED) HEADCNI_TEST_REQUIRE=1 go test -v -count 1 -timeout 10m ./test/crio/

# A Debian package that stands for a kernel.
KERNEL ?= linux-image-amd64

.PHONY: test-kernel
test-kernel: need-go ## Tests of the kernel in a virtual machine with Debian's own kernel and modules; ONLY=regexp, ALL=1 with the demo, KERNEL=linux-image-cloud-amd64
	@$(call PREPARE,qemu,$(LAB),headscale tailscale-trimmed) HEADCNI_KERNEL=$$(test/tools/kernel '$(KERNEL)'); export HEADCNI_KERNEL HEADCNI_TEST_REQUIRE=1; \
		$(TRIMMED) go test -v -count 1 -timeout 120m ./test/kernel/ -args $(if $(ALL),-all) $(if $(ONLY)$(ALL),-only '$(or $(ONLY),.)')

MATRIX := 0.26 0.27 0.28

.PHONY: test-matrix
test-matrix: need-go ## What depends on Headscale against older real ones too (MATRIX), with a table at the end; needs root
	@if ((EUID != 0)); then echo "make test-matrix: needs root: run 'sudo make test-matrix'" >&2; exit 1; fi
	@$(call PREPARE,lab,$(LAB),headscale tailscale tailscale-trimmed cni-plugins $(addprefix headscale-,$(MATRIX))) \
		scripts/test-matrix headscale $(addprefix headscale-,$(MATRIX))

# Programs, images and our own image for a Kubernetes cluster on this machine.
KUBERNETES = containerd kubernetes
TAILSCALE = tailscale
WITH_CLUSTER = $(call PREPARE,e2e,$(LAB),headscale $(TAILSCALE) cni-plugins helm coredns oci $(KUBERNETES)) \
	HEADCNI_IMAGES=$$(test/tools/images); export HEADCNI_IMAGES; \
	$(MAKE) image IMAGE=headcni.local/headcni:e2e; export HEADCNI_IMAGE="$(CURDIR)/bin/headcni-image-$(ARCH).tar"; \
	export HEADCNI_TEST_REQUIRE=1;

.PHONY: e2e
e2e: KUBERNETES = containerd kubernetes kubernetes-e2e
e2e: need-go ## The chart on a real Kubernetes, with upstream's network conformance tests and some of NetworkPolicies; needs root, E2EFLAGS=-help
	@if ((EUID != 0)); then echo "make e2e: needs root: run 'sudo make e2e'" >&2; exit 1; fi
	@$(WITH_CLUSTER) go test -v -count 1 -timeout 40m -run 'TestSmoke$$' ./test/e2e/ -args -policies -conformance '$(CONFORMANCE)' $(E2EFLAGS)

CONFORMANCE ?= \[sig-network\].*\[Conformance\]

# What needs a cloud, the internet, SCTP or kube-proxy's iptables mode, and what is run by other targets.
.PHONY: e2e-network
e2e-network: KUBERNETES = containerd kubernetes kubernetes-e2e
e2e-network: need-go ## The rest of upstream's network tests, those that no certificate asks for; needs root
	@if ((EUID != 0)); then echo "make e2e-network: needs root: run 'sudo make e2e-network'" >&2; exit 1; fi
	@$(WITH_CLUSTER) go test -v -count 1 -timeout 60m -run 'TestSmoke$$' ./test/e2e/ -args -conformance '\[sig-network\]' \
		-skip '\[Conformance\]|Netpol|Feature:(LoadBalancer|Networking|PerformanceDNS|KubeProxyNFAcct|LocalhostNodePorts|SCTPConnectivity)|SCTP|Disruptive|Serial|Provider:' $(E2EFLAGS)

.PHONY: e2e-old
e2e-old: KUBERNETES = kubernetes-1.34
e2e-old: need-go ## The chart on an older Kubernetes (1.34) with Debian's containerd (1.6); needs root
	@if ((EUID != 0)); then echo "make e2e-old: needs root: run 'sudo make e2e-old'" >&2; exit 1; fi
	@$(WITH_CLUSTER) containerd=$$(test/tools/packages unpack containerd); \
		export HEADCNI_TOOLS="$$HEADCNI_TOOLS/kubernetes-1.34:$$containerd/usr/bin:$$HEADCNI_TOOLS"; \
		go test -v -count 1 -timeout 40m -run 'TestSmoke$$' ./test/e2e/ -args -versions 'kubelet v1\.34\..*containerd://1\.' $(E2EFLAGS)

# The focus of upstream's tests of NetworkPolicies, and which tests of test/e2e to run.
NETPOL ?= \[sig-network\] Netpol
RUN    ?= TestNetpol|TestPolicy
# The last commit that enforced no policies, which tests of upgrades begin with.
OLD    ?= 41a85b4

.PHONY: e2e-policy
e2e-policy: KUBERNETES = containerd kubernetes kubernetes-e2e
e2e-policy: need-go ## NetworkPolicies on a real Kubernetes: upstream's tests, starts, faults, an upgrade; needs root, RUN='TestNetpol/iptables' NETPOL=regexp
	@if ((EUID != 0)); then echo "make e2e-policy: needs root: run 'sudo make e2e-policy'" >&2; exit 1; fi
	@[[ -e bin/headcni-image-$(OLD)-$(ARCH).tar ]] || $(MAKE) image-at COMMIT='$(OLD)' IMAGE='headcni.local/headcni:$(OLD)'
	@$(WITH_CLUSTER) export HEADCNI_OLD_IMAGE="$(CURDIR)/bin/headcni-image-$(OLD)-$(ARCH).tar" HEADCNI_OLD_CHART="$(CURDIR)/bin/headcni-chart-$(OLD)"; \
		go test -v -count 1 -timeout 120m -run '$(RUN)' ./test/e2e/ -args -netpol '$(NETPOL)' $(E2EFLAGS)

.PHONY: e2e-policy-old
e2e-policy-old: KUBERNETES = kubernetes-1.34 kubernetes-e2e
e2e-policy-old: RUN = TestNetpol/nftables
e2e-policy-old: need-go ## The same on an older Kubernetes (1.34) with Debian's containerd (1.6); needs root
	@if ((EUID != 0)); then echo "make e2e-policy-old: needs root: run 'sudo make e2e-policy-old'" >&2; exit 1; fi
	@$(WITH_CLUSTER) containerd=$$(test/tools/packages unpack containerd); \
		export HEADCNI_TOOLS="$$HEADCNI_TOOLS/kubernetes-1.34:$$containerd/usr/bin:$$HEADCNI_TOOLS"; \
		go test -v -count 1 -timeout 60m -run '$(RUN)' ./test/e2e/ -args -netpol '$(NETPOL)' -versions 'kubelet v1\.34\..*containerd://1\.' $(E2EFLAGS)

.PHONY: e2e-faults
e2e-faults: need-go ## On a real Kubernetes: restarts, reboot, node loss, uninstall, stolen and stale nodes, metrics, other set-ups; half an hour
	@if ((EUID != 0)); then echo "make e2e-faults: needs root: run 'sudo make e2e-faults'" >&2; exit 1; fi
	@$(WITH_CLUSTER) go test -v -count 1 -timeout 60m -skip 'TestSmoke$$|TestNetpol$$|TestPolicy|TestNamesSpeed|TestSites$$|TestMigrate$$|TestClusters$$' ./test/e2e/ -args $(E2EFLAGS)

.PHONY: e2e-migrate
e2e-migrate: LAB += loopback
e2e-migrate: need-go ## docs/migration.md on a real Kubernetes: from a bridge with routes to HeadCNI, node by node, and back; needs root, 7 minutes
	@if ((EUID != 0)); then echo "make e2e-migrate: needs root: run 'sudo make e2e-migrate'" >&2; exit 1; fi
	@$(WITH_CLUSTER) go test -v -count 1 -timeout 30m -run 'TestMigrate$$' ./test/e2e/ -args $(E2EFLAGS)

.PHONY: e2e-names
e2e-names: need-go ## Names and services between pods and devices of the tailnet, on a real Kubernetes; needs root, 6 minutes, PROXY=iptables
	@if ((EUID != 0)); then echo "make e2e-names: needs root: run 'sudo make e2e-names'" >&2; exit 1; fi
	@$(WITH_CLUSTER) go test -v -count 1 -timeout 30m -run 'TestNames$$' ./test/e2e/ -args $(if $(PROXY),-proxy-mode '$(PROXY)') $(E2EFLAGS)

.PHONY: e2e-clusters
e2e-clusters: need-go ## Two real Kubernetes in one tailnet, which reach each other's pods and Services by address and name; needs root, 6 minutes
	@if ((EUID != 0)); then echo "make e2e-clusters: needs root: run 'sudo make e2e-clusters'" >&2; exit 1; fi
	@$(WITH_CLUSTER) go test -v -count 1 -timeout 30m -run 'TestClusters$$' ./test/e2e/ -args $(E2EFLAGS)

.PHONY: e2e-sites
e2e-sites: need-go ## A real Kubernetes whose nodes stand behind NAT and reach the API server by the tailnet only; needs root, 7 minutes
	@if ((EUID != 0)); then echo "make e2e-sites: needs root: run 'sudo make e2e-sites'" >&2; exit 1; fi
	@$(WITH_CLUSTER) go test -v -count 1 -timeout 30m -run 'TestSites$$' ./test/e2e/ -args $(E2EFLAGS)

.PHONY: e2e-up
e2e-up: TAILSCALE = tailscale-trimmed
e2e-up: need-go ## A Kubernetes with HeadCNI on this machine, left running to look at; needs root, E2EFLAGS=-help
	@if ((EUID != 0)); then echo "make e2e-up: needs root: run 'sudo make e2e-up'" >&2; exit 1; fi
	@$(WITH_CLUSTER) $(TRIMMED) go run ./test/e2e/up -image "$$HEADCNI_IMAGE" $(E2EFLAGS)

.PHONY: e2e-down
e2e-down: need-go ## End what e2e-up left running
	@go run ./test/e2e/up -down

# BENCH chooses among the benchmarks of test/bench and pkg/ipam; SCALE shortens those of test/bench.
BENCH ?= .
SCALE ?= 1

.PHONY: bench
bench: need-go ## Speed beside the reference plugins and the kernel alone, as tables; needs root, 12 minutes; BENCH=regexp SCALE=0.1
	@if ((EUID != 0)); then echo "make bench: needs root: run 'sudo make bench'" >&2; exit 1; fi
	@$(call PREPARE,bench,$(LAB),headscale tailscale tailscale-trimmed cni-plugins) export HEADCNI_TEST_REQUIRE=1; rm -f bin/bench.md; \
		go test -run '^$$' -bench '$(BENCH)' -benchtime 0.3s $(BENCHFLAGS) ./pkg/ipam/; \
		go test -run '^$$' -bench '$(BENCH)' -benchtime 1x -timeout 30m $(BENCHFLAGS) ./test/bench/ -args -scale '$(SCALE)' -table '$(CURDIR)/bin/bench.md'
	@if [[ -e bin/bench.md ]]; then echo "the tables are in bin/bench.md, as Markdown"; fi

.PHONY: bench-policy
bench-policy: need-go ## What NetworkPolicies cost: a packet, and to compile and apply up to 10,000 of them, as tables; needs root, takes 3 minutes; SCALE=0.1
	@$(MAKE) bench BENCH=Policy

.PHONY: bench-cold
bench-cold: need-go ## How long the first `make demo` takes on a clean clone, with no cache at all; TARGET=demo
	@scripts/bench-cold '$(or $(TARGET),demo)'

.PHONY: bench-profile
bench-profile: ## Where the time of one ADD goes, by strace; needs root
	@$(MAKE) bench BENCH=Profile

.PHONY: bench-rearm
bench-rearm: need-go ## How long pods are dark on first contact, after silence and after restarts of tailscaled, and without the daemon's pings, as tables; needs root, takes 40 minutes; TRIALS=45 JOINING=10 REARM=Contact
	@if ((EUID != 0)); then echo "make bench-rearm: needs root: run 'sudo make bench-rearm'" >&2; exit 1; fi
	@$(call PREPARE,demo,$(LAB),headscale tailscale-trimmed) $(TRIMMED) HEADCNI_TEST_REQUIRE=1 go test -v -count 1 -timeout 3h -run '$(REARM)' ./test/rearm/ -args \
		-trials $(or $(TRIALS),45) -joining $(or $(JOINING),10) -silence 200s -before 4

.PHONY: bench-faults
bench-faults: need-go ## What pods lose when one part after another breaks, as in docs/reliability.md; needs root, takes 25 minutes
	@if ((EUID != 0)); then echo "make bench-faults: needs root: run 'sudo make bench-faults'" >&2; exit 1; fi
	@$(call PREPARE,lab,$(LAB),headscale tailscale tailscale-trimmed cni-plugins) HEADCNI_TEST_REQUIRE=1 go test -v -count 1 -timeout 60m ./test/reliability/ -args -all $(FAULTFLAGS)

.PHONY: bench-names
bench-names: need-go ## How fast a pod is answered for names of the cluster and of the tailnet, on a real Kubernetes, as a table; needs root, takes 6 minutes
	@if ((EUID != 0)); then echo "make bench-names: needs root: run 'sudo make bench-names'" >&2; exit 1; fi
	@$(WITH_CLUSTER) go test -v -count 1 -timeout 40m -run 'TestNamesSpeed$$' ./test/e2e/ -args $(E2EFLAGS)

.PHONY: bench-services
bench-services: need-go ## How long a device reaches no Service when the node that leads there is cut off, as in docs/names.md; needs root, takes 8 minutes; FAILOVERS=9
	@if ((EUID != 0)); then echo "make bench-services: needs root: run 'sudo make bench-services'" >&2; exit 1; fi
	@$(call PREPARE,lab,$(LAB) headcni-controller,headscale tailscale tailscale-trimmed cni-plugins) HEADCNI_TEST_REQUIRE=1 go test -v -count 1 -timeout 60m \
		-run TestServicesFailOver ./test/tailnet/ -args -failovers $(or $(FAILOVERS),9)

.PHONY: bench-sites
bench-sites: need-go ## Nodes behind routers: which pairs meet directly and how soon, and how long pods are dark after routers forget, as tables in bin/sites.md; needs root, takes 15 minutes; TRIALS=5
	@if ((EUID != 0)); then echo "make bench-sites: needs root: run 'sudo make bench-sites'" >&2; exit 1; fi
	@$(call PREPARE,lab,$(LAB),headscale tailscale tailscale-trimmed) miniupnpd=$$(test/tools/packages unpack miniupnpd-nftables); export PATH="$$PATH:$$miniupnpd/usr/sbin"; \
		rm -f bin/sites.md; HEADCNI_TEST_REQUIRE=1 go test -v -count 1 -timeout 60m \
		-run 'TestRecovery' -bench . -benchtime 1x ./test/sites/ -args -trials $(or $(TRIALS),5) -table '$(CURDIR)/bin/sites.md'

.PHONY: bench-scale
bench-scale: need-go ## Headscale with hundreds of simulated nodes, and a node's daemon among 1,000, as tables in bin/scale.md; needs root, takes 30 minutes; NODES=100,250 BENCH=Daemon
	@if ((EUID != 0)); then echo "make bench-scale: needs root: run 'sudo make bench-scale'" >&2; exit 1; fi
	@$(call PREPARE,lab,$(LAB) headcni-controller,headscale-released tailscale tailscale-trimmed simnodes) rm -f bin/scale.md; HEADCNI_TOOLS="$$HEADCNI_TOOLS/released:$$HEADCNI_TOOLS" HEADCNI_TEST_REQUIRE=1 go test -run '^$$' -bench '$(BENCH)' -benchtime 1x \
		-timeout 90m ./test/scale/ -args $(if $(NODES),-nodes '$(NODES)') -table '$(CURDIR)/bin/scale.md'

.PHONY: chaos
chaos: need-go ## Faults at random, one and several at once, under a capture, with a table at the end; needs root, some 60 a minute; FAULTS=2000 SEED=7 FROM=120 ONLY='nft|ip rule'
	@if ((EUID != 0)); then echo "make chaos: needs root: run 'sudo make chaos'" >&2; exit 1; fi
	@$(call PREPARE,lab,$(LAB),headscale tailscale tailscale-trimmed cni-plugins) HEADCNI_TEST_REQUIRE=1 go test -v -count 1 -timeout 24h -run TestChaos ./test/chaos/ -args \
		-table -faults $(or $(FAULTS),300) -seed $(or $(SEED),0) -from $(or $(FROM),1) -only '$(ONLY)'

.PHONY: lint
lint: need-go vet ## gofmt, go vet, staticcheck, govulncheck, shellcheck, README.md against README_CN.md
	@unformatted=$$(gofmt -s -l cmd internal pkg test); if [[ -n $$unformatted ]]; then \
		printf 'make lint: not formatted, run make fmt:\n%s\n' "$$unformatted" >&2; exit 1; fi
	@tools=$$(test/tools/ensure staticcheck); "$$tools/staticcheck" ./...
	@scripts/vulncheck
	@$(call WITH_PACKAGES,lint) shellcheck -x -P SCRIPTDIR $$({ git ls-files -- '*.sh'; git grep -l '^#!/usr/bin/env bash'; } | sort -u)
	@go test -count=1 ./test/docs/ ./test/deps/

FUZZTIME ?= 5s
.PHONY: fuzz
fuzz: need-go ## Feed each decoder with mangled input for FUZZTIME (5s)
	@git grep -o '^func Fuzz[A-Za-z0-9]*' -- 'pkg/*_test.go' 'internal/*_test.go' | while IFS=: read -r file name; do \
		echo "$$(dirname "$$file") $${name#func }, $(FUZZTIME)"; \
		out=$$(go test -run '^$$' -fuzz "^$${name#func }$$" -fuzztime '$(FUZZTIME)' "./$$(dirname "$$file")" 2>&1 </dev/null) || { echo "$$out" >&2; exit 1; }; \
	done

.PHONY: vet
vet: need-go ## go vet
	@go vet ./...

.PHONY: fmt
fmt: need-go ## Format the code
	@gofmt -s -w cmd internal pkg test

.PHONY: tools
tools: need-go ## Build the pinned real parts (Headscale, tailscaled, ...) into the cache and print where they are
	@test/tools/ensure

.PHONY: install
install: ## Install onto this machine (as root), or below DESTDIR
	@[[ -x bin/headcni-daemon ]] || $(MAKE) build
	@DESTDIR='$(DESTDIR)' PREFIX='$(PREFIX)' CNI_BIN='$(CNI_BIN)' CNI_CONF='$(CNI_CONF)' UNITS='$(UNITS)' scripts/install

.PHONY: uninstall
uninstall: ## Take HeadCNI off this machine, and put back what was there
	@DESTDIR='$(DESTDIR)' PREFIX='$(PREFIX)' CNI_BIN='$(CNI_BIN)' CNI_CONF='$(CNI_CONF)' UNITS='$(UNITS)' scripts/uninstall

.PHONY: logo
logo: ## Render logo.png from docs/logo.svg (needs rsvg-convert)
	@rsvg-convert --width 512 --output logo.png docs/logo.svg

.PHONY: clean
clean: ## Remove bin/ and dist/
	@rm -rf bin dist

.PHONY: need-go
need-go:
	@command -v go >/dev/null || { echo "make: go is not on PATH: install Go 1.26 (https://go.dev/dl/) or add its bin folder to PATH" >&2; exit 1; }
