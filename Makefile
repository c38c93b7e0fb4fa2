# The commands people use. `make help` lists them; scripts/ holds what they do.
# A target that needs a tool or a Debian package installs it when it is absent.

.DEFAULT_GOAL := help
CARGO ?= cargo

.PHONY: help
help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup
setup: ## install what is missing: softhsm2 opensc strace haproxy nginx libfaketime prometheus curl (Debian, sudo where not root), cargo-nextest, cargo-deny
	@scripts/setup.sh

.PHONY: setup-packages
setup-packages:
	@scripts/setup.sh packages

.PHONY: setup-tools
setup-tools:
	@scripts/setup.sh tools

.PHONY: build
build: setup-packages ## build hsm-node and hsmctl into target/debug
	$(CARGO) build --locked -p hsm-node -p admin-cli --bins

.PHONY: fix
fix: ## format, apply what clippy can mend by itself, write docs/cli.md anew; the only target that changes sources
	$(CARGO) clippy --workspace --all-targets --features failpoints --fix --allow-dirty --allow-staged
	$(CARGO) fmt --all
	UPDATE_DOCS=1 $(CARGO) test --quiet -p admin-cli docs

.PHONY: verify
verify: setup-packages setup-tools ## check without running tests: alerts, format, clippy, dependencies, documents; changes nothing
	@scripts/test.sh scripts alerts fmt clippy deny doc

.PHONY: test
test: ## everything that CI runs, with the wall time of each step
	@scripts/test.sh

.PHONY: advisories
advisories: setup-tools ## check dependencies against the advisory database (fetches it)
	$(CARGO) deny --locked check advisories

.PHONY: demo
demo: build ## the main job on a real cluster: encrypt, rotate, kill -9 of the leader, go on; under a minute once built
	@scripts/demo.sh

SEED ?= 1
MINUTES ?= 1
NODES ?= 3
FAULTS ?= all
PAUSE_MS ?= 2000
CHAOS = --seed $(SEED) --minutes $(MINUTES) --nodes $(NODES) --faults $(FAULTS) --pause-ms $(PAUSE_MS)

.PHONY: chaos
chaos: setup-packages ## break a cluster under load in every way, then check what was acknowledged (SEED=1 MINUTES=1 NODES=3 FAULTS=all PAUSE_MS=2000)
	@scripts/chaos.sh run $(CHAOS)

.PHONY: chaos-selftest
chaos-selftest: setup-packages ## show that each seeded bug is found by the oracle named for it, on real nodes; some eight minutes (BUG=name)
	@scripts/chaos.sh selftest $(if $(BUG),--bug $(BUG))

.PHONY: chaos-ci
chaos-ci: setup-packages ## what CI runs after `make test`: every seeded bug, and each of twenty kinds of faults once; some nine minutes, twelve at most, without the build
	@scripts/test.sh chaos

.PHONY: chaos-long
chaos-long: MINUTES := $(if $(filter file,$(origin MINUTES)),60,$(MINUTES))
chaos-long: SEED := $(if $(filter file,$(origin SEED)),$(shell date +%s),$(SEED))
chaos-long: setup-packages ## an hour of chaos, added to docs/chaos-record.json and docs/reliability.md, another SEED each time (MINUTES=60); FAULTS=kill-leader,kill-all makes it hundreds of kills
	@trap : INT TERM; status=0; scripts/chaos.sh run $(CHAOS) --record docs/chaos-record.json || status=$$?; \
	  scripts/chaos.sh record --into docs/reliability.md && exit $$status

.PHONY: rolling
rolling: build ## mix two releases; upgrade every node of three and five voters behind HAProxy and nginx under load: no request fails (PREVIOUS=path of an older hsm-node)
	@scripts/rolling.sh $(PREVIOUS)

.PHONY: membership
membership: setup-packages ## kill the leader at each step of every way to leave a cluster; some minutes
	$(CARGO) build --locked --quiet --workspace --bins --features failpoints
	$(CARGO) test --locked --quiet -p cluster-tests --features failpoints --test cluster -- --ignored --exact --nocapture \
	  member_kills::leaders_die_at_every_step_of_every_way_to_leave

.PHONY: fixture
fixture: build ## keep what this release writes for the tests of later ones, once for each release (NAME=2.0.0)
	@scripts/fixture.sh $(NAME)

SIM_SEEDS ?= 500
SIM_FIRST ?= 1

.PHONY: chaos-nightly
chaos-nightly: ## many simulated clusters, whose disks and network fail by chance (SIM_SEEDS=500 SIM_FIRST=1)
	HSM_SIM_SEEDS=$(SIM_SEEDS) HSM_SIM_FIRST=$(SIM_FIRST) \
	  $(CARGO) test --locked -p hsm-node --lib consensus::simulation -- --nocapture --test-threads 1

.PHONY: fuzz-api
fuzz-api: build ## ask a playground for what docs/openapi.json describes, and for what it forbids; three minutes (SEED=N; needs PyPI)
	@scripts/fuzz-api.sh

FUZZ_SECONDS ?= 60

.PHONY: fuzz
fuzz: setup-packages ## look for bytes that break a parser, FUZZ_SECONDS=60 for each of some forty (FUZZ="config envelope")
	@FUZZ_SECONDS=$(FUZZ_SECONDS) scripts/fuzz.sh $(FUZZ)

.PHONY: dev
dev: build ## start a cluster to play with, and say what to try
	@scripts/dev.sh up

.PHONY: dev-down
dev-down: ## stop that cluster; its data stays
	@scripts/dev.sh down

.PHONY: release
release: setup-packages ## pack optimised binaries into target/package; refuses binaries with failpoints
	@scripts/release.sh

.PHONY: clean
clean: ## stop and remove the cluster of `make dev`, and everything built
	@if [ -d "$${HSM_DEV_DIR:-.dev}" ]; then scripts/dev.sh clean; fi
	$(CARGO) clean
