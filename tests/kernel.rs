//! Tests with the kernel's WireGuard. The host may not have the module, so they run in a
//! virtual machine, through `tests/vm.rs`:
//! `tests/vm/run -- target/debug/deps/integration-... kernel::`.

use std::process::Command;

use gambeson_mesh::desired::Implementation;

use gambeson::lab::{Family, Options};

use crate::apply::wireguard;
use crate::common::lab::lab_options;
use crate::lab::mesh::{assert_holds, assert_kills_lose_nothing};

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

fn lab(modes: &str) -> Options {
    Options { wireguard: modes.parse().unwrap(), ..lab_options() }
}

#[test]
fn a_lab_holds_over_kernel_devices() {
    assert_holds(Options { pods: Family::Dual, underlay: Family::Dual, ..lab("kernel") });
}

#[test]
fn a_lab_holds_between_kernel_and_userspace() {
    assert_holds(lab("node-1=kernel,node-2=userspace"));
}

#[test]
fn killing_every_agent_loses_no_packet() {
    assert_kills_lose_nothing(lab("kernel"));
}
