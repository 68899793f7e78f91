//! The agent across losses: its key file, its own Node, a peer's Node, and time.

use std::fs;
use std::path::Path;

use gambeson_lab::{Lab, Node, Options, Patch};
use nix::sys::signal::Signal;
use serde_json::json;

use crate::common::agent::{eventually, peers, status_when, userspace};
use crate::common::lab::lab_up;

fn published_generation(lab: &Lab, node: &str) -> Option<String> {
    let node = lab.api().unwrap().node(node).unwrap();
    node["metadata"]["annotations"]["gambeson.io/key-generation"].as_str().map(str::to_owned)
}

fn holds(node: Node<'_>, script: &str) -> bool {
    node.exec(&["sh", "-c", script]).unwrap().status.success()
}

#[test]
fn a_node_whose_key_file_is_lost_goes_on_from_the_published_generation() {
    let lab = lab_up(Options { pods_per_node: 1, ..userspace() });
    let [node, other] = ["node-1", "node-2"].map(|name| lab.node(name).unwrap());
    assert_eq!(published_generation(&lab, "node-1").as_deref(), Some("0"));
    node.stop_agent().unwrap();
    fs::remove_file(node.host_path(Path::new("/var/lib/gambeson/keys.json"))).unwrap();
    node.start_agent().unwrap();
    eventually(node, "the next generation is published", || {
        (published_generation(&lab, "node-1").as_deref() == Some("1")).then_some(())
    });
    status_when(other, "the peer follows", |status| {
        status.refused.is_empty() && status.peers.iter().any(|peer| peer.key_generation == 1)
    });
    eventually(node, "a path with the new key", || {
        holds(node, "ping -c 1 -W 0.2 10.244.2.2").then_some(())
    });
}

#[test]
fn a_deleted_node_leaves_the_mesh_and_comes_back() {
    let lab = lab_up(Options { pods_per_node: 1, ..userspace() });
    let [node, other] = ["node-1", "node-2"].map(|name| lab.node(name).unwrap());
    let api = lab.api().unwrap();
    let spec = api.node("node-2").unwrap()["spec"].clone();
    api.delete_node("node-2").unwrap();
    status_when(node, "the peer is gone", |status| peers(status).is_empty());
    assert!(holds(node, "! ip route | grep -q '^10.244.2.0/24'"));
    assert!(holds(node, "! ip route get 10.244.2.2 2>/dev/null"), "no other route takes over");
    status_when(other, "an agent without its Node waits and keeps its peers", |status| {
        status.waiting.as_ref().is_some_and(|w| w.contains("node-2")) && peers(status) == ["node-1"]
    });
    let again = json!({
        "apiVersion": "v1", "kind": "Node", "metadata": { "name": "node-2" }, "spec": spec,
    });
    api.create_node(&again).unwrap();
    status_when(node, "the peer is back", |status| peers(status) == ["node-2"]);
    eventually(node, "and reachable", || holds(node, "ping -c 1 -W 0.2 10.244.2.2").then_some(()));
}

/// SIGSTOP and SIGCONT stand in for a machine that is too busy to run the agent.
#[test]
fn an_agent_that_slept_acts_on_the_newest_state() {
    let lab = lab_up(Options { pods_per_node: 1, ..userspace() });
    let node = lab.node("node-1").unwrap();
    let agent = node.agent().unwrap();
    agent.signal(Signal::SIGSTOP);
    for seconds in 60..80 {
        let wish = json!({ "metadata": { "annotations": {
            "config.gambeson.io/persistent-keepalive": seconds.to_string(),
        }}});
        lab.api().unwrap().patch_node("node-2", Patch::Merge, &wish).unwrap();
    }
    agent.signal(Signal::SIGCONT);
    eventually(node, "the newest keepalive", || {
        holds(node, "wg show gambeson0 persistent-keepalive | grep -qw 79").then_some(())
    });
}
