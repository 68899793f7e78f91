//! A flood at a node's tunnel, beside what its pods say to each other: no packet of theirs is
//! lost.

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use gambeson_bench::stranger::{Flood, Stranger};
use gambeson_lab::{Lab, Options};

use crate::common::agent::userspace;
use crate::common::lab::lab_up;
use crate::rotation::{all_pairs, assert_perfect};

/// At the last node's address, and no peer by its key.
fn stranger(lab: &Lab) -> Stranger {
    let nodes = lab.nodes();
    let node = lab.api().unwrap().node("node-1").unwrap();
    let key = node["metadata"]["annotations"]["gambeson.io/public-key"].as_str().unwrap();
    let key = STANDARD.decode(key).unwrap().try_into().unwrap();
    let target = SocketAddr::new(nodes[0].addresses()[0], 51820);
    let attacker = nodes[nodes.len() - 1];
    let from = SocketAddr::new(attacker.addresses()[0], 0);
    let socket = attacker.netns().run(|| UdpSocket::bind(from)).unwrap().unwrap();
    socket.connect(target).unwrap();
    Stranger::new(socket, key).unwrap()
}

fn loses_nothing(what: Flood, per_second: u64) {
    let lab = lab_up(Options { nodes: 3, ..userspace() });
    let mut stranger = stranger(&lab);
    let traffic = all_pairs(&lab, 500);
    let sent = stranger.flood(what, per_second, Duration::from_secs(5)).unwrap();
    assert!(sent > per_second, "{sent} in 5 s are no flood");
    assert_perfect(&lab, traffic);
}

#[test]
fn a_flood_of_handshakes_with_cookies_costs_no_packet() {
    loses_nothing(Flood::Handshakes, 40_000);
}

#[test]
fn a_flood_of_garbage_costs_no_packet() {
    // As many as two processors carry beside the lab, without optimisation.
    loses_nothing(Flood::Garbage, 100_000);
}
