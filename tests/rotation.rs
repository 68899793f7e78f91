//! A node's key is replaced while packets flow.

use std::process::{Command, Output};
use std::time::{Duration, Instant};

use gambeson::status::Status;
use gambeson_lab::traffic::{FlowReport, Rate, Traffic};
use gambeson_lab::wait::until;
use gambeson_lab::{Lab, Node, Options, Patch, Pod};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::common::agent::{eventually, status_when, userspace};
use crate::common::lab::{GAMBESON, both, lab_up};
use crate::common::scenario::{PATIENCE, assert_connected, dual, guard_drops, run, within};
use crate::soak::install;

pub(crate) mod tcp;

/// How long the last packets may take to arrive.
const GRACE: Duration = Duration::from_secs(2);
/// Names the step at which an agent ends, on its node.
const CRASH_AT: &str = "/run/gambeson-crash-at";

pub(crate) fn request(lab: &Lab, node: &str, text: &str) {
    let patch = json!({"metadata": {"annotations": {"config.gambeson.io/rotate": text}}});
    // An emulated machine may be too busy to answer in time.
    within(PATIENCE, "a request for a new key", || {
        lab.api().unwrap().patch_node(node, Patch::Merge, &patch).ok()
    });
}

/// Waits until a node uses the key of this generation alone, and says so.
pub(crate) fn rotated(node: Node<'_>, generation: u64) -> Status {
    status_when(node, &format!("uses key generation {generation}"), |status| {
        status.generation == Some(generation) && status.rotation.is_none()
    })
}

/// Waits until the rotation of a node is at this step.
fn at_step(node: Node<'_>, step: &str) -> Status {
    status_when(node, step, |status| status.rotation.as_ref().is_some_and(|r| r.step == step))
}

/// Packets both ways between all pods on different nodes.
pub(crate) fn all_pairs(lab: &Lab, packets_per_second: u32) -> Traffic {
    let pods = lab.pods();
    let of = |index: usize| pods[index..].iter().map(move |pod| (index, pod));
    let pairs: Vec<(Pod<'_>, Pod<'_>)> = (0..pods.len())
        .flat_map(of)
        .filter(|(index, other)| pods[*index].node().name() != other.node().name())
        .map(|(index, other)| (pods[index], *other))
        .collect();
    Traffic::start(&pairs, Rate { packets_per_second, ..Rate::default() }).unwrap()
}

pub(crate) fn assert_perfect(lab: &Lab, traffic: Traffic) {
    let reports = traffic.finish(GRACE);
    assert!(reports.iter().all(FlowReport::is_perfect), "{reports:#?}");
    for node in lab.nodes() {
        assert_eq!(guard_drops(node), (0, 0), "the guard of {} stopped packets", node.name());
    }
}

fn rotate(lab: &Lab, arguments: &[&str]) -> Output {
    let mut command = Command::new(GAMBESON);
    command.arg("rotate").args(arguments).arg("--kubeconfig").arg(lab.kubeconfig_path());
    command.output().unwrap()
}

fn condition(lab: &Lab, node: &str) -> Option<(String, String)> {
    let node = lab.api().unwrap().node(node).unwrap();
    let all = node["status"]["conditions"].as_array()?.clone();
    let condition = all.into_iter().find(|condition| condition["type"] == "RotationBlocked")?;
    let text = |name: &str| condition[name].as_str().unwrap_or_default().to_owned();
    Some((text("status"), text("message")))
}

fn events(lab: &Lab, reason: &str) -> Vec<String> {
    let events = lab.api().unwrap().events().unwrap();
    let of_reason = events.iter().filter(|event| event["reason"] == reason);
    of_reason.filter_map(|event| event["message"].as_str().map(str::to_owned)).collect()
}

/// No device, process or key is left of what was replaced.
pub(crate) fn assert_tidy(node: Node<'_>) {
    let environment = node.environment();
    let devices = run(&environment, "ip -o link show | grep -c ' gambeson[0-9]'");
    let devices: usize = devices.trim().parse().unwrap();
    assert!(devices <= 2, "{} has {devices} devices", node.name());
    assert_eq!(node.tunnels().len(), devices, "tunnels of {}", node.name());
    let keys = run(&environment, "cat /var/lib/gambeson/keys.json");
    let keys: Value = serde_json::from_str(&keys).unwrap();
    assert_eq!(keys["keys"].as_array().unwrap().len(), 1);
    let hidden = run(&environment, "ls -A /var/lib/gambeson");
    assert!(!hidden.contains("tmp"), "{hidden}");
}

#[test]
fn a_key_is_replaced_without_losing_a_packet() {
    let lab = lab_up(Options { nodes: 3, ..dual(userspace()) });
    let node = lab.node("node-1").unwrap();
    let traffic = all_pairs(&lab, 500);
    for generation in 1..=2 {
        let before = Instant::now();
        request(&lab, "node-1", &format!("now {generation}"));
        let step = at_step(node, "move").rotation.unwrap();
        assert_eq!((step.from, step.to, step.peers), (generation - 1, generation, 2), "{step:?}");
        rotated(node, generation);
        let took = before.elapsed();
        assert!(took < Duration::from_secs(15), "{took:?}");
    }
    assert_perfect(&lab, traffic);
    assert_tidy(node);
    let said = eventually(node, "Events", || {
        let said = events(&lab, "KeyRotated");
        (said.len() == 2).then_some(said)
    });
    assert!(said[0].contains("2 of 2 peers moved"), "{said:?}");
    let all = lab.api().unwrap().events().unwrap();
    assert!(all.iter().all(|event| event["type"] == "Normal"), "{all:#?}");
    assert_eq!(condition(&lab, "node-1"), None);
    let log = node.agent_log().unwrap();
    assert!(log.contains("key rotation begins") && log.contains("now 1"), "{log}");
    assert!(log.contains("the old key is erased"), "{log}");
}

#[test]
fn all_nodes_rotate_at_once_by_command() {
    let lab = lab_up(Options { nodes: 3, ..userspace() });
    let traffic = all_pairs(&lab, 500);
    let output = rotate(&lab, &["--all", "--wait"]);
    assert!(output.status.success(), "{}", both(&output));
    assert_eq!(both(&output).matches(": done, generation 1 after").count(), 3, "{}", both(&output));
    let output = rotate(&lab, &["node-1", "node-2", "--parallel", "1"]);
    assert!(output.status.success(), "{}", both(&output));
    let text = both(&output);
    let (first, second) = (text.find("node-1: done").unwrap(), text.find("node-2: asked").unwrap());
    assert!(first < second, "{text}");
    for (node, generation) in lab.nodes().into_iter().zip([2, 2, 1]) {
        rotated(node, generation);
        assert_tidy(node);
    }
    assert_perfect(&lab, traffic);
    for (arguments, says) in [
        (&["node-9"][..], "there is no Node node-9; nothing was asked for"),
        (&["node-1", "--all"], "cannot be used with"),
        (&[], "required"),
    ] {
        let output = rotate(&lab, arguments);
        assert_eq!(output.status.code(), Some(2), "{}", both(&output));
        assert!(both(&output).contains(says), "{}", both(&output));
    }
}

/// Its own agent ends after each step, and the next one goes on.
#[test]
fn a_crash_at_each_step_loses_nothing() {
    let agent_arguments = vec!["--crash-at".to_owned(), CRASH_AT.to_owned()];
    let lab = lab_up(Options { agent_arguments, ..userspace() });
    let node = lab.node("node-1").unwrap();
    let traffic = all_pairs(&lab, 500);
    let steps = ["keep", "stage", "say", "flip", "drain", "promote", "erase", "retire"];
    for (generation, step) in (1..).zip(steps) {
        run(&node.environment(), &format!("echo {step} > {CRASH_AT}"));
        request(&lab, "node-1", step);
        let ended = until(Instant::now() + Duration::from_secs(20), || {
            node.agent().is_none_or(|agent| !agent.is_alive()).then_some(())
        });
        assert!(ended.is_some(), "no crash at {step}\n{}", node.agent_log().unwrap());
        node.start_agent().unwrap();
        rotated(node, generation);
        assert_tidy(node);
    }
    assert_perfect(&lab, traffic);
}

#[test]
fn a_peer_that_answers_is_waited_for_and_one_that_does_not_is_not() {
    let lab = lab_up(Options { nodes: 3, ..userspace() });
    let [node, cut] = ["node-1", "node-2"].map(|name| lab.node(name).unwrap());
    let traffic = all_pairs(&lab, 200);
    // Its agent runs and hears nothing of the API server.
    let cut_off = "nft 'add table inet cut; add chain inet cut out { \
                   type filter hook output priority 0; }; add rule inet cut out tcp dport 6443 drop'";
    run(&cut.environment(), cut_off);
    request(&lab, "node-1", "now");
    let status = status_when(node, "is blocked", |status| {
        status.rotation.as_ref().is_some_and(|rotation| rotation.blocked)
    });
    let rotation = status.rotation.as_ref().unwrap();
    assert_eq!((rotation.moved, rotation.waiting[0].name.as_str()), (1, "node-2"), "{rotation:?}");
    assert!(status.to_string().contains("blocked by node-2"), "{status}");
    let said = eventually(node, "the condition", || {
        condition(&lab, "node-1").filter(|(status, _)| status == "True")
    });
    assert!(said.1.contains("node-2"), "{said:?}");
    eventually(node, "the Event", || {
        events(&lab, "RotationBlocked").iter().any(|said| said.contains("node-2")).then_some(())
    });
    run(&cut.environment(), "nft delete table inet cut");
    rotated(node, 1);
    eventually(node, "the condition", || {
        condition(&lab, "node-1").filter(|(status, _)| status == "False")
    });
    assert_perfect(&lab, traffic);
    // One whose cable is out.
    lab.node("node-3").unwrap().set_cable(false).unwrap();
    request(&lab, "node-1", "again");
    let status = status_when(node, "sees who is away", |status| {
        status.rotation.as_ref().is_some_and(|rotation| rotation.away == ["node-3"])
    });
    assert!(!status.rotation.unwrap().waiting.iter().any(|peer| peer.name == "node-3"));
    rotated(node, 2);
}

#[test]
fn agents_that_start_during_a_rotation_go_on_with_it() {
    let lab = lab_up(userspace());
    let nodes = ["node-1", "node-2"].map(|name| lab.node(name).unwrap());
    let traffic = all_pairs(&lab, 500);
    for name in ["node-1", "node-2"] {
        request(&lab, name, "now");
    }
    for node in nodes {
        at_step(node, "move");
    }
    // Devices and key store are all that they have for a while.
    lab.kill_api().unwrap();
    for node in nodes {
        node.kill_agent().unwrap();
        node.start_agent().unwrap();
        status_when(node, "waits for the Nodes", |status| {
            status.ready && status.waiting.is_some() && status.peers.len() == 1
        });
    }
    std::thread::sleep(Duration::from_secs(2));
    lab.start_api().unwrap();
    for node in nodes {
        rotated(node, 1);
        assert_tidy(node);
    }
    assert_perfect(&lab, traffic);
}

#[test]
fn a_disk_that_cannot_be_written_holds_a_rotation_up() {
    let lab = lab_up(userspace());
    let node = lab.node("node-1").unwrap();
    let traffic = all_pairs(&lab, 200);
    // Where the agent sees it.
    let mounts = |command: &str| {
        let agent = node.agent().unwrap().pid.to_string();
        let enter = ["-t", &agent, "-m", "sh", "-ec", command];
        assert!(Command::new("nsenter").args(enter).status().unwrap().success(), "{command}");
    };
    let with_folder = |command: &str| command.replace("$D", "/var/lib/gambeson");
    for (generation, lock, unlock) in [
        (1, "mount --bind $D $D; mount -o remount,bind,ro $D", "umount $D"),
        (
            2,
            "cp -a $D /tmp/full; mount -t tmpfs -o size=4k,mode=700 full $D; cp /tmp/full/keys.json $D",
            "umount $D; rm -r /tmp/full",
        ),
    ] {
        mounts(&with_folder(lock));
        request(&lab, "node-1", &format!("{generation}"));
        let status = status_when(node, "names the disk", |status| {
            status.errors.iter().any(|error| error.contains("full or read-only disk"))
        });
        assert_eq!((status.generation, status.rotation), (Some(generation - 1), None));
        mounts(&with_folder(unlock));
        rotated(node, generation);
    }
    assert_perfect(&lab, traffic);
}

#[test]
fn a_revoked_key_goes_whoever_uses_it() {
    let lab = lab_up(userspace());
    let [node, away] = ["node-1", "node-2"].map(|name| lab.node(name).unwrap());
    away.stop_agent().unwrap();
    let output = rotate(&lab, &["node-1", "--revoke", "--wait"]);
    assert!(output.status.success(), "{}", both(&output));
    assert!(both(&output).contains("packets under way with them may be lost"), "{}", both(&output));
    rotated(node, 1);
    assert_tidy(node);
    away.start_agent().unwrap();
    assert_connected(&lab, "node-1", "node-2");
}

/// The devices of a new key are served by the new program, and the old one ends with the old key.
#[test]
fn a_tunnel_program_is_upgraded_by_a_rotation() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let program = folder.path().join("gambeson");
    install(&program);
    let lab = lab_up(Options { binary: program.clone(), ..userspace() });
    let nodes = ["node-1", "node-2"].map(|name| lab.node(name).unwrap());
    let traffic = all_pairs(&lab, 500);
    for generation in 1..=2 {
        install(&program);
        let before = nodes.map(|node| node.tunnels());
        for node in nodes {
            node.restart_agent().unwrap();
        }
        for (node, before) in nodes.into_iter().zip(before) {
            rotated(node, generation);
            assert_tidy(node);
            assert!(node.tunnels().iter().all(|tunnel| !before.contains(tunnel)));
            assert!(node.agent_log().unwrap().contains("cause=\"upgrade\""));
        }
    }
    assert_perfect(&lab, traffic);
}

/// Its sessions are lost, and the other end is told by new ones before it sends anything.
#[test]
fn a_killed_tunnel_is_back_within_a_second_or_so() {
    let lab = lab_up(userspace());
    let [from, to] = ["pod-1-1", "pod-2-1"].map(|pod| lab.pod(pod).unwrap());
    // Nothing is sent back that would make WireGuard ask for a session.
    let silent = "nft 'add table inet silent; add chain inet silent out { \
                  type filter hook output priority 0; }; add rule inet silent out meta l4proto udp drop'";
    run(&to.environment(), silent);
    let traffic = Traffic::start(&[(from, to)], Rate::default()).unwrap();
    std::thread::sleep(Duration::from_secs(1));
    let node = lab.node("node-2").unwrap();
    node.tunnels().iter().for_each(|tunnel| tunnel.signal(Signal::SIGKILL));
    std::thread::sleep(Duration::from_secs(4));
    let reports = traffic.finish(GRACE);
    let report = reports.iter().find(|report| report.from == "pod-1-1").unwrap();
    assert!(report.lost > 0 && report.longest_gap_ms < 1500, "{report:#?}");
    eprintln!("{} packets of 1,000 each second were lost", report.lost);
    assert_eq!(node.status().unwrap().generation, Some(0));
}

/// Those two alone: everybody else reaches both.
#[test]
fn two_nodes_that_do_not_reach_each_other_hold_nobody_up() {
    let lab = lab_up(Options { nodes: 3, ..userspace() });
    let nodes = lab.nodes();
    let address = nodes[1].addresses()[0];
    let cut = format!(
        "nft 'add table inet cut; add chain inet cut in {{ type filter hook prerouting priority -400; }}; \
         add chain inet cut out {{ type filter hook output priority 0; }}; \
         add rule inet cut in ip saddr {address} udp dport 51820-51826 drop; \
         add rule inet cut out ip daddr {address} udp dport 51820-51826 drop'"
    );
    run(&nodes[0].environment(), &cut);
    let others = [("pod-1-1", "pod-3-1"), ("pod-2-1", "pod-3-1")]
        .map(|(from, to)| (lab.pod(from).unwrap(), lab.pod(to).unwrap()));
    let traffic = Traffic::start(&others, Rate::default()).unwrap();
    for node in &nodes[..2] {
        request(&lab, &node.name(), "now");
    }
    for node in &nodes[..2] {
        rotated(*node, 1);
    }
    assert_perfect(&lab, traffic);
    run(&nodes[0].environment(), "nft delete table inet cut");
    assert_connected(&lab, "node-1", "node-2");
}

/// Three of ten packets from one node get lost on their way to the other, and none back.
#[test]
fn loss_in_one_direction_does_not_stop_a_rotation() {
    let lab = lab_up(userspace());
    let nodes = lab.nodes();
    let loss = "nft 'add table inet loss; add chain inet loss in { type filter hook prerouting \
                priority -400; }; add rule inet loss in udp dport 51820-51826 \
                numgen random mod 10 < 3 drop'";
    run(&nodes[1].environment(), loss);
    let traffic = all_pairs(&lab, 200);
    for (node, generation) in [(0, 1), (1, 1), (0, 2)] {
        request(&lab, &nodes[node].name(), &format!("{generation}"));
        rotated(nodes[node], generation);
    }
    run(&nodes[1].environment(), "nft delete table inet loss");
    let reports = traffic.finish(GRACE);
    let (there, back) = (&reports[0], &reports[1]);
    assert_eq!(there.from, "pod-1-1");
    // What is answered or sent the other way, nothing takes.
    assert!(there.lost > 0 && there.received > there.sent / 2, "{there:#?}");
    assert!(back.is_perfect(), "{back:#?}");
    let traffic = all_pairs(&lab, 500);
    std::thread::sleep(Duration::from_secs(2));
    assert_perfect(&lab, traffic);
}

#[test]
fn nodes_join_and_leave_during_a_rotation() {
    let lab = lab_up(Options { nodes: 3, start: false, ..userspace() });
    let [one, two, three] = ["node-1", "node-2", "node-3"].map(|name| lab.node(name).unwrap());
    for node in [one, two] {
        node.start_agent().unwrap();
        node.attach_pods().unwrap();
    }
    assert_connected(&lab, "node-1", "node-2");
    // One that is there and does not follow holds the rotation.
    two.stop_agent().unwrap();
    request(&lab, "node-1", "now");
    status_when(one, "is blocked", |status| {
        status.rotation.as_ref().is_some_and(|rotation| rotation.blocked)
    });
    three.start_agent().unwrap();
    three.attach_pods().unwrap();
    assert_connected(&lab, "node-1", "node-3");
    let traffic = Traffic::start(
        &[(lab.pod("pod-1-1").unwrap(), lab.pod("pod-3-1").unwrap())],
        Rate::default(),
    );
    let traffic = traffic.unwrap();
    assert!(one.status().unwrap().rotation.is_some_and(|rotation| rotation.peers == 2));
    lab.api().unwrap().delete_node("node-2").unwrap();
    let status = rotated(one, 1);
    assert_eq!(status.peers.len(), 1);
    assert_perfect(&lab, traffic);
    assert_tidy(one);
}
