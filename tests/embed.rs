//! The agent as a part of another program: the example, on a node of a lab.

use std::path::Path;

use gambeson_lab::{Options, WireguardMode};

use crate::common::agent::status_when;
use crate::common::lab::{GAMBESON, lab_up};
use crate::common::scenario::{assert_connected, fingerprint, options, run};

#[test]
fn a_program_with_the_agent_in_it_makes_the_node_a_part_of_the_mesh() {
    let lab = lab_up(Options { start: false, ..options(WireguardMode::Userspace) });
    let [one, two] = ["node-1", "node-2"].map(|name| lab.node(name).unwrap());
    two.start_agent().unwrap();
    let example = Path::new(GAMBESON).with_file_name("examples").join("embed");
    let command = format!(
        "{} --kubeconfig /run/gambeson/kubeconfig --cluster-cidr 10.244.0.0/16 --iface eth0 \\
         --cni-conf-dir {} --node-name node-1 --wireguard userspace --tunnel-program {GAMBESON} \\
         > /run/embed.log 2>&1 & echo $!",
        example.display(),
        gambeson_lab::CONF_DIR,
    );
    let pid = run(&one.environment(), &command);
    status_when(one, "is in the mesh", |status| status.ready && status.peers.len() == 1);
    for node in lab.nodes() {
        node.attach_pods().unwrap();
    }
    assert_connected(&lab, "node-1", "node-2");
    let before = fingerprint(one);
    let stop = format!("kill {pid}; while kill -0 {pid} 2>/dev/null; do sleep 0.05; done");
    run(&one.environment(), &stop.replace('\n', ""));
    let said = run(&one.environment(), "cat /run/embed.log");
    assert!(said.contains("node-1 is ready") && said.contains("guard stay"), "{said}");
    assert_eq!(fingerprint(one), before, "it took something with it");
    assert_connected(&lab, "node-1", "node-2");
}
