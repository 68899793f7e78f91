#!/bin/bash
# Installs what building, testing, the lab and the image need on Debian 12, where it is
# missing. What is there already, from wherever it came, is left alone. Cargo and root are
# taken for granted.
#
# Usage: deploy/setup/debian.sh [test|lab|image]      (test: everything)
set -euo pipefail

purpose=${1:-test}
PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin
# Versions that are known to work; any other that is installed already will do.
nextest=0.9.143
deny=0.20.2
auditable=0.7.7
auditable2cdx=0.1.0

missing=()

# by_command COMMAND PACKAGE
by_command() {
    command -v "$1" >/dev/null || missing+=("$2")
}

is_for() { # PURPOSE
    [ "$purpose" = "$1" ] || [ "$purpose" = test ]
}

by_command cc gcc
by_command jq jq
if is_for lab; then
    by_command ip iproute2
    by_command nft nftables
    by_command wg wireguard-tools
    by_command iperf3 iperf3
    by_command ping iputils-ping
    by_command tcpdump tcpdump
    by_command setpriv util-linux
    by_command ps procps
    # By the command, not by the package: other builds of kubectl conflict with Debian's.
    by_command kubectl kubernetes-client
    [ -x /usr/lib/cni/bridge ] || missing+=(containernetworking-plugins)
fi
if is_for image; then
    by_command git git
    by_command mmdebstrap mmdebstrap
    by_command buildah buildah
fi
if [ "$purpose" = test ]; then
    by_command qemu-system-x86_64 qemu-system-x86
    by_command wireguard-go wireguard-go
    by_command g++ g++
    by_command iptables-nft iptables
    by_command depmod kmod
    by_command runc runc
    by_command socat socat
    by_command ethtool ethtool
    by_command openssl openssl
    by_command npm npm
    python3 -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
    if ! command -v busybox >/dev/null || ldd "$(command -v busybox)" >/dev/null 2>&1; then
        missing+=(busybox-static)
    fi
fi

if [ ${#missing[@]} -gt 0 ]; then
    echo "setup: installing ${missing[*]}"
    if [ "$(id -u)" -ne 0 ]; then
        echo "setup: as root: apt-get install --no-install-recommends ${missing[*]}" >&2
        exit 1
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get -q update
    apt-get -q install -y --no-install-recommends "${missing[@]}"
fi

if ! command -v cargo >/dev/null; then
    echo "setup: cargo is missing: install Rust (https://rustup.rs)" >&2
    exit 1
fi

# by_cargo PROGRAM VERSION
by_cargo() {
    if ! command -v "$1" >/dev/null; then
        echo "setup: installing $1 $2 (takes some minutes, once)"
        cargo install --quiet --locked "$1" --version "$2"
    fi
}

if is_for image; then
    by_cargo cargo-auditable "$auditable"
    by_cargo auditable2cdx "$auditable2cdx"
fi
[ "$purpose" = test ] || exit 0

for component in rustfmt clippy; do
    command -v "cargo-${component/rustfmt/fmt}" >/dev/null || rustup component add "$component"
done
by_cargo cargo-nextest "$nextest"
by_cargo cargo-deny "$deny"

# These come from the network too: here, so that no test has to fetch them.
"$(dirname "$(realpath "$0")")/tools.sh" >/dev/null

# The kernel package comes from the network: here, so that no test has to fetch it.
if ! kernel=$("$(dirname "$(realpath "$0")")/../../tests/vm/prepare" 2>&1); then
    # The package list may be older than the packages on the mirror.
    apt-get -q update
    kernel=$("$(dirname "$(realpath "$0")")/../../tests/vm/prepare")
fi
echo "setup: ready; the tests' kernel is in $(tail -n 1 <<<"$kernel")"
