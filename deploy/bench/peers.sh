#!/bin/bash
# Puts the userspace WireGuards to compare with into a folder: wireguard-go from Debian sid,
# whose program is linked statically and runs on any Debian, boringtun-cli and gotatun from
# crates.io. What is there already stays.
#
# Usage: deploy/bench/peers.sh FOLDER
set -euo pipefail

mkdir -p "$1"
folder=$(realpath "$1")

# by_cargo CRATE VERSION PROGRAM
by_cargo() {
    [ -f "$folder/$3" ] && return
    cargo install --quiet --locked "$1" --version "$2" --root "$folder/cargo"
    mv "$folder/cargo/bin/$3" "$folder/"
    rm -r "${folder:?}/cargo"
    echo "$1 $2"
}
by_cargo boringtun-cli 0.7.1 boringtun-cli
by_cargo gotatun-cli 0.10.2 gotatun
[ -f "$folder/wireguard-go" ] && exit

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/lists/partial" "$work/cache/archives/partial"
key=/usr/share/keyrings/debian-archive-keyring.gpg
echo "deb [signed-by=$key] http://deb.debian.org/debian sid main" > "$work/sources.list"
apt() {
    apt-get --quiet=2 -o Dir::Etc::SourceList="$work/sources.list" -o Dir::Etc::SourceParts=- \
        -o Dir::State::Lists="$work/lists" -o Dir::Cache="$work/cache" \
        -o APT::Sandbox::User=root "$@"
}
apt update
(cd "$work" && apt download wireguard-go)
dpkg-deb --extract "$work"/wireguard-go_*.deb "$work/root"
install "$work/root/usr/bin/wireguard-go" "$folder/"
echo "wireguard-go: $(cd "$work" && echo wireguard-go_*.deb)"
