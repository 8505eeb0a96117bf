# What people do here. `make` alone lists it.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

# Namespaces, ports and cores are shared by the tests that send packets: one at a time.
export RUST_TEST_THREADS ?= 1

.PHONY: help
help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-18s %s\n", $$1, $$2}'

.PHONY: setup-lab
setup-lab: ## Install what the lab needs (Debian packages, the eBPF toolchain)
	@hack/setup.sh lab

.PHONY: setup
setup: ## Install what building and all tests need
	@hack/setup.sh test

.PHONY: lab
lab: setup-lab ## Set up, build, and run the lab with a fail-over
	cargo build --workspace --bins
	target/debug/landfall lab

.PHONY: test
test: setup ## Set up and pass all tests
	cargo build --workspace --bins
	cargo test --workspace --no-fail-fast -- --show-output

.PHONY: build
build: ## Build the binaries for production
	cargo build --release --workspace --bins

.PHONY: fmt
fmt: ## Format
	cargo fmt --all
	cargo fmt --manifest-path ebpf/programs/Cargo.toml

.PHONY: lint
lint: ## Format check, clippy with warnings denied, docs with warnings denied
	cargo fmt --all --check
	cargo fmt --manifest-path ebpf/programs/Cargo.toml --check
	cargo clippy --workspace --all-targets -- -D warnings
	cargo clippy -p landfall-speaker --features bench --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --document-private-items

.PHONY: bench-speaker
bench-speaker: setup-lab ## Idle cost of a speaker with 1 000 VIPs (release build, in the lab)
	cargo build --release --workspace --bins
	cargo run --release -q -p landfall-tests --example bench-speaker

.PHONY: bench-controller
bench-controller: setup ## What it takes to give 1 000 and 10 000 Services addresses (release build, real API server)
	cargo build --release --workspace --bins
	cargo run --release -q -p landfall-tests --example bench-controller 1000
	cargo run --release -q -p landfall-tests --example bench-controller 10000

.PHONY: bench-ingress
bench-ingress: setup ## What steering costs a packet, alone and beside kube-proxy; tables and memory (target/bench/ingress.json)
	cargo test -q --release -p landfall-speaker --features bench --lib datapath::tests::cost -- --nocapture
	cargo run --release -q -p landfall-tests --example bench-ingress

.PHONY: bench-egress
bench-egress: setup ## What an egress gateway costs a packet and a new connection, beside nftables (target/bench/egress.json)
	cargo test -q --release -p landfall-speaker --features bench --lib datapath::tests::gateway::cost -- --nocapture
	cargo run --release -q -p landfall-speaker --features bench --example bench-egress

.PHONY: deny
deny: ## Licences, sources and duplicate crates (needs cargo-deny)
	cargo deny check bans licenses sources

.PHONY: crds
crds: ## Generate the chart's CRDs from the API types
	cargo run -q -p landfall-api --example crds

.PHONY: clean-lab
clean-lab: ## Remove what a lab left behind
	target/debug/landfall lab down
