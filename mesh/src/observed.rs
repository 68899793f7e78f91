//! The same objects as in [`crate::desired`], as read back from the kernel.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use gambeson_keys::{PublicKey, SecretId};
use ipnet::IpNet;

use crate::desired::{LinkKind, Route, RouteKey, Rule, Ruleset, Sysctl, VtepTables};
use crate::session::DeviceName;

/// What this node's kernel has under our names and marks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observed {
    /// Links with one of our names ([`DeviceName`]), ours or not.
    pub links: BTreeMap<DeviceName, ObservedLink>,
    /// Routes in the main table that carry our protocol number.
    pub routes: BTreeMap<RouteKey, Route>,
    /// Other routes in the main table that lead into the cluster networks.
    pub foreign_routes: BTreeSet<ForeignRoute>,
    /// Policy routing rules that carry our protocol number.
    pub rules: BTreeSet<Rule>,
    /// Values of the settings in [`Sysctl`], trimmed; absent where the file does not exist.
    pub sysctls: BTreeMap<Sysctl, String>,
    /// Base chains of others that drop all forwarded packets by policy, without rules of ours
    /// that accept the cluster networks' before.
    pub forward_drops: BTreeSet<ForwardDrop>,
    /// The ruleset in force, or `None` when table `inet gambeson` is missing or is not
    /// exactly what was written last.
    pub ruleset: Option<Ruleset>,
}

/// A route that we did not make.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ForeignRoute {
    /// Its destination and metric.
    pub key: RouteKey,
    /// Who made it (rtm_protocol in linux/rtnetlink.h; /etc/iproute2/rt_protos).
    pub protocol: u8,
    /// Where it leads, as `ip route` says it: `dev eth0`, `blackhole`.
    pub leads: String,
}

/// An nftables base chain at the hook `forward` with the policy `drop`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ForwardDrop {
    /// `ip`, `ip6` or `inet`.
    pub family: String,
    /// Its table.
    pub table: String,
    /// Its name.
    pub chain: String,
}

impl ForwardDrop {
    /// Whether it is the chain FORWARD of iptables-nft, in which rules of ours have a place.
    pub fn is_of_iptables(&self) -> bool {
        let iptables = self.family == "ip" || self.family == "ip6";
        iptables && self.table == "filter" && self.chain == "FORWARD"
    }
}

/// A link with one of our names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObservedLink {
    /// Whether it carries our alias. A foreign link is never touched.
    pub ours: bool,
    /// Whether it is known to be ours in another way: this process has seen the very link, by
    /// its index, with our alias, or it holds a key of this node.
    pub known: bool,
    /// What kind it is, or `None` for a kind we never make.
    pub kind: Option<LinkKind>,
    /// Administratively up.
    pub up: bool,
    /// MTU in bytes.
    pub mtu: u32,
    /// Addresses, without link-local ones.
    pub addresses: BTreeSet<IpNet>,
    /// Its WireGuard state, or `None` when it could not be read (a tunnel process that is gone).
    pub wireguard: Option<ObservedWireGuard>,
    /// The permanent entries of a VXLAN device.
    pub tables: VtepTables,
}

impl ObservedLink {
    /// Whether it is ours, with our alias or without.
    pub fn is_ours(&self) -> bool {
        (self.ours || self.known) && self.kind.is_some()
    }
}

/// WireGuard state of a link.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ObservedWireGuard {
    /// Public key that belongs to the private key in the device.
    pub public_key: Option<PublicKey>,
    /// UDP port.
    pub listen_port: u16,
    /// Mark on encrypted packets, or 0. We never set one.
    pub fwmark: u32,
    /// Peers by key.
    pub peers: BTreeMap<PublicKey, ObservedPeer>,
}

/// What a preshared key was made of.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Preshared {
    /// There is none.
    #[default]
    None,
    /// This secret of the cluster and the two keys of the session.
    Of(SecretId),
    /// Somebody else set it.
    Foreign,
}

/// State of one peer on a device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ObservedPeer {
    /// Where packets go now; it follows authenticated packets.
    pub endpoint: Option<SocketAddr>,
    /// The endpoint this agent process wrote last, or `None` when it has not written one.
    pub pinned_endpoint: Option<SocketAddr>,
    /// Prefixes the peer owns on this device.
    pub allowed_ips: BTreeSet<IpNet>,
    /// Persistent keepalive in seconds.
    pub persistent_keepalive: Option<u16>,
    /// Its preshared key.
    pub preshared: Preshared,
    /// Time since the last completed handshake, or `None` when there was none.
    pub handshake_age: Option<Duration>,
    /// Bytes received, after decryption headers as the kernel counts them.
    pub rx_bytes: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
}
