//! `lab -> pairs, MTU, canary, throughput -> Verification`: whether the whole mesh works,
//! measured from inside the pods, and whether anything travels in clear.

mod between;
mod mtu;
mod pairs;
mod plaintext;
mod table;
mod throughput;

use std::net::IpAddr;
use std::time::Duration;

use serde::Serialize;

use super::error::LabError;
use super::instance::Lab;
use super::node::Pod;
use super::progress::Progress;
use between::Transports;

pub use throughput::measure as measure_throughput;

/// How long the throughput of a pair is measured.
const THROUGHPUT_TIME: Duration = Duration::from_secs(2);

/// `gambeson lab verify --json`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Verification {
    /// Version of this document's form.
    pub schema: u32,
    /// Number of nodes.
    pub nodes: usize,
    /// Number of pods.
    pub pods: usize,
    /// Every ordered pair of pods, per address family.
    pub pairs: Vec<PairResult>,
    /// Every node to every pod, and every pod to every node, per address family.
    pub node_pairs: Vec<PairResult>,
    /// The largest packet between pods on different nodes.
    pub mtu: Option<MtuResult>,
    /// The same over IPv6, where the pods have both families.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtu_v6: Option<MtuResult>,
    /// The search for clear text on the underlay.
    pub plaintext: PlaintextResult,
    /// Of one pair, in gigabits per second; `null` when there are not two pods.
    pub throughput_gbps: Option<f64>,
    /// What does not hold, in words.
    pub failures: Vec<String>,
    /// Whether everything holds.
    pub ok: bool,
}

/// An address family, as the JSON names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum IpFamily {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl IpFamily {
    /// The family of an address.
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

/// One ordered pair.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PairResult {
    /// The one that asks.
    pub from: String,
    /// The one that answers.
    pub to: String,
    /// Over which family.
    pub family: IpFamily,
    /// Whether every echo and the TCP connection came through.
    pub ok: bool,
    /// Median round-trip time in microseconds.
    pub rtt_us: Option<u64>,
    /// `wireguard-kernel`, `wireguard-userspace`, `host-gw`, `vxlan`, `local` on one node, or
    /// `unknown`.
    pub transport: String,
    /// What went wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// The largest packet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MtuResult {
    /// MTU of a pod's interface in bytes.
    pub pod: u32,
    /// What follows from the underlay's, in bytes.
    pub expected: u32,
    /// Largest packet that got an answer, in bytes, between any two nodes.
    pub largest_ok: Option<u32>,
    /// Smallest that was refused to its sender, in bytes.
    pub first_refused: Option<u32>,
}

/// The search for clear text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PlaintextResult {
    /// Packets looked at, on all underlay interfaces.
    pub packets_seen: u64,
    /// The canary, sent between pods on different nodes, was seen on the underlay.
    pub canary_found: bool,
    /// Ordered pairs of nodes that it was sent between.
    pub encrypted_pairs: usize,
    /// Ordered pairs of nodes whose agents say that pods' packets between them travel in clear.
    pub plaintext_pairs: usize,
    /// The control, sent between nodes in clear, was seen on the underlay.
    pub control_found: bool,
}

impl Lab {
    /// Checks everything. An error means that a check could not be made; one that does not
    /// hold is in the result.
    pub fn verify(&self, progress: &Progress) -> Result<Verification, LabError> {
        let mut failures = Vec::new();
        if self.pods().is_empty() {
            failures.push("the lab has no pods, so there is nothing to check".to_owned());
        }
        progress.step("checking every pair");
        let transports = Transports::of(self);
        let (pairs, node_pairs) = pairs::check(self, &transports)?;
        failures.extend(pairs::failures(pairs.iter().chain(&node_pairs)));
        progress.step("finding the MTU to the byte");
        let mtu = mtu::check(self, IpFamily::V4, &mut failures)?;
        let mtu_v6 = mtu::check(self, IpFamily::V6, &mut failures)?;
        let (mtu, mtu_v6) = if mtu.is_some() { (mtu, mtu_v6) } else { (mtu_v6, None) };
        progress.step("looking for clear text on the underlay");
        let plaintext = plaintext::check(self, &transports, &mut failures)?;
        progress.step("measuring the throughput");
        let throughput_gbps = throughput::check(self, &mut failures)?;
        progress.done();
        Ok(Verification {
            schema: 1,
            nodes: self.nodes().len(),
            pods: self.pods().len(),
            pairs,
            node_pairs,
            mtu,
            mtu_v6,
            plaintext,
            throughput_gbps,
            ok: failures.is_empty(),
            failures,
        })
    }

    /// The first pods of every ordered pair of nodes, with the receiver's addresses.
    fn first_pod_pairs(&self) -> Vec<(Pod<'_>, Pod<'_>)> {
        let first: Vec<Pod<'_>> =
            self.nodes().iter().filter_map(|node| node.pods().into_iter().next()).collect();
        let pairs = first.iter().flat_map(|from| first.iter().map(move |to| (*from, *to)));
        pairs.filter(|(from, to)| from.name() != to.name()).collect()
    }
}
