//! A Kubernetes Node as far as the mesh is concerned: the raw record, and the parsed peer.
//!
//! Annotations are hostile input. Whatever is wrong with a Node refuses that Node alone.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use gambeson_keys::{Generation, PublicKey};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::NodeName;
use crate::session::SESSIONS;

pub mod annotation;
mod parse;
mod refusal;
#[cfg(test)]
mod tests;

pub(crate) use parse::{LARGEST_MTU, persistent_keepalive};
pub use parse::{overlap, pod_cidrs};
pub use refusal::Refusal;
pub(crate) use refusal::excerpt;

/// Default prefix of the annotations that agents write.
pub const DEFAULT_PREFIX: &str = "gambeson.io";
/// Default base UDP port.
pub const DEFAULT_PORT: u16 = 51820;
/// Largest base UDP port: the last session uses `base + 6`.
pub const MAX_PORT: u16 = u16::MAX - 2 * (SESSIONS as u16 - 1);
/// Bytes that WireGuard over IPv4 adds to a packet: 20 IP, 8 UDP, 32 WireGuard.
const OVERHEAD_V4: u32 = 60;
/// Bytes that WireGuard over IPv6 adds to a packet.
const OVERHEAD_V6: u32 = 80;

/// The parts of a Node object that matter here, unparsed. All that the agent keeps of a Node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeRecord {
    /// `metadata.name`.
    pub name: NodeName,
    /// `metadata.uid`.
    pub uid: String,
    /// `metadata.creationTimestamp`, seconds since the Unix epoch: the elder of two claimants
    /// is the incumbent when neither was known before.
    pub created: i64,
    /// `spec.podCIDRs`.
    pub pod_cidrs: Vec<String>,
    /// Annotations below the agent's and the operator's prefix, keyed without the prefix:
    /// `public-key`, and `config/endpoint` for `config.<prefix>/endpoint`.
    pub annotations: BTreeMap<String, String>,
}

/// How packets between a pair of nodes travel. Order is preference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    /// Encrypted, kernel or userspace.
    Wireguard,
    /// Plain routes on one L2 segment.
    HostGw,
    /// VXLAN, in clear.
    Vxlan,
}

/// Where other nodes send to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Endpoints {
    /// IPv4 underlay address.
    pub v4: Option<Ipv4Addr>,
    /// IPv6 underlay address.
    pub v6: Option<Ipv6Addr>,
}

/// This node: what it is and offers. Built by the agent from its own Node, its
/// configuration, its key store and the underlay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Local {
    /// `metadata.name`.
    pub name: NodeName,
    /// Prefix of the annotations that agents write, e.g. `gambeson.io`.
    pub prefix: String,
    /// `spec.podCIDRs` of this node.
    pub pod_cidrs: BTreeSet<IpNet>,
    /// The cluster networks (`--cluster-cidr`).
    pub cluster_networks: BTreeSet<IpNet>,
    /// Public keys of this node by generation. The first is in use, a second is next.
    pub keys: BTreeMap<Generation, PublicKey>,
    /// Published endpoints.
    pub endpoints: Endpoints,
    /// Base UDP port.
    pub port: u16,
    /// Underlay interface MTU in bytes.
    pub underlay_mtu: u32,
    /// Who implements WireGuard here.
    pub implementation: crate::desired::Implementation,
    /// Transports this node accepts.
    pub transports: BTreeSet<Transport>,
    /// The pod bridge, e.g. `cni0`.
    pub bridge: String,
    /// Masquerade what leaves the cluster networks.
    pub masquerade: bool,
}

/// A peer that can be used: every value parsed and checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// `metadata.name`.
    pub name: NodeName,
    /// `metadata.uid`.
    pub uid: String,
    /// `metadata.creationTimestamp`, seconds since the Unix epoch.
    pub created: i64,
    /// Pod CIDRs, at least one.
    pub pod_cidrs: BTreeSet<IpNet>,
    /// Generation of `public_key`.
    pub generation: Generation,
    /// The key in use.
    pub public_key: PublicKey,
    /// The key of the next generation, during a rotation.
    pub next_public_key: Option<PublicKey>,
    /// Where to send, after the operator's overrides; at least one.
    pub endpoints: Endpoints,
    /// Base UDP port.
    pub port: u16,
    /// Transports the node accepts.
    pub transports: BTreeSet<Transport>,
    /// Inner MTU of the node in bytes, when it says.
    pub mtu: Option<u32>,
    /// Persistent keepalive in seconds, when an operator set one.
    pub persistent_keepalive: Option<u16>,
    /// Options that people set on it to something that cannot be used. They count as not set.
    pub ignored: Vec<Refusal>,
}

impl Transport {
    /// The name in the annotation.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Wireguard => "wireguard",
            Self::HostGw => "host-gw",
            Self::Vxlan => "vxlan",
        }
    }

    /// The transport with this name.
    pub fn parse(name: &str) -> Option<Self> {
        [Self::Wireguard, Self::HostGw, Self::Vxlan].into_iter().find(|t| t.as_str() == name)
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Local {
    /// The generation in use and its public key, once there is a key.
    pub fn current_key(&self) -> Option<(Generation, PublicKey)> {
        self.keys.first_key_value().map(|(generation, key)| (*generation, *key))
    }

    /// MTU inside the tunnel in bytes: what is left of the underlay's after WireGuard over
    /// the larger of the IP headers in use.
    pub fn inner_mtu(&self) -> u32 {
        let overhead = if self.endpoints.v6.is_some() { OVERHEAD_V6 } else { OVERHEAD_V4 };
        self.underlay_mtu.saturating_sub(overhead)
    }

    /// What this node publishes, keyed without the prefix; `None` means that the annotation
    /// must not be there. All of it belongs in one patch, so that no reader sees half.
    pub fn annotations(&self) -> BTreeMap<String, Option<String>> {
        let current = self.current_key();
        let next = current
            .and_then(|(generation, _)| generation.next())
            .and_then(|generation| self.keys.get(&generation));
        let transports: Vec<&str> = self.transports.iter().map(|t| t.as_str()).collect();
        [
            (annotation::PUBLIC_KEY, current.map(|(_, key)| key.to_string())),
            (annotation::KEY_GENERATION, current.map(|(generation, _)| generation.to_string())),
            (annotation::NEXT_PUBLIC_KEY, next.map(PublicKey::to_string)),
            (annotation::ENDPOINT, self.endpoints.v4.map(|address| address.to_string())),
            (annotation::ENDPOINT_V6, self.endpoints.v6.map(|address| address.to_string())),
            (annotation::PORT, Some(self.port.to_string())),
            (annotation::TRANSPORTS, Some(transports.join(","))),
            (annotation::MTU, Some(self.inner_mtu().to_string())),
        ]
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
    }
}

impl Endpoints {
    /// The address to send to from a node that has `own` families: IPv4 where both have it.
    pub fn reachable_from(self, own: Endpoints) -> Option<IpAddr> {
        match (own.v4.and(self.v4), own.v6.and(self.v6)) {
            (Some(v4), _) => Some(v4.into()),
            (None, Some(v6)) => Some(v6.into()),
            (None, None) => None,
        }
    }
}
