//! The pods of the chart, from the image, on nodes of a lab.

use std::time::Duration;

use gambeson_lab::traffic::{FlowReport, Rate, Traffic};
use gambeson_lab::{BIN_DIR, CONF_DIR, Lab, Options, Progress, WireguardMode};

use crate::chart::rendered;
use crate::common::container::{Container, Kubelet};
use crate::common::lab::lab_up;
use crate::common::scenario::{options, run};

fn kubelet(lab: &Lab) -> Kubelet {
    let (bin, conf) = (format!("cni.binDir={BIN_DIR}"), format!("cni.confDir={CONF_DIR}"));
    Kubelet::new(lab, rendered(&[&bin, &conf, "iface=eth0", "wireguard=userspace"]))
}

fn empty_lab() -> Lab {
    lab_up(Options { start: false, ..options(WireguardMode::Userspace) })
}

/// The agent's and the tunnel's pod of each node, once they are ready, with the lab's pods.
fn bring_up(lab: &Lab, kubelet: &Kubelet) -> Vec<[Container; 2]> {
    let start = |node| {
        ["gambeson", "gambeson-tunnel"].map(|daemon_set| kubelet.start(node, daemon_set, "first"))
    };
    let pods: Vec<_> = lab.nodes().into_iter().map(start).collect();
    for (node, containers) in lab.nodes().into_iter().zip(&pods) {
        containers.iter().for_each(Container::wait_until_ready);
        node.attach_pods().unwrap();
    }
    for node in lab.nodes() {
        node.wait_for_mesh().unwrap();
    }
    pods
}

#[test]
fn the_pods_of_the_chart_make_an_encrypted_mesh() {
    let lab = empty_lab();
    let kubelet = kubelet(&lab);
    let pods = bring_up(&lab, &kubelet);
    let verification = lab.verify(&Progress::silent()).unwrap();
    assert!(verification.ok, "{verification:#?}");
    for (node, [agent, _]) in lab.nodes().into_iter().zip(&pods) {
        let status = node.status().unwrap();
        assert!(status.errors.is_empty() && status.warnings.is_empty(), "{status}");
        // It can do what it says and no more: there is no other shell, and no other right.
        let text = agent.exec(&["/usr/bin/gambeson", "status"]);
        assert!(text.status.success());
        let rights = agent.exec(&["/usr/sbin/nft", "list", "tables"]);
        assert!(rights.status.success());
        // What `helm test` runs.
        let (content, log) = kubelet.complete(node, "gambeson-audit");
        assert!(content && log.contains("admission: enforced"), "{log}");
        // The plugins that came with the image let a runtime ask whether pods may start.
        let conflist = run(&node.environment(), &format!("cat {CONF_DIR}/10-flannel.conflist"));
        assert!(conflist.contains("\"cniVersion\": \"1.1.0\""), "{conflist}");
    }
}

#[test]
fn pods_that_are_killed_and_replaced_lose_nothing() {
    let lab = empty_lab();
    let kubelet = kubelet(&lab);
    let mut pods = bring_up(&lab, &kubelet);
    let pair = (lab.pod("pod-1-1").unwrap(), lab.pod("pod-2-1").unwrap());
    let rate = Rate { packets_per_second: 1000, payload: 256 };
    let traffic = Traffic::start(&[pair], rate).unwrap();
    let nodes = lab.nodes();

    // The container is killed, and the kubelet starts it again; then the pod is replaced.
    for (signal, uid) in [("KILL", "second"), ("TERM", "third")] {
        let [agent, tunnel] = pods.remove(0);
        agent.stop(signal);
        let agent = kubelet.start(nodes[0], "gambeson", uid);
        agent.wait_until_ready();
        pods.insert(0, [agent, tunnel]);
    }
    // kubectl rollout restart ds/gambeson: one node after the other.
    for (index, node) in nodes.iter().enumerate() {
        let [agent, tunnel] = pods.remove(index);
        agent.stop("TERM");
        let agent = kubelet.start(*node, "gambeson", "fourth");
        agent.wait_until_ready();
        pods.insert(index, [agent, tunnel]);
    }
    let reports = traffic.finish(Duration::from_secs(2));
    assert!(reports.iter().all(FlowReport::is_perfect), "{reports:#?}");
}

/// As the kubelet does it with maxSurge: the newer pod beside the older, which ends once the newer
/// is ready.
#[test]
fn a_tunnel_pod_is_replaced_without_losing_a_packet() {
    let lab = empty_lab();
    let kubelet = kubelet(&lab);
    let mut pods = bring_up(&lab, &kubelet);
    let node = lab.node("node-1").unwrap();
    let pair = (lab.pod("pod-1-1").unwrap(), lab.pod("pod-2-1").unwrap());
    let traffic = Traffic::start(&[pair], Rate::default()).unwrap();
    let newer = kubelet.start(node, "gambeson-tunnel", "second");
    std::thread::sleep(Duration::from_secs(1));
    let (ready, why) = newer.probe();
    assert!(!ready && why.contains("is still served by the older supervisor"), "{why}");
    // The agent has the newer one serve the devices of a new key.
    newer.wait_until_ready();
    let [agent, older] = pods.remove(0);
    older.stop("TERM");
    agent.wait_until_ready();
    assert!(newer.log().contains("serving a device"), "{}", newer.log());
    assert_eq!(node.status().unwrap().generation, Some(1));
    let reports = traffic.finish(Duration::from_secs(2));
    assert!(reports.iter().all(FlowReport::is_perfect), "{reports:#?}");
}

/// A pod that is deleted by hand: the device comes back, by the newer one, with the same key.
#[test]
fn a_tunnel_pod_that_ends_too_early_is_made_up_for() {
    let lab = empty_lab();
    let kubelet = kubelet(&lab);
    let mut pods = bring_up(&lab, &kubelet);
    let node = lab.node("node-1").unwrap();
    let [agent, older] = pods.remove(0);
    older.stop("TERM");
    let newer = kubelet.start(node, "gambeson-tunnel", "second");
    newer.wait_until_ready();
    agent.wait_until_ready();
    node.wait_for_mesh().unwrap();
    assert!(newer.log().contains("serving a device"), "{}", newer.log());
    assert_eq!(node.status().unwrap().generation, Some(0));
}
