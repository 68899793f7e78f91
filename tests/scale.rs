//! A thousand nodes, of which a few are real.

use std::time::{Duration, Instant};

use gambeson_keys::PrivateKey;
use gambeson_lab::traffic::{FlowReport, Rate, Traffic};
use gambeson_lab::{Lab, Node};
use serde_json::{Value, json};

use crate::common::agent::userspace;
use crate::common::lab::lab_up;
use crate::common::scenario::{PATIENCE, run, within};
use crate::rotation::{request, rotated};

const NODES: u32 = 1000;
const CHURN: u32 = 100;
const ROUNDS: u32 = 5;

/// A Node whose agent nobody will ever hear of. Each place has pods of its own.
fn elsewhere(place: u32, round: u32) -> Value {
    let (third, fourth) = (4 + place / 4, place % 4 * 64);
    let cidr = format!("10.244.{third}.{fourth}/26");
    json!({
        "kind": "Node",
        "apiVersion": "v1",
        "metadata": {
            "name": format!("elsewhere-{place}-{round}"),
            "annotations": {
                "gambeson.io/public-key": PrivateKey::generate().public().to_string(),
                "gambeson.io/key-generation": "0",
                "gambeson.io/endpoint": format!("192.168.{}.{}", 241 + place / 250, 1 + place % 250),
                "gambeson.io/port": "51820",
                "gambeson.io/transports": "wireguard",
                "gambeson.io/mtu": "1440",
            },
        },
        "spec": { "podCIDR": cidr, "podCIDRs": [cidr] },
    })
}

fn routes(node: Node<'_>) -> u32 {
    run(&node.environment(), "ip route show proto 151 | grep -c /26").trim().parse().unwrap()
}

fn all_routed(lab: &Lab, names: &[String]) {
    for node in lab.nodes() {
        let mut seen = 0;
        within(PATIENCE, "all Nodes are routed", || {
            let status = node.status().ok()?;
            seen = routes(node);
            let is_peer = |name: &String| status.peers.iter().any(|peer| peer.name == *name);
            (seen == NODES && names.iter().all(is_peer)).then_some(())
        });
    }
}

/// Nodes come and go, and a key is replaced though none of them answers.
#[test]
fn a_thousand_nodes_of_which_a_tenth_changes() {
    let lab = lab_up(userspace());
    let api = lab.api().unwrap();
    for place in 0..NODES {
        api.create_node(&elsewhere(place, 0)).unwrap();
    }
    all_routed(&lab, &[]);
    let pair = (lab.pod("pod-1-1").unwrap(), lab.pod("pod-2-1").unwrap());
    let rate = Rate { packets_per_second: 200, ..Rate::default() };
    let traffic = Traffic::start(&[pair], rate).unwrap();
    for round in 1..=ROUNDS {
        let first = (round - 1) * CHURN;
        let mut names = Vec::new();
        for place in first..first + CHURN {
            api.delete_node(&format!("elsewhere-{place}-0")).unwrap();
            let node = elsewhere(place, round);
            names.push(node["metadata"]["name"].as_str().unwrap().to_owned());
            api.create_node(&node).unwrap();
        }
        all_routed(&lab, &names);
    }
    let start = Instant::now();
    request(&lab, "node-1", "now");
    let node = lab.node("node-1").unwrap();
    within(Duration::from_secs(45), "the key is replaced", || {
        let status = node.status().ok()?;
        (status.generation == Some(1) && status.rotation.is_none()).then_some(())
    });
    eprintln!("a key replaced among {NODES} nodes that do not answer: {:?}", start.elapsed());
    rotated(node, 1);
    let reports = traffic.finish(Duration::from_secs(2));
    assert!(reports.iter().all(FlowReport::is_perfect), "{reports:#?}");
}
