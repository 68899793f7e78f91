//! Preshared keys, made of a secret that every node has in a file.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use gambeson_lab::traffic::FlowReport;
use gambeson_lab::{Lab, Node, Options};

use crate::common::agent::{eventually, peers, refusal, status_when, userspace};
use crate::common::lab::{lab_up, stdout_of};
use crate::common::scenario::{guard_drops, run};
use crate::rotation::{all_pairs, request, rotated};

/// Where the nodes have the secret.
const FILE: &str = "/run/gambeson-psk";

fn lab(nodes: u8) -> Lab {
    let agent_arguments = ["--psk-file", FILE].map(str::to_owned).into();
    lab_up(Options { nodes, start: false, agent_arguments, ..userspace() })
}

fn secret() -> String {
    stdout_of(Command::new("wg").arg("genpsk"))
}

fn give(node: Node<'_>, secret: &str) {
    std::fs::write(node.host_path(Path::new(FILE)), secret).unwrap();
}

/// The preshared keys that a node's devices have.
fn keys(node: Node<'_>) -> Vec<String> {
    let all = run(&node.environment(), "wg show all preshared-keys");
    all.lines().map(|line| line.rsplit('\t').next().unwrap().to_owned()).collect()
}

fn start(lab: &Lab) {
    lab.nodes().iter().for_each(|node| node.start_agent().unwrap());
    for node in lab.nodes() {
        eventually(node, "is ready", || node.status().ok()?.ready.then_some(()));
        node.attach_pods().unwrap();
    }
    lab.nodes().iter().for_each(|node| node.wait_for_mesh().unwrap());
}

#[test]
fn each_pair_has_a_key_of_its_own_and_another_secret_loses_nothing() {
    let lab = lab(3);
    let nodes = lab.nodes();
    let first = secret();
    nodes.iter().for_each(|node| give(*node, &first));
    start(&lab);
    let before = nodes.iter().map(|node| keys(*node)).collect::<Vec<_>>();
    let mut all: Vec<_> = before.concat();
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 3, "three pairs: {before:?}");
    assert!(!all.contains(&"(none)".to_owned()) && !all.contains(&first.trim().to_owned()));

    let traffic = all_pairs(&lab, 300);
    let second = secret();
    // The kubelets of a cluster write it one after the other.
    for node in &nodes {
        give(*node, &second);
        request(&lab, &node.name(), "look at the file");
        std::thread::sleep(Duration::from_millis(700));
    }
    for node in &nodes {
        rotated(*node, 1);
        eventually(*node, "forgets the first secret", || {
            let file = run(&node.environment(), "cat /var/lib/gambeson/keys.json");
            (!file.contains(first.trim()) && file.contains(second.trim())).then_some(())
        });
        let after = keys(*node);
        assert!(after.len() == 2 && !after.iter().any(|key| all.contains(key)), "{after:?}");
        let log = node.agent_log().unwrap();
        let said =
            [first.trim(), second.trim()].into_iter().chain(after.iter().map(String::as_str));
        for secret in said {
            assert!(!log.contains(secret), "a secret is in the log");
            assert!(!serde_json::to_string(&node.status().unwrap()).unwrap().contains(secret));
            assert!(!lab.api().unwrap().node(&node.name()).unwrap().to_string().contains(secret));
        }
    }
    let reports = traffic.finish(Duration::from_secs(2));
    assert!(reports.iter().all(FlowReport::is_perfect), "{reports:#?}");
    nodes.iter().for_each(|node| assert_eq!(guard_drops(*node), (0, 0)));
}

/// In a mesh that has had none, node by node.
#[test]
fn a_mesh_without_preshared_keys_gets_them_and_then_takes_no_node_without() {
    let lab = lab_up(Options { nodes: 2, ..userspace() });
    let nodes = lab.nodes();
    let traffic = all_pairs(&lab, 300);
    let secret = secret();
    for (index, node) in nodes.iter().enumerate() {
        give(*node, &secret);
        node.stop_agent().unwrap();
        node.start_agent_with(&["--psk-file", FILE]).unwrap();
        rotated(*node, 1);
        let has_some = keys(*node).iter().all(|key| key != "(none)");
        assert_eq!(has_some, index == 1, "only both together: {:?}", keys(*node));
    }
    let reports = traffic.finish(Duration::from_secs(2));
    assert!(reports.iter().all(FlowReport::is_perfect), "{reports:#?}");
    let stranger = crate::common::agent::stranger(9);
    lab.api().unwrap().create_node(&stranger).unwrap();
    let name = stranger["metadata"]["name"].as_str().unwrap();
    let status = status_when(nodes[0], "refuses it", |status| refusal(status, name).is_some());
    let refused = refusal(&status, name).unwrap();
    assert!(!refused.kept && refused.reason.contains("--psk-file"), "{refused:?}");
    assert_eq!(peers(&status), ["node-2"]);
}

#[test]
fn a_file_that_cannot_be_used_is_waited_for_and_later_makes_no_difference() {
    let lab = lab(1);
    let node = lab.nodes()[0];
    give(node, "pairwise something");
    node.start_agent().unwrap();
    status_when(node, "waits for the secret", |status| {
        status.waiting.as_ref().is_some_and(|waiting| waiting.contains("the word cluster"))
    });
    give(node, &secret());
    request(&lab, "node-1", "look at the file");
    status_when(node, "is ready", |status| status.ready && status.generation == Some(0));
    std::fs::remove_file(node.host_path(Path::new(FILE))).unwrap();
    request(&lab, "node-1", "look again");
    status_when(node, "says so", |status| {
        status.errors.iter().any(|error| error.contains("keeping the secret that this node has"))
    });
}
