use std::collections::BTreeSet;
use std::net::IpAddr;

use gambeson_keys::{Generation, PublicKeyError};
use ipnet::IpNet;

use super::{Transport, annotation};
use crate::NodeName;

/// Longest part of an outside value that a message shows, in characters.
const SHOWN: usize = 64;

/// Why a Node, or its newest state, is not used. A message follows the Node's name; values
/// in it are escaped and cut short, because they come from outside.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "fields are what the message shows")]
pub enum Refusal {
    /// No agent has published anything there so far.
    #[error("has not published a key yet: its agent has not started or may not patch its Node")]
    NoKey,
    /// Everything the agent published was removed.
    #[error(
        "its annotations were removed: its agent writes them again when it runs; \
         delete the Node to make it leave the mesh"
    )]
    KeyGone,
    /// Its sessions would have no preshared key, and this node's have one.
    #[error(
        "has no preshared key, as this node has: give its agent the --psk-file that the others have"
    )]
    NoPresharedKey,
    /// `spec.podCIDRs` is empty.
    #[error("has no pod CIDR yet: kube-controller-manager assigns one with --allocate-node-cidrs")]
    NoPodCidr,
    /// No pod CIDR of a family that the cluster networks have.
    #[error("has no pod CIDR of a family in the cluster networks ({networks})")]
    NoPodCidrInUse { networks: String },
    /// A necessary annotation is not there.
    #[error("annotation {annotation} is missing; {}", remedy(.annotation))]
    Missing { annotation: String },
    /// A value longer than any valid one.
    #[error(
        "annotation {annotation} is over {limit} bytes long, more than any valid value; {}",
        remedy(.annotation)
    )]
    TooLong { annotation: String, limit: usize },
    /// Not a usable public key.
    #[error("annotation {annotation} is \"{value}\", {source}; {}", remedy(.annotation))]
    Key { annotation: String, value: String, source: PublicKeyError },
    /// Any other bad value.
    #[error("annotation {annotation} is \"{value}\", {problem}; {}", remedy(.annotation))]
    Value { annotation: String, value: String, problem: &'static str },
    /// An endpoint that could only be reached through the mesh itself.
    #[error(
        "annotation {annotation} is {address}, inside the cluster network {network}, \
         where an underlay address cannot be; {}", remedy(.annotation)
    )]
    EndpointInPodNetwork { annotation: String, address: IpAddr, network: IpNet },
    /// No endpoint of either family.
    #[error("publishes no endpoint: check --iface and --public-ip of its agent")]
    NoEndpoint,
    /// A pod CIDR that is none.
    #[error("pod CIDR \"{value}\" {problem}; delete the Node to have it assigned anew")]
    PodCidr { value: String, problem: &'static str },
    /// More pod CIDRs than a Node can have.
    #[error(
        "has {count} pod CIDRs, more than a Node can have; delete it to have them assigned anew"
    )]
    TooManyPodCidrs { count: usize },
    /// A pod CIDR that is not a part of a cluster network.
    #[error(
        "pod CIDR {cidr} is not a smaller part of a cluster network ({networks}): \
         give kube-controller-manager and the agents the same --cluster-cidr"
    )]
    PodCidrOutside { cidr: IpNet, networks: String },
    /// Another Node publishes a key of this node.
    #[error(
        "annotation {annotation} is this node's own key: a copied key file or a forged \
         annotation; remove /var/lib/gambeson on that node if it is a clone"
    )]
    OwnKey { annotation: String },
    /// Two Nodes publish one key. The one that had it first keeps it.
    #[error(
        "annotation {annotation} is the key of node {owner}: a copied key file or a forged \
         annotation; remove /var/lib/gambeson on that node if it is a clone"
    )]
    DuplicateKey { annotation: String, owner: NodeName },
    /// Two Nodes have one pod subnet. The one that had it first keeps it.
    #[error(
        "pod CIDR {cidr} overlaps {other} of node {owner}; delete the Node that should not have it"
    )]
    Overlap { cidr: IpNet, other: IpNet, owner: NodeName },
    /// An older generation than one seen before.
    #[error(
        "annotation {annotation} went back from {known} to {published}; if its key file was \
         lost, delete the Node and restart its kubelet, which makes it a new one"
    )]
    GenerationBack { annotation: String, published: Generation, known: Generation },
    /// The pair has no transport that both accept.
    #[error(
        "accepts {theirs} and this node {ours}: no transport in common; set --transports on both"
    )]
    NoCommonTransport { theirs: String, ours: String },
    /// Two Nodes publish one VXLAN device. The one that had it first keeps it.
    #[error(
        "annotation {annotation} is the device of node {owner}; only the agent there should write \
         it: see its log and who else may patch Nodes"
    )]
    DuplicateVtep { annotation: String, owner: NodeName },
    /// The pair has only host-gw in common, and a router between them.
    #[error(
        "cannot be reached from {ours} without a router, which host-gw cannot cross; add vxlan to \
         --transports on both, or wireguard"
    )]
    NotOnLink { ours: NodeName },
    /// The pair has no IP family on the underlay that both have.
    #[error("has an {theirs} endpoint only and this node an {ours} one only: no path between them")]
    NoCommonFamily { theirs: &'static str, ours: &'static str },
}

impl Refusal {
    /// Whether the Node is merely not ready yet, which is no reason for an alarm.
    pub fn is_waiting(&self) -> bool {
        matches!(self, Self::NoKey | Self::NoPodCidr)
    }

    pub(crate) fn no_common_transport(
        theirs: &BTreeSet<Transport>,
        ours: &BTreeSet<Transport>,
    ) -> Self {
        let list = |transports: &BTreeSet<Transport>| match transports.is_empty() {
            true => "no known transport".to_owned(),
            false => transports.iter().map(|t| t.as_str()).collect::<Vec<_>>().join(", "),
        };
        Self::NoCommonTransport { theirs: list(theirs), ours: list(ours) }
    }
}

/// The start of an outside text with everything escaped that could upset a terminal or log.
pub(crate) fn excerpt(text: &str) -> String {
    let mut shown: String = text.chars().take(SHOWN).flat_map(char::escape_debug).collect();
    if text.chars().nth(SHOWN).is_some() {
        shown.push_str("...");
    }
    shown
}

fn remedy(annotation: &str) -> &'static str {
    if annotation.starts_with(annotation::CONFIG_PREFIX) {
        "correct it with kubectl annotate"
    } else {
        "only the agent there should write it: see its log and who else may patch Nodes"
    }
}
