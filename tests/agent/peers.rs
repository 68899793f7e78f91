//! Hostile and broken Nodes: refused with a reason everywhere it can be looked for, while
//! every other peer, and the last good state of this one, goes on.

use gambeson::lab::Node;
use gambeson::lab::{Lab, Options};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::{Flows, annotate, annotation, eventually, holds, sh, until_status, userspace};
use crate::common::lab::lab_up;

const KEY: &str = "gambeson.io/public-key";

/// Whether node-1 refuses node-2 and keeps its last good state.
fn refused(node: &Node<'_>, says: &str) -> bool {
    node.status().is_ok_and(|status| {
        status.refused.iter().any(|r| r.name == "node-2" && r.kept && r.reason.contains(says))
    })
}

fn events(lab: &Lab) -> Vec<Value> {
    lab.api().unwrap().events().unwrap()
}

#[test]
fn hostile_annotations_refuse_one_peer_and_break_none() {
    let lab = lab_up(Options { nodes: 3, ..userspace() });
    let node = lab.node("node-1").unwrap();
    // Its agent would put everything right at once.
    lab.node("node-2").unwrap().agent().unwrap().signal(Signal::SIGSTOP);
    let good = annotation(&lab, "node-2", KEY).unwrap();
    let [own, third] = ["node-1", "node-3"].map(|name| annotation(&lab, name, KEY).unwrap());
    let flows = Flows::steady(&lab);
    let zero = format!("{}=", "A".repeat(43));
    let short = "A".repeat(40);
    let huge = "A".repeat(200 * 1024);
    for (key, value, says) in [
        (KEY, "not base64!", "public-key"),
        (KEY, short.as_str(), "public-key"),
        (KEY, zero.as_str(), "low-order"),
        (KEY, "AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=", "low-order"),
        (KEY, huge.as_str(), "public-key"),
        (KEY, own.as_str(), "key"),
        (KEY, third.as_str(), "key"),
        ("gambeson.io/key-generation", "-1", "key-generation"),
        ("gambeson.io/endpoint", "127.0.0.1", "endpoint"),
        ("gambeson.io/endpoint", "224.0.0.1", "endpoint"),
        ("gambeson.io/endpoint", "0.0.0.0", "endpoint"),
        ("gambeson.io/endpoint", "10.244.3.9", "inside the cluster network"),
        ("gambeson.io/endpoint", "example.org", "endpoint"),
        ("gambeson.io/port", "0", "port"),
        ("gambeson.io/port", "70000", "port"),
    ] {
        let before = annotation(&lab, "node-2", key);
        annotate(&lab, "node-2", &json!({ key: value }));
        eventually(&node, &format!("refused for {key}"), || refused(&node, says));
        annotate(&lab, "node-2", &json!({ key: before }));
        until_status(&node, &format!("accepted again after {key}"), |s| s.refused.is_empty());
    }
    annotate(&lab, "node-2", &json!({ KEY: null, "gambeson.io/key-generation": null }));
    eventually(&node, "refused without a key", || refused(&node, ""));
    annotate(&lab, "node-2", &json!({ KEY: good, "gambeson.io/key-generation": "0" }));
    until_status(&node, "accepted again", |status| status.refused.is_empty());
    flows.must_be_perfect();
    eventually(&node, "an Event says why", || {
        events(&lab).iter().any(|event| {
            let message = event["message"].as_str().unwrap_or_default();
            event["reason"] == "PeerRefused" && message.contains("low-order")
        })
    });
    assert!(holds(&node, "wg show gambeson0 peers | wc -l | grep -q 2"));
}

#[test]
fn a_generation_that_goes_back_is_refused() {
    let lab = lab_up(userspace());
    let node = lab.node("node-1").unwrap();
    lab.node("node-2").unwrap().agent().unwrap().signal(Signal::SIGSTOP);
    // The same key under a later number moves the session to another device.
    annotate(&lab, "node-2", &json!({ "gambeson.io/key-generation": "2" }));
    until_status(&node, "follows", |status| status.peers.iter().any(|p| p.key_generation == 2));
    annotate(&lab, "node-2", &json!({ "gambeson.io/key-generation": "1" }));
    eventually(&node, "refused", || refused(&node, ""));
    assert!(node.status().unwrap().peers.iter().all(|peer| peer.key_generation == 2));
}

#[test]
fn a_claimant_of_a_pod_cidr_is_refused_and_the_incumbent_stays() {
    let lab = lab_up(userspace());
    let node = lab.node("node-1").unwrap();
    let api = lab.api().unwrap();
    let flows = Flows::steady(&lab);
    for (name, cidr, says) in [
        ("thief", "10.244.2.0/24", "node-2"),
        ("greedy", "0.0.0.0/0", "0.0.0.0/0"),
        ("outsider", "192.0.2.0/24", "192.0.2.0/24"),
        ("wide", "10.244.0.0/16", "10.244.0.0/16"),
    ] {
        let claimant = json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": { "name": name, "annotations": {
                KEY: "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=",
                "gambeson.io/key-generation": "0",
                "gambeson.io/endpoint": "192.168.240.66",
                "gambeson.io/port": "51820",
                "gambeson.io/transports": "wireguard",
            }},
            "spec": { "podCIDR": cidr, "podCIDRs": [cidr] },
        });
        api.create_node(&claimant).unwrap();
        until_status(&node, &format!("{name} is refused"), |status| {
            let why = status.refused.iter().find(|refused| refused.name == name);
            why.is_some_and(|refused| refused.reason.contains(says) && !refused.kept)
        });
        api.delete_node(name).unwrap();
        until_status(&node, "and forgotten", |status| status.refused.is_empty());
    }
    flows.must_be_perfect();
}

#[test]
fn a_deleted_node_leaves_the_mesh_and_comes_back() {
    let lab = lab_up(userspace());
    let [node, other] = ["node-1", "node-2"].map(|name| lab.node(name).unwrap());
    let api = lab.api().unwrap();
    let object = api.node("node-2").unwrap();
    api.delete_node("node-2").unwrap();
    eventually(&node, "its peer is gone", || sh(&node, "wg show gambeson0 peers").is_empty());
    assert!(!holds(&node, "ip route | grep -q '^10.244.2.0/24'"));
    assert!(holds(&node, "! ping -c 1 -W 0.2 10.244.2.2"), "and nothing leaves in clear");
    let again = json!({
        "apiVersion": "v1", "kind": "Node", "metadata": { "name": "node-2" }, "spec": object["spec"],
    });
    api.create_node(&again).unwrap();
    eventually(&node, "it is back", || holds(&node, "ping -c 1 -W 0.2 10.244.2.2"));
    until_status(&other, "and so is its agent", |status| status.peers.len() == 1);
}
