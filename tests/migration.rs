//! A cluster moves from Flannel to Gambeson, node by node, and back, while all pods talk.

use std::thread::sleep;
use std::time::Duration;

use gambeson_lab::traffic::{Rate, Traffic};
use gambeson_lab::{CONF_DIR, Lab, Node, Options, Patch};

use gambeson_mesh::node::Transport;
use serde_json::json;

use crate::changeover::all_moved;
use crate::common::agent::{eventually, status_when};
use crate::common::lab::{GAMBESON, lab_up};
use crate::common::scenario::{accept, accepting, dual, run};
use crate::rotation::{request, rotated};

/// Until the last packet has arrived.
const GRACE: Duration = Duration::from_secs(2);

/// A cluster of Flannel's, whose agents-to-be accept this.
pub(crate) fn flannels(nodes: u8, flannel_backend: Transport, transports: &str) -> Lab {
    let options = dual(accepting(&[transports]));
    lab_up(Options { nodes, flannel_nodes: nodes, flannel_backend, admission: false, ..options })
}

/// Numbered packets between all pairs of nodes, both ways, over both families.
fn traffic(lab: &Lab) -> Traffic {
    let pods = lab.pods();
    let pairs: Vec<_> = pods
        .iter()
        .enumerate()
        .flat_map(|(index, one)| pods[index + 1..].iter().map(move |other| (*one, *other)))
        .collect();
    Traffic::start(&pairs, Rate { packets_per_second: 50, payload: 256 }).unwrap()
}

fn assert_perfect(traffic: Traffic) {
    for report in traffic.finish(GRACE) {
        assert!(report.is_perfect(), "{report:#?}");
    }
}

fn to_gambeson(lab: &Lab, node: Node<'_>) {
    node.stop_agent().unwrap();
    node.start_agent().unwrap();
    let others = lab.nodes().len() - 1;
    status_when(node, "has every other node", |status| {
        status.ready && status.peers.len() == others && status.errors.is_empty()
    });
}

fn to_flannel(node: Node<'_>) {
    node.stop_agent().unwrap();
    let uninstall = "uninstall --allow-plaintext --to-flannel --cni-conf-dir";
    run(&node.environment(), &format!("{GAMBESON} {uninstall} {CONF_DIR}"));
    node.start_flannel().unwrap();
}

#[test]
fn a_cluster_moves_over_to_wireguard_and_back_without_losing_a_packet() {
    let lab = flannels(6, Transport::Vxlan, "wireguard,vxlan");
    let packets = traffic(&lab);
    for node in lab.nodes() {
        to_gambeson(&lab, node);
    }
    all_moved(&lab, "wireguard-userspace");
    assert_perfect(packets);
    for node in lab.nodes() {
        let left = run(&node.environment(), "ip -br link; ip route; nft list tables");
        assert!(!left.contains("flannel"), "{left}");
    }

    let packets = traffic(&lab);
    for node in lab.nodes() {
        accept(node, "vxlan");
    }
    all_moved(&lab, "vxlan");
    lab.nodes().into_iter().for_each(to_flannel);
    assert_perfect(packets);
    for node in lab.nodes() {
        let left = run(&node.environment(), "ip -br link; ip route; ip rule; nft list tables");
        assert!(left.contains("flannel.1") && left.contains("flannel-ipv4"), "{left}");
        assert!(!left.contains("gambeson") && !left.contains("proto 151"), "{left}");
    }
}

#[test]
fn direct_routes_are_taken_over_without_losing_a_packet() {
    let lab = flannels(3, Transport::HostGw, "wireguard,host-gw");
    let packets = traffic(&lab);
    for node in lab.nodes() {
        to_gambeson(&lab, node);
    }
    all_moved(&lab, "wireguard-userspace");
    for node in lab.nodes() {
        accept(node, "host-gw");
    }
    all_moved(&lab, "host-gw");
    lab.nodes().into_iter().for_each(to_flannel);
    assert_perfect(packets);
    let left = run(&lab.nodes()[0].environment(), "ip route; ip -6 route");
    assert!(left.contains("10.244.2.0/24 via 192.168.240.2") && !left.contains("151"), "{left}");
}

/// What people set for Flannel counts for both.
#[test]
fn an_overwritten_public_address_is_published_twice() {
    let lab = flannels(2, Transport::Vxlan, "vxlan");
    let node = lab.node("node-1").unwrap();
    let name = "flannel.alpha.coreos.com/public-ip-overwrite";
    let patch = json!({ "metadata": { "annotations": { name: "203.0.113.7" } } });
    lab.api().unwrap().patch_node("node-1", Patch::Merge, &patch).unwrap();
    node.stop_agent().unwrap();
    node.start_agent().unwrap();
    eventually(node, "publishes what was set", || {
        let node = lab.api().unwrap().node("node-1").unwrap();
        let annotations = &node["metadata"]["annotations"];
        let names = ["gambeson.io/endpoint", "flannel.alpha.coreos.com/public-ip"];
        names.iter().all(|name| annotations[name] == "203.0.113.7").then_some(())
    });
}

/// Flannel's device has to go before ours has its port, and the key is a new one: packets are
/// lost from the one until both ends have shaken hands again.
#[test]
fn wireguard_loses_less_than_a_second_per_node() {
    let lab = flannels(3, Transport::Wireguard, "wireguard");
    for node in lab.nodes() {
        let packets = traffic(&lab);
        to_gambeson(&lab, node);
        // Not while there is a node that cannot follow.
        request(&lab, &node.name(), "now");
        sleep(Duration::from_secs(2));
        let warnings = node.status().unwrap().warnings;
        let waits = warnings.iter().any(|warning| warning.contains("cannot follow"));
        assert_eq!(waits, node.name() != "node-3", "{warnings:?}");
        let pod = node.pods()[0].name();
        for report in packets.finish(GRACE) {
            let concerned = report.from == pod || report.to == pod;
            println!("{}: {} to {}, {} lost", node.name(), report.from, report.to, report.lost);
            assert!(report.longest_gap_ms < 1_000, "{report:#?}");
            assert!(concerned || report.is_perfect(), "{report:#?}");
        }
    }
    let packets = traffic(&lab);
    sleep(Duration::from_secs(1));
    lab.nodes().into_iter().for_each(|node| drop(rotated(node, 1)));
    assert_perfect(packets);
}
