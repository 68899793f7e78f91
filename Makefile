# On a fresh Debian 12 with Rust, as root: `make lab` shows Gambeson at work, `make test` is
# what CI runs. Both install what they need.

SHELL := /bin/bash
TARGET := $(or $(CARGO_TARGET_DIR),target)

.DEFAULT_GOAL := help
.PHONY: help setup lab test unit check soak bench stages fuzz vm image manifests

help:   ## This list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

setup:  ## Install what building, testing and the lab need
	@deploy/setup/debian.sh

lab:    ## A cluster in network namespaces, up and verified: make lab ARGS="--family dual"
	@deploy/setup/debian.sh lab
	@cargo build --locked --release
	@deploy/setup/lab.sh $(TARGET)/release/gambeson $(ARGS)

test: setup check image   ## Everything that CI runs
	cargo test --locked --quiet --workspace --doc
	cargo nextest run --locked --workspace

check:  ## Formatting, lints, documentation, licences
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	cargo clippy --locked --package gambeson-tunnel --features internals --all-targets -- -D warnings
	cargo clippy --locked --manifest-path tunnel/fuzz/Cargo.toml --target-dir $(TARGET) -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps --lib
	cargo deny --locked check bans licenses sources

unit:   ## The tests that need no root, in seconds
	cargo test --locked --quiet --workspace --lib

image:  ## The container image: target/image/gambeson.tar, and what is in it
	@deploy/setup/debian.sh image
	@deploy/image/build

manifests:  ## deploy/*.yaml, from the chart
	@deploy/chart/manifests.sh

soak:   ## Rotations, kills, upgrades and outages under load: make soak MINUTES=10 RATE=50
	@deploy/setup/debian.sh
	GAMBESON_SOAK_SECONDS=$$((60 * $(or $(MINUTES),10))) GAMBESON_SOAK_RATE=$(or $(RATE),50) \
		cargo nextest run --locked --no-capture --test integration soak::

bench:  ## The tunnel's speed, and under attack, beside others: make bench ROUNDS=3 WHAT=speed
	@deploy/setup/debian.sh
	@deploy/bench/peers.sh $(TARGET)/bench
	cargo build --locked --release --package gambeson --package gambeson-bench
	for what in $(or $(WHAT),speed attack); do \
		$(TARGET)/release/gambeson-bench $$what --gambeson $(TARGET)/release/gambeson \
			--peers $(TARGET)/bench --rounds $(or $(ROUNDS),3) \
			--chart $(TARGET)/bench/performance.svg || exit; \
	done

stages: ## What each stage of the tunnel's data path does on one core, bytes/s
	cargo bench --locked --package gambeson-tunnel --features internals --bench stages

fuzz:   ## Fuzz datagrams, super-packets and the configuration socket: make fuzz EACH=600
	@deploy/fuzz/run $(TARGET)/fuzz $(or $(EACH),600)

vm:     ## The tests with the kernel's WireGuard, in a virtual machine
	@deploy/setup/debian.sh
	cargo nextest run --locked --test integration vm::
