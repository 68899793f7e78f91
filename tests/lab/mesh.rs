//! A whole lab: agents, tunnels, pods, and what `lab verify` says of them.

use std::process::Command;
use std::time::{Duration, Instant};

use gambeson_lab::wait::until;
use gambeson_lab::{Family, Lab, Options, Progress, WireguardMode, WireguardModes};

use crate::common::lab::{GAMBESON, both, chain, lab_options, lab_up, stdout_of};

fn userspace() -> Options {
    Options { wireguard: WireguardModes::all(WireguardMode::Userspace), ..lab_options() }
}

fn verify(lab: &Lab) -> gambeson_lab::verify::Verification {
    lab.verify(&Progress::silent()).unwrap_or_else(|error| panic!("{}", chain(&error)))
}

/// A lab with these options passes every check, and every pair uses what it should.
pub(crate) fn assert_holds(options: Options) {
    let modes = options.wireguard.clone();
    let (families, mtu) = (if options.pods == Family::Dual { 2 } else { 1 }, options.pod_mtu());
    let (nodes, pods) = (usize::from(options.nodes), usize::from(options.pods_per_node));
    let lab = lab_up(options);
    let result = verify(&lab);
    assert!(result.ok, "{result}");
    let pods = nodes * pods;
    assert_eq!((result.nodes, result.pods), (nodes, pods));
    assert_eq!(result.pairs.len(), pods * (pods - 1) * families);
    let found = result.mtu.as_ref().unwrap();
    assert_eq!((found.largest_ok, found.first_refused), (Some(mtu), Some(mtu + 1)));
    assert!(result.plaintext.control_found && !result.plaintext.canary_found);
    for pair in &result.pairs {
        let [from, to] = [&pair.from, &pair.to].map(|pod| lab.pod(pod).unwrap().node().name());
        let mode = modes.of(&from).as_str();
        let wanted = if from == to { "local".to_owned() } else { format!("wireguard-{mode}") };
        assert_eq!(pair.transport, wanted, "{from} to {to}");
    }
}

#[test]
fn everything_holds_over_ipv4() {
    assert_holds(Options { nodes: 3, pods_per_node: 2, ..userspace() });
}

#[test]
fn everything_holds_over_ipv6() {
    assert_holds(Options { underlay: Family::V6, pods: Family::V6, ..userspace() });
}

#[test]
fn everything_holds_with_both_families_behind_a_router() {
    let dual = Options { underlay: Family::Dual, pods: Family::Dual, ..userspace() };
    assert_holds(Options { routed: true, ..dual });
}

#[test]
fn everything_holds_on_jumbo_frames() {
    assert_holds(Options { underlay_mtu: 9000, ..userspace() });
}

/// The negative control of every check: what is sent in clear is found, and what is broken
/// is named.
#[test]
fn verify_finds_clear_text_and_broken_paths() {
    let lab = lab_up(userspace());
    let name = lab.options().name.clone();
    for (node, subnet, via) in
        [("node-1", "10.244.2.0/24", "192.168.240.2"), ("node-2", "10.244.1.0/24", "192.168.240.1")]
    {
        let node = lab.node(node).unwrap();
        node.kill_agent().unwrap();
        let script = format!(
            "nft delete table inet gambeson; ip link delete gambeson0; \
             ip route add {subnet} via {via} metric 1"
        );
        let output = node.exec(&["sh", "-c", &script]).unwrap();
        assert!(output.status.success(), "{}", both(&output));
    }
    let result = verify(&lab);
    assert!(!result.ok);
    assert!(result.plaintext.canary_found && result.plaintext.control_found, "{result}");
    let clear = result.failures.iter().any(|f| f.contains("readable on the underlay"));
    assert!(clear, "{result}");
    assert_eq!(result.mtu.unwrap().first_refused, Some(1441));

    lab.node("node-2").unwrap().set_cable(false).unwrap();
    let gambeson =
        Command::new(GAMBESON).args(["lab", "verify", "--name", name.as_str()]).output().unwrap();
    assert_eq!(gambeson.status.code(), Some(8), "{}", both(&gambeson));
    assert!(both(&gambeson).contains("pod-1-1 to pod-2-1"), "{}", both(&gambeson));
}

#[test]
fn a_killed_agent_is_started_again_by_restart() {
    let lab = lab_up(userspace());
    let name = lab.options().name.clone();
    let node = lab.node("node-1").unwrap();
    let tunnels = node.tunnels();
    node.kill_agent().unwrap();
    assert!(node.agent().is_none());
    let mut restart = Command::new(GAMBESON);
    stdout_of(restart.args(["lab", "restart", "node-1", "--name", name.as_str()]));
    let opened = Lab::open(&name).unwrap();
    let node = opened.node("node-1").unwrap();
    let ready = until(Instant::now() + Duration::from_secs(10), || {
        node.status().is_ok_and(|status| status.ready && status.peers.len() == 1).then_some(())
    });
    assert!(ready.is_some(), "{}", node.agent_log().unwrap());
    assert_eq!(node.tunnels(), tunnels);
}
