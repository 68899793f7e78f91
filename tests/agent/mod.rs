//! The agent as a process on the nodes of a lab: how it starts, what it survives, and how
//! soon it acts.

mod faults;
mod peers;
mod repair;
mod start;

use std::time::{Duration, Instant};

use gambeson::lab::Patch;
use gambeson::lab::traffic::{FlowReport, Rate, Traffic};
use gambeson::lab::wait::until;
use gambeson::lab::{Lab, Options, WireguardMode, WireguardModes};
use gambeson::lab::{Node, Pod};
use gambeson::status::Status;
use serde_json::{Value, json};

use crate::common::lab::{both, lab_options};

/// For what has no promised time of its own.
const PATIENCE: Duration = Duration::from_secs(20);

fn userspace() -> Options {
    Options { wireguard: WireguardModes::all(WireguardMode::Userspace), ..lab_options() }
}

/// Waits until `condition` holds, or fails with `what` and the agent's log.
fn eventually(node: &Node<'_>, what: &str, condition: impl FnMut() -> bool) {
    within(PATIENCE, node, what, condition);
}

fn within(time: Duration, node: &Node<'_>, what: &str, mut condition: impl FnMut() -> bool) {
    let held = until(Instant::now() + time, || condition().then_some(()));
    assert!(held.is_some(), "{what}; {}:\n{}", node.name(), node.agent_log().unwrap());
}

/// Waits until the agent's status is as `holds` says.
fn until_status(node: &Node<'_>, what: &str, holds: impl Fn(&Status) -> bool) {
    eventually(node, what, || node.status().is_ok_and(|status| holds(&status)));
}

/// Runs a shell script on a node, which must succeed, and gives what it printed.
fn sh(node: &Node<'_>, script: &str) -> String {
    let output = node.exec(&["sh", "-c", script]).unwrap();
    assert!(output.status.success(), "{script}: {}", both(&output));
    String::from_utf8(output.stdout).unwrap()
}

/// Whether a shell script on a node succeeds.
fn holds(node: &Node<'_>, script: &str) -> bool {
    node.exec(&["sh", "-c", script]).unwrap().status.success()
}

/// Changes annotations of a Node; `null` removes one.
fn annotate(lab: &Lab, node: &str, annotations: &Value) {
    let patch = json!({ "metadata": { "annotations": annotations } });
    lab.api().unwrap().patch_node(node, Patch::Merge, &patch).unwrap();
}

fn annotation(lab: &Lab, node: &str, key: &str) -> Option<String> {
    let node = lab.api().unwrap().node(node).unwrap();
    node["metadata"]["annotations"][key].as_str().map(str::to_owned)
}

/// Traffic both ways between the first pods of the first two nodes.
struct Flows(Traffic);

impl Flows {
    /// Fast, so that a short gap shows.
    fn fast(lab: &Lab) -> Self {
        Self::start(lab, Rate::default())
    }

    /// Slow enough for tests that run long on a busy machine: a scheduling gap that fills
    /// the device's queue is not what they look for.
    fn steady(lab: &Lab) -> Self {
        Self::start(lab, Rate { packets_per_second: 100, ..Rate::default() })
    }

    fn start(lab: &Lab, rate: Rate) -> Self {
        let pod = |name| -> Pod<'_> { lab.pod(name).unwrap() };
        Self(Traffic::start(&[(pod("pod-1-1"), pod("pod-2-1"))], rate).unwrap())
    }

    /// Waits until this many more packets have arrived.
    fn more(&self, packets: u64) {
        let (_, before) = self.0.so_far();
        let arrived = until(Instant::now() + PATIENCE, || {
            (self.0.so_far().1 >= before + packets).then_some(())
        });
        assert!(arrived.is_some(), "packets no longer arrive");
    }

    /// Ends the traffic; nothing may have been lost.
    fn must_be_perfect(self) {
        let reports = self.0.finish(Duration::from_secs(2));
        assert!(reports.iter().all(FlowReport::is_perfect), "{reports:#?}");
    }
}
