//! A machine that is switched off and on: no pod before its guard, and nobody else notices.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use gambeson_lab::traffic::{FlowReport, Rate, Traffic};
use gambeson_lab::{CONF_DIR, ConfList, Lab, Node, Options, WireguardMode};

use crate::common::agent::status_when;
use crate::common::lab::{GAMBESON, lab_up, stdout_of};
use crate::common::scenario::{assert_connected, options, run};

fn three() -> Options {
    Options { nodes: 3, ..options(WireguardMode::Userspace) }
}

fn has_guard(node: Node<'_>) -> bool {
    let script = "nft list chain inet gambeson guard_out";
    node.exec(&["sh", "-c", script]).unwrap().status.success()
}

/// Tries to start the node's pod as a kubelet does, as soon as there is a configuration, until
/// it gets a network; and what was said meanwhile.
fn start_pod(node: Node<'_>) -> Vec<String> {
    let mut said = Vec::new();
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        let guarded = has_guard(node);
        let tried = match ConfList::first_on(&node.environment()).unwrap() {
            Some(configuration) => node.attach(&configuration, node.pods()[0]),
            None => {
                said.push("no configuration".to_owned());
                std::thread::sleep(Duration::from_millis(20));
                continue;
            }
        };
        match tried {
            Ok(()) => {
                assert!(guarded || has_guard(node), "a pod without a guard");
                return said;
            }
            Err(error) => said.push(error.to_string()),
        }
        assert!(Instant::now() < end, "no network: {said:#?}");
    }
}

#[test]
fn after_a_reboot_no_pod_comes_before_the_guard() {
    let lab = lab_up(three());
    let node = lab.node("node-3").unwrap();
    let others = (lab.pod("pod-1-1").unwrap(), lab.pod("pod-2-1").unwrap());
    let rate = Rate { packets_per_second: 1000, payload: 256 };
    let traffic = Traffic::start(&[others], rate).unwrap();

    node.reboot().unwrap();
    assert!(!has_guard(node));
    // The link is there, and leads nowhere: for a runtime there is no network.
    let link = node.host_path(Path::new(CONF_DIR)).join("10-flannel.conflist");
    assert!(link.is_symlink());
    assert!(ConfList::first_on(&node.environment()).unwrap().is_none());
    // A runtime that has read the configuration before: the plugin itself refuses.
    let kept = run(&node.environment(), "cat /var/lib/gambeson/10-flannel.conflist");
    fs::write(node.host_path(Path::new("/run/gambeson/10-flannel.conflist")), kept).unwrap();
    let early = ConfList::first_on(&node.environment()).unwrap().unwrap();
    let refused = node.attach(&early, node.pods()[0]).unwrap_err().to_string();
    assert!(refused.contains("subnet.env"), "{refused}");
    run(&node.environment(), "rm /run/gambeson/10-flannel.conflist");

    let said = std::thread::scope(|scope| {
        let pod = scope.spawn(|| start_pod(node));
        std::thread::sleep(Duration::from_millis(300));
        node.start_agent().unwrap();
        pod.join().unwrap()
    });
    assert!(!said.is_empty());
    status_when(node, "is in the mesh", |status| status.peers.len() == 2);
    for other in ["node-1", "node-2"] {
        assert_connected(&lab, "node-3", other);
    }
    let reports = traffic.finish(Duration::from_secs(2));
    assert!(reports.iter().all(FlowReport::is_perfect), "{reports:#?}");
    // The old pod's lease is gone with it.
    let leases = run(&node.environment(), "ls /var/lib/cni/networks/cbr0");
    let leases = leases.lines().filter(|name| name.starts_with("10.244.")).count();
    assert_eq!(leases, 1);
}

#[test]
fn a_node_reboots_by_the_command() {
    let lab: Lab = lab_up(three());
    let name = lab.options().name.as_str();
    let key = |node: &str| lab.node(node).unwrap().status().unwrap().public_key;
    let before = key("node-2");
    let mut reboot = std::process::Command::new(GAMBESON);
    stdout_of(reboot.args(["lab", "reboot", "node-2", "--name", name]));
    assert_eq!(key("node-2"), before, "its keys are on disk");
    let mut verify = std::process::Command::new(GAMBESON);
    stdout_of(verify.args(["lab", "verify", "--name", name]));
}
