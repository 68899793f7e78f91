//! Running agents: what they say, and Nodes that have none.

use std::net::IpAddr;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use gambeson::status::{RefusedStatus, Status};
use gambeson_keys::PrivateKey;
use gambeson_lab::probe::ping::Pinger;
use gambeson_lab::wait::until;
use gambeson_lab::{Lab, Node, Options, Pod, WireguardMode, WireguardModes};
use serde_json::{Value, json};

use super::lab::{GAMBESON, both, lab_options};

/// Longer than anything takes that is to happen at all.
const PATIENCE: Duration = Duration::from_secs(30);
const PING: Duration = Duration::from_secs(5);

/// A small lab whose agents use userspace WireGuard.
pub(crate) fn userspace() -> Options {
    Options { wireguard: WireguardModes::all(WireguardMode::Userspace), ..lab_options() }
}

/// Waits until `condition` gives something; else says what did not happen, and what the
/// node's agent has logged.
pub(crate) fn eventually<T>(node: Node<'_>, what: &str, condition: impl FnMut() -> Option<T>) -> T {
    until(Instant::now() + PATIENCE, condition).unwrap_or_else(|| {
        let log = node.agent_log().unwrap_or_default();
        let status = node.status().map_or_else(|e| e.to_string(), |status| status.to_string());
        panic!("{what}: not so on {} in time\n{status}\n{log}", node.name())
    })
}

/// Waits for a status that `holds`, and gives it.
pub(crate) fn status_when(
    node: Node<'_>,
    what: &str,
    mut holds: impl FnMut(&Status) -> bool,
) -> Status {
    eventually(node, what, || node.status().ok().filter(|status| holds(status)))
}

/// What `gambeson status --json` says on this node.
pub(crate) fn status_json(node: Node<'_>) -> Value {
    let output = node.exec(&[GAMBESON, "status", "--json"]).unwrap();
    assert!(output.status.success(), "{}", both(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Names of the peers in use.
pub(crate) fn peers(status: &Status) -> Vec<&str> {
    status.peers.iter().map(|peer| peer.name.as_str()).collect()
}

/// What is wrong with this Node.
pub(crate) fn refusal<'a>(status: &'a Status, name: &str) -> Option<&'a RefusedStatus> {
    status.refused.iter().find(|refused| refused.name == name)
}

/// Whether an echo comes back from this address.
pub(crate) fn answers(from: Pod<'_>, to: IpAddr) -> bool {
    let never = AtomicBool::new(false);
    let pinger = || Pinger::new(to)?.answers_before(Instant::now() + PING, &never);
    from.netns().run(pinger).unwrap().unwrap()
}

/// The first address of a pod.
pub(crate) fn address(lab: &Lab, pod: &str) -> IpAddr {
    lab.pod(pod).unwrap().addresses()[0]
}

/// A Node as its agent has published it, though it has none: nobody listens there.
pub(crate) fn stranger(number: u8) -> Value {
    let cidr = format!("10.244.{number}.0/24");
    json!({
        "kind": "Node",
        "apiVersion": "v1",
        "metadata": {
            "name": format!("stranger-{number}"),
            "annotations": {
                "gambeson.io/public-key": PrivateKey::generate().public().to_string(),
                "gambeson.io/key-generation": "0",
                "gambeson.io/endpoint": format!("192.168.240.{number}"),
                "gambeson.io/port": "51820",
                "gambeson.io/transports": "wireguard",
                "gambeson.io/mtu": "1440",
            },
        },
        "spec": { "podCIDR": cidr, "podCIDRs": [cidr] },
    })
}

/// What the agent logs from now on.
pub(crate) struct LogSince<'a> {
    node: Node<'a>,
    start: usize,
}

impl<'a> LogSince<'a> {
    pub(crate) fn now(node: Node<'a>) -> Self {
        Self { node, start: node.agent_log().unwrap().len() }
    }

    /// Number of lines with this text.
    pub(crate) fn count(&self, text: &str) -> usize {
        let log = self.node.agent_log().unwrap();
        log[self.start..].lines().filter(|line| line.contains(text)).count()
    }
}
