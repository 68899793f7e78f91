//! A node's key is replaced while packets flow.

use std::time::Duration;

use gambeson::status::Status;
use gambeson_lab::traffic::{FlowReport, Rate, Traffic};
use gambeson_lab::{Lab, Node, Options, Patch, Pod};
use serde_json::json;

use crate::common::agent::{status_when, userspace};
use crate::common::lab::lab_up;
use crate::common::scenario::dual;

/// How long the last packets may take to arrive.
const GRACE: Duration = Duration::from_secs(2);

fn request(lab: &Lab, node: &str, text: &str) {
    let patch = json!({"metadata": {"annotations": {"config.gambeson.io/rotate": text}}});
    lab.api().unwrap().patch_node(node, Patch::Merge, &patch).unwrap();
}

/// Waits until a node uses the key of this generation alone, and says so.
fn rotated(node: Node<'_>, generation: u64) -> Status {
    status_when(node, &format!("uses key generation {generation}"), |status| {
        status.generation == Some(generation) && status.rotation.is_none()
    })
}

/// Packets both ways between all pods on different nodes.
fn all_pairs(lab: &Lab, packets_per_second: u32) -> Traffic {
    let pods = lab.pods();
    let of = |index: usize| pods[index..].iter().map(move |pod| (index, pod));
    let pairs: Vec<(Pod<'_>, Pod<'_>)> = (0..pods.len())
        .flat_map(of)
        .filter(|(index, other)| pods[*index].node().name() != other.node().name())
        .map(|(index, other)| (pods[index], *other))
        .collect();
    Traffic::start(&pairs, Rate { packets_per_second, ..Rate::default() }).unwrap()
}

fn assert_perfect(traffic: Traffic) {
    let reports = traffic.finish(GRACE);
    assert!(reports.iter().all(FlowReport::is_perfect), "{reports:#?}");
}

#[test]
fn a_key_is_replaced_without_losing_a_packet() {
    let lab = lab_up(Options { nodes: 3, ..dual(userspace()) });
    let traffic = all_pairs(&lab, 500);
    for generation in 1..=2 {
        request(&lab, "node-1", &format!("now {generation}"));
        rotated(lab.node("node-1").unwrap(), generation);
    }
    assert_perfect(traffic);
}
