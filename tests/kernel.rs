//! Tests with the kernel's WireGuard. The host may not have the module, so they run in a
//! virtual machine, through `tests/vm.rs`:
//! `tests/vm/run -- target/debug/deps/integration-... kernel::`.

mod mesh;

use std::process::Command;

use gambeson_mesh::desired::Implementation;

use crate::apply::wireguard;
use crate::tunnel::datapath;

#[test]
fn a_wireguard_link_can_be_made_and_configured() {
    let script = "set -e; ip link add wgt type wireguard; wg set wgt listen-port 51999; \
                  ip link set wgt up; test \"$(wg show wgt listen-port)\" = 51999";
    let output = Command::new("unshare").args(["--net", "sh", "-c", script]).output().unwrap();
    assert!(
        output.status.success(),
        "no kernel WireGuard here: run this test with tests/vm/run. {output:?}"
    );
}

#[test]
fn every_fallback_of_the_userspace_tunnel_speaks_with_the_kernel() {
    datapath::every_fallback_speaks_with_the_kernel();
}

#[test]
fn kernel_devices_follow_every_change() {
    wireguard::full_round(Implementation::Kernel);
}

#[test]
fn a_taken_port_is_named() {
    wireguard::taken_port(Implementation::Kernel);
}

#[test]
fn a_taken_name_is_left_alone() {
    wireguard::taken_name(Implementation::Kernel);
}

#[test]
fn hundreds_of_peers_and_thousands_of_prefixes_are_written_and_read() {
    wireguard::many_peers(Implementation::Kernel);
}
