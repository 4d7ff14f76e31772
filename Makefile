# Targets: build demo test race soak ci bench bench-dns bench-docker scale asm lint cross fuzz deb image docker-plugin tools clean
# Everything but Go, gcc, git and make is installed by `make tools` (Debian packages; needs root).

SHELL      := /bin/bash
VERSION    ?= $(shell git describe --always --dirty 2>/dev/null || echo devel)
LDFLAGS    := -s -w -X github.com/tulle-net/tulle/internal/version.number=$(VERSION)
BUILD      := CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)'
SUDO       := $(if $(filter 0,$(shell id -u)),,sudo -E env PATH=$$PATH)
# A count, not a time: go test fails when a time runs out at the wrong moment.
FUZZTIME   ?= 20000x
# Foreign software that the privileged tests run against.
PACKAGES   := iproute2 iputils-ping iperf3 ethtool tshark openvswitch-switch qemu-user-static nftables \
              containerd runc podman conmon netavark aardvark-dns containernetworking-plugins busybox-static iptables curl \
              ndisc6 iputils-arping bind9-dnsutils musl-tools systemd man-db uidmap slirp4netns fuse-overlayfs \
              docker.io docker-compose smcroute

.DEFAULT_GOAL := build
.PHONY: build demo test race soak ci bench bench-dns bench-docker scale asm lint cross fuzz deb image docker-plugin tools clean

build: bin/tulle

.PHONY: bin/tulle
bin/tulle:
	$(BUILD) -o $@ ./cmd/tulle

demo: bin/tulle
	$(SUDO) bin/tulle demo

tools:
	@$(SUDO) ./.ci/tools $(PACKAGES)

# Every test of up to a minute, the privileged ones too. Not from the cache: it
# does not see that e2e runs the binary. One package after the other: each loads
# both cores of a small machine.
test: tools bin/tulle
	$(SUDO) go test -count 1 -p 1 -timeout 20m $(GOTESTFLAGS) ./...

# All but e2e, which runs the binary, and what reads the sources; of the model of
# addresses, which is of one thread, a fifth.
race: tools
	$(SUDO) env TULLE_IPAM_HISTORIES=400 go test -race -count 1 -p 1 -timeout 20m $(GOTESTFLAGS) $$(go list ./... | grep -vE '/(e2e|archtest)')

# Longer ones, run before an issue is closed; property tests draw other values than
# in `test`, and more, and the fuzzers run for longer than in `ci`.
soak: tools bin/tulle
	$(SUDO) go test -tags soak -timeout 30m -count 1 ./e2e/...
	TULLE_IPAM_HISTORIES=30000 go test -timeout 30m -count 1 $$(git grep -l internal/proptest -- '*_test.go' | xargs -n 1 dirname | sort -u | sed 's,^,./,') -rapid.seed=$$(date +%s) -rapid.checks=1000
	./.ci/fuzz $(FUZZTIME)

# The assembly of the AEADs, which a module of its own generates.
AEAD := crypto/aead
ASM  := chacha gcm
asm:
	@for a in $(ASM); do f=$(AEAD)/$${a}_amd64.s; go -C $(AEAD)/asm run ./$$a >$$f.new && mv $$f.new $$f || exit 1; done

lint:
	@bad=$$(gofmt -l $$(git ls-files '*.go')); [ -z "$$bad" ] || { echo "gofmt: $$bad"; exit 1; }
	go vet ./...
	go vet -tags soak ./e2e/...
	go tool staticcheck ./...
	go -C $(AEAD)/asm vet ./...
	@for a in $(ASM); do go -C $(AEAD)/asm run ./$$a | cmp - $(AEAD)/$${a}_amd64.s || { echo "$${a}_amd64.s is not what $(AEAD)/asm makes: make asm"; exit 1; }; done

cross:
	@for a in amd64 arm64 arm riscv64; do echo "build linux/$$a"; \
	  GOARCH=$$a GOARM=7 $(BUILD) -o bin/tulle-linux-$$a ./cmd/tulle || exit 1; done

# Packages for Debian and its like, of four machines; in dist/.
deb: cross
	@packaging/share dist/share
	@for a in amd64:amd64 arm64:arm64 arm:armhf riscv64:riscv64; do packaging/deb $${a#*:} bin/tulle-linux-$${a%:*} dist/share dist || exit 1; done

# Container images, for docker load, podman load and ctr image import; no daemon is needed.
image: cross
	@mkdir -p dist
	@for a in amd64 arm64; do go run ./packaging/image -arch $$a -version $(VERSION) -o dist/tulle-image-$$a.tar bin/tulle-linux-$$a || exit 1; done

# A folder for `docker plugin create tulle/net:1 bin/docker-plugin`: the binary is its whole root.
docker-plugin: bin/tulle
	rm -rf bin/docker-plugin
	mkdir -p bin/docker-plugin/rootfs/run/docker/plugins bin/docker-plugin/rootfs/run/tulle bin/docker-plugin/rootfs/var/lib/tulle bin/docker-plugin/rootfs/var/run
	cp bin/tulle bin/docker-plugin/rootfs/tulle
	cp docker/plugin/config.json bin/docker-plugin/

fuzz:
	./.ci/fuzz $(FUZZTIME)

ci: tools
	./.ci/ci

# Plain and sealed, beside the kernel's vxlan, wireguard-go and nebula, in 25
# minutes at most; docs/performance.md says what BENCHFLAGS can be.
bench: tools bin/tulle
	$(BUILD) -o bin/bench ./bench
	$(SUDO) bin/bench -write docs/performance.md $(BENCHFLAGS)

# Containers of Docker, on Tulle's overlay beside the Swarm's own.
bench-docker: tools bin/tulle
	$(BUILD) -o bin/bench ./bench
	$(SUDO) bin/bench -peers swarm,swarm-encrypted,docker-plain,docker-aes -underlays nic -tests idle,tcp1,tcp4,udp64 \
		-mark bench-docker -write docs/performance.md $(BENCHFLAGS)

# A node's resolver beside CoreDNS; docs/dns.md says how.
bench-dns: bin/tulle
	@$(SUDO) ./.ci/tools dnsperf bind9-dnsutils
	$(BUILD) -o bin/bench ./bench
	$(SUDO) bin/bench -dns -write docs/dns.md $(BENCHFLAGS)

# A cluster of a thousand nodes, simulated: without root or a network, in some 9 GB;
# docs/scale.md says what SCALEFLAGS can be.
SCALEFLAGS ?= -nodes 1000 -overlays 50 -each 3
scale:
	GOGC=$(or $(GOGC),200) go test ./bench/scale -run TestMeasure -v -count 1 -timeout 6h -args -progress $(SCALEFLAGS)

clean:
	rm -rf bin dist
