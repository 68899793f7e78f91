//! A Kubernetes Node as far as the mesh is concerned: the raw record, and the parsed peer.
//!
//! Annotations are hostile input. Whatever is wrong with a Node refuses that Node alone.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use gambeson_keys::{Generation, PublicKey, SecretId};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::NodeName;
use crate::family::Family;
use crate::mac::Mac;
use crate::session::SESSIONS;

mod annotated;
pub mod annotation;
mod flannel;
mod parse;
mod refusal;
#[cfg(test)]
mod tests;

pub(crate) use parse::{LARGEST_MTU, persistent_keepalive, rotate};
pub use parse::{overlap, pod_cidrs};
pub use refusal::Refusal;
pub(crate) use refusal::excerpt;

/// Default prefix of the annotations that agents write.
pub const DEFAULT_PREFIX: &str = "gambeson.io";
/// Default base UDP port.
pub const DEFAULT_PORT: u16 = 51820;
/// Largest base UDP port: the last session uses `base + 6`.
pub const MAX_PORT: u16 = u16::MAX - 2 * (SESSIONS as u16 - 1);
/// Bytes of the header that IPv6 has more than IPv4.
const IPV6_MORE: u32 = 20;

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

/// Addresses of a node's VXLAN devices, by the family of the underlay.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Vteps {
    /// Over IPv4.
    pub v4: Option<Mac>,
    /// Over IPv6.
    pub v6: Option<Mac>,
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
    /// Of which secret of the cluster each key's preshared keys are made, where they have some.
    pub secrets: BTreeMap<Generation, SecretId>,
    /// The secrets that this node knows, the oldest first.
    pub known_secrets: Vec<SecretId>,
    /// Whether the second has taken the first one's place, which only waits to be retired.
    pub promoted: bool,
    /// Published endpoints.
    pub endpoints: Endpoints,
    /// Its own addresses on the underlay, which behind NAT are others.
    pub addresses: Endpoints,
    /// Base UDP port.
    pub port: u16,
    /// Seconds between keepalives, unless its Node says.
    pub persistent_keepalive: Option<u16>,
    /// Name of the underlay interface.
    pub underlay: String,
    /// Index of the underlay interface.
    pub underlay_index: u32,
    /// Underlay interface MTU in bytes.
    pub underlay_mtu: u32,
    /// Who implements WireGuard here.
    pub implementation: crate::desired::Implementation,
    /// Transports this node accepts.
    pub transports: BTreeSet<Transport>,
    /// What its VXLAN devices are, where it accepts that.
    pub vxlan: crate::desired::Vxlan,
    /// Addresses of its VXLAN devices.
    pub vteps: Vteps,
    /// Addresses of other nodes that the kernel reaches without a router.
    pub on_link: BTreeSet<IpAddr>,
    /// The backend of those nodes that Flannel drives, where there may be some.
    pub flannel: Option<Transport>,
    /// The pod bridge, e.g. `cni0`.
    pub bridge: String,
    /// Families of which what leaves the cluster networks is masqueraded.
    pub masquerade: BTreeSet<Family>,
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
    /// The key in use; Flannel's nodes have one for WireGuard only.
    pub public_key: Option<PublicKey>,
    /// The key of the next generation, during a rotation.
    pub next_public_key: Option<PublicKey>,
    /// Of which secret of the cluster preshared keys of `public_key` are made.
    pub secret: Option<SecretId>,
    /// The same of `next_public_key`.
    pub next_secret: Option<SecretId>,
    /// Where to send, after the operator's overrides; at least one.
    pub endpoints: Endpoints,
    /// Base UDP port.
    pub port: u16,
    /// Transports the node accepts.
    pub transports: BTreeSet<Transport>,
    /// Addresses of its VXLAN devices, when it offers that.
    pub vteps: Vteps,
    /// Inner MTU of the node in bytes, when it says.
    pub mtu: Option<u32>,
    /// Persistent keepalive in seconds, when an operator set one.
    pub persistent_keepalive: Option<u16>,
    /// Whether Flannel drives it: then `port` is the only one.
    pub flannel: bool,
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

    /// All of them, best first.
    pub const ALL: [Self; 3] = [Self::Wireguard, Self::HostGw, Self::Vxlan];

    /// The transport with this name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|t| t.as_str() == name)
    }

    /// Several, as the annotation has them: best first.
    pub fn list(transports: &BTreeSet<Self>) -> String {
        let names: Vec<&str> = transports.iter().map(|transport| transport.as_str()).collect();
        names.join(",")
    }

    /// The one that a route of ours leads through, if it leads anywhere.
    pub fn of(next_hop: crate::desired::NextHop) -> Option<Self> {
        use crate::desired::NextHop;
        match next_hop {
            NextHop::Device(_) => Some(Self::Wireguard),
            NextHop::Vtep { .. } => Some(Self::Vxlan),
            NextHop::Node { .. } => Some(Self::HostGw),
            NextHop::Unreachable => None,
        }
    }

    /// Whether nobody on the underlay can read what it carries.
    pub fn is_encrypted(self) -> bool {
        self == Self::Wireguard
    }

    /// Bytes that it adds to a packet over an underlay of this family.
    pub fn overhead(self, family: Family) -> u32 {
        let more = if family == Family::V6 { IPV6_MORE } else { 0 };
        match self {
            // 20 IP, 8 UDP, 32 WireGuard.
            Self::Wireguard => 60 + more,
            Self::HostGw => 0,
            // 20 IP, 8 UDP, 8 VXLAN, 14 Ethernet.
            Self::Vxlan => 50 + more,
        }
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
        let key =
            if self.promoted { self.keys.last_key_value() } else { self.keys.first_key_value() };
        key.map(|(generation, key)| (*generation, *key))
    }

    /// MTU of this node's pods in bytes: what is left of the underlay's after the transport
    /// that takes most of those it accepts, over the larger of the IP headers in use.
    pub fn inner_mtu(&self) -> u32 {
        let mtus = self.transports.iter().map(|transport| self.mtu_over(*transport));
        mtus.min().unwrap_or(self.underlay_mtu)
    }

    /// MTU inside a transport in bytes, over the larger of the IP headers in use.
    pub fn mtu_over(&self, transport: Transport) -> u32 {
        let family = if self.endpoints.v6.is_some() { Family::V6 } else { Family::V4 };
        self.underlay_mtu.saturating_sub(transport.overhead(family))
    }

    /// The addresses that VXLAN devices of a node with these pods have: the same at every
    /// start, for the families of its underlay.
    pub fn default_vteps(pod_cidrs: &BTreeSet<IpNet>, endpoints: Endpoints) -> Vteps {
        let mac = pod_cidrs.first().map(|cidr| Mac::of(cidr.network()));
        Vteps { v4: endpoints.v4.and(mac), v6: endpoints.v6.and(mac) }
    }
}

impl Vteps {
    /// The one over this family.
    pub fn get(self, family: Family) -> Option<Mac> {
        match family {
            Family::V4 => self.v4,
            Family::V6 => self.v6,
        }
    }
}

impl Endpoints {
    /// The one of this family.
    pub fn get(self, family: Family) -> Option<IpAddr> {
        match family {
            Family::V4 => self.v4.map(IpAddr::from),
            Family::V6 => self.v6.map(IpAddr::from),
        }
    }

    /// Those that there are, IPv4 first.
    pub fn addresses(self) -> impl Iterator<Item = IpAddr> {
        Family::ALL.into_iter().filter_map(move |family| self.get(family))
    }

    /// The address to send to from a node that has `own` families: IPv4 where both have it.
    pub fn reachable_from(self, own: Endpoints) -> Option<IpAddr> {
        match (own.v4.and(self.v4), own.v6.and(self.v6)) {
            (Some(v4), _) => Some(v4.into()),
            (None, Some(v6)) => Some(v6.into()),
            (None, None) => None,
        }
    }
}
