//! Starting: what an agent refuses, with which exit code, and what it waits for.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use gambeson::lab::Node;
use gambeson::lab::Patch;
use gambeson::lab::{Lab, Options};
use serde_json::json;

use super::{eventually, holds, sh, until_status, userspace};
use crate::common::lab::{GAMBESON, both, lab_up};

const CONFLIST: &str = "/run/cni/net.d/10-flannel.conflist";

/// A lab in which no agent has been started.
fn idle() -> Lab {
    lab_up(Options { start: false, nodes: 2, pods_per_node: 1, ..userspace() })
}

/// Runs an agent in the foreground, which must end with this code and say this.
fn must_end(node: &Node<'_>, prefix: &[&str], arguments: &[&str], code: i32, says: &[&str]) {
    let agent = ["timeout", "10", GAMBESON, "agent", "--node-name", "node-1"];
    let cluster = ["--kubeconfig", "/run/gambeson/kubeconfig", "--cluster-cidr", "10.244.0.0/16"];
    let mut command = [prefix, &agent, &cluster, &["--cni-conf-dir", "/run/cni/net.d"]].concat();
    for default in [["--iface", "eth0"], ["--wireguard", "userspace"]] {
        if !arguments.contains(&default[0]) {
            command.extend(default);
        }
    }
    command.extend(arguments);
    let output = node.exec(&command).unwrap();
    assert_eq!(output.status.code(), Some(code), "{}", both(&output));
    for part in says {
        assert!(both(&output).contains(part), "{part:?} is missing in {}", both(&output));
    }
    assert!(!holds(node, &format!("test -e {CONFLIST}")), "no pod may start");
}

#[test]
fn what_cannot_work_ends_the_agent_with_its_own_exit_code() {
    let lab = idle();
    let node = lab.node("node-1").unwrap();
    let unprivileged = ["setpriv", "--bounding-set=-net_admin"];
    must_end(&node, &unprivileged, &[], 6, &["CAP_NET_ADMIN"]);
    let without_tun =
        ["unshare", "-m", "sh", "-c", "mount -t tmpfs none /dev/net && exec \"$@\"", "-"];
    must_end(&node, &without_tun, &[], 5, &["/dev/net/tun", "modprobe tun"]);
    must_end(&node, &[], &["--transports", "vxlan"], 1, &["not supported by this version"]);
    must_end(&node, &[], &["--iface", "eth7"], 124, &["waiting for an underlay", "eth7"]);

    sh(&node, "ip link add gambeson0 type bridge");
    must_end(&node, &[], &[], 7, &["gambeson0", "left alone"]);
    assert!(holds(&node, "ip -d link show gambeson0 | grep -q bridge"), "it is still there");
    sh(&node, "ip link delete gambeson0");

    sh(&node, &format!("{GAMBESON} tunnel other0 && wg set other0 listen-port 51820"));
    must_end(&node, &[], &[], 4, &["UDP port 51820 is taken"]);
    must_end(&node, &[], &["--port", "51830", "--wireguard", "kernel"], 1, &["modprobe wireguard"]);
    sh(&node, "ip link delete other0");
    assert!(holds(&node, "nft list table inet gambeson"), "the guard was there before the failure");
}

#[test]
fn a_key_file_that_cannot_be_used_is_never_replaced() {
    let lab = idle();
    let node = lab.node("node-1").unwrap();
    let file = node.host_path(Path::new("/var/lib/gambeson/keys.json"));
    let folder = file.parent().unwrap();
    fs::create_dir_all(folder).unwrap();
    fs::set_permissions(folder, fs::Permissions::from_mode(0o700)).unwrap();
    for (contents, mode) in [("", 0o600), ("{}", 0o600), ("not json", 0o600), ("{}", 0o644)] {
        fs::write(&file, contents).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
        must_end(&node, &[], &[], 3, &["/var/lib/gambeson/keys.json", "remove it"]);
        assert_eq!(fs::read_to_string(&file).unwrap(), contents);
    }
}

#[test]
fn a_node_without_a_pod_cidr_waits_and_starts_no_pod() {
    let lab = idle();
    let api = lab.api().unwrap();
    let node = lab.node("node-1").unwrap();
    api.delete_node("node-1").unwrap();
    let bare = json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": "node-1" } });
    node.start_agent().unwrap();
    until_status(&node, "waits for its Node", |status| {
        status.waiting.as_ref().is_some_and(|w| w.contains("Node node-1 to be registered"))
    });
    api.create_node(&bare).unwrap();
    until_status(&node, "waits for a pod CIDR", |status| {
        !status.ready && status.waiting.as_ref().is_some_and(|w| w.contains("pod CIDR"))
    });
    assert!(node.agent_log().unwrap().contains("waiting for a pod CIDR of Node node-1"));
    assert!(!holds(&node, &format!("test -e {CONFLIST}")));
    assert!(holds(&node, "ip route show type unreachable | grep -q 10.244.0.0/16"));
    let cidr = json!({ "spec": { "podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24"] } });
    api.patch_node("node-1", Patch::Merge, &cidr).unwrap();
    eventually(&node, "ready once it has one", || holds(&node, &format!("test -e {CONFLIST}")));
}

#[test]
fn a_second_agent_on_a_node_is_refused() {
    let lab = idle();
    let node = lab.node("node-1").unwrap();
    node.start_agent().unwrap();
    until_status(&node, "ready", |status| status.ready);
    let command = [GAMBESON, "agent", "--cluster-cidr", "10.244.0.0/16", "--node-name", "node-1"];
    let kubeconfig = ["--kubeconfig", "/run/gambeson/kubeconfig"];
    let output = node.exec(&[&command[..], &kubeconfig].concat()).unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", both(&output));
    assert!(both(&output).contains("another gambeson agent"), "{}", both(&output));
}

#[test]
fn a_node_whose_key_file_is_lost_goes_on_from_the_published_generation() {
    let lab = idle();
    let node = lab.node("node-1").unwrap();
    node.start_agent().unwrap();
    until_status(&node, "first key", |status| status.generation == Some(0));
    eventually(&node, "published", || {
        super::annotation(&lab, "node-1", "gambeson.io/key-generation").as_deref() == Some("0")
    });
    node.stop_agent().unwrap();
    fs::remove_file(node.host_path(Path::new("/var/lib/gambeson/keys.json"))).unwrap();
    node.start_agent().unwrap();
    eventually(&node, "the next generation is published", || {
        super::annotation(&lab, "node-1", "gambeson.io/key-generation").as_deref() == Some("1")
    });
    until_status(&node, "uses it", |status| status.generation == Some(1));
}
