//! Pairs whose transport changes while packets flow.

use std::time::Duration;

use gambeson_lab::traffic::{Rate, Traffic};
use gambeson_lab::{Lab, Node};

use crate::common::agent::status_when;
use crate::common::lab::lab_up;
use crate::common::scenario::{accept, accepting, dual};
use crate::leak::Watch;

/// Until the last packet has arrived.
const GRACE: Duration = Duration::from_secs(2);

fn lab(transports: &[&str]) -> Lab {
    lab_up(dual(accepting(transports)))
}

/// Tells the agent of a node, and waits until both ends of the pair have moved.
fn change(lab: &Lab, node: &str, list: &str, expected: &str) {
    accept(lab.node(node).unwrap(), list);
    all_moved(lab, expected);
}

/// Waits until every node uses this for every other.
pub(crate) fn all_moved(lab: &Lab, expected: &str) {
    for node in lab.nodes() {
        moved(node, expected);
    }
}

pub(crate) fn moved(node: Node<'_>, expected: &str) {
    status_when(node, &format!("uses {expected}"), |status| {
        status.peers.iter().all(|peer| peer.transport == expected) && status.errors.is_empty()
    });
}

#[test]
fn a_pair_changes_its_transport_without_losing_a_packet() {
    let all = "wireguard,host-gw,vxlan";
    let lab = lab(&[all]);
    let pair = (lab.pod("pod-1-1").unwrap(), lab.pod("pod-2-1").unwrap());
    for (node, list, expected) in [
        ("node-1", "vxlan", "vxlan"),
        ("node-1", "host-gw,vxlan", "host-gw"),
        ("node-1", all, "wireguard-userspace"),
        ("node-2", "host-gw,vxlan", "host-gw"),
        ("node-2", all, "wireguard-userspace"),
        ("node-1", "vxlan", "vxlan"),
        ("node-1", all, "wireguard-userspace"),
    ] {
        let traffic = Traffic::start(&[pair], Rate::default()).unwrap();
        change(&lab, node, list, expected);
        for report in traffic.finish(GRACE) {
            assert!(report.is_perfect(), "to {expected} by {node}: {report:#?}");
        }
    }
}

#[test]
fn an_agent_that_is_replaced_loses_nothing_in_clear() {
    for list in ["vxlan", "host-gw"] {
        let lab = lab(&[list]);
        let node = lab.node("node-1").unwrap();
        let pair = (lab.pod("pod-1-1").unwrap(), lab.pod("pod-2-1").unwrap());
        let traffic = Traffic::start(&[pair], Rate::default()).unwrap();
        for _ in 0..3 {
            node.kill_agent().unwrap();
            node.start_agent().unwrap();
            moved(node, list);
        }
        // One that is not told of any Node goes on with what it finds.
        lab.kill_api().unwrap();
        node.restart_agent().unwrap();
        status_when(node, "waits for the Nodes", |status| status.ready && status.waiting.is_some());
        lab.start_api().unwrap();
        moved(node, list);
        for report in traffic.finish(GRACE) {
            assert!(report.is_perfect(), "{list}: {report:#?}");
        }
    }
}

/// Options count, not what a former agent left.
#[test]
fn an_agent_that_no_longer_allows_what_is_in_clear_shuts_it_at_once() {
    let lab = lab(&["vxlan,wireguard", "node-2=vxlan"]);
    let node = lab.node("node-1").unwrap();
    moved(node, "vxlan");
    node.stop_agent().unwrap();
    lab.kill_api().unwrap();
    accept(node, "wireguard");
    node.start_agent().unwrap();
    let [one, two] = ["pod-1-1", "pod-2-1"].map(|pod| lab.pod(pod).unwrap());
    status_when(node, "waits for the Nodes", |status| status.waiting.is_some());
    let watch = Watch::start(&lab);
    for address in two.addresses() {
        assert!(!watch.canary(one, address));
    }
    watch.assert_silent();
}
