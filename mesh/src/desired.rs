//! What the kernel of this node should have: devices, peers, addresses, routes, sysctls
//! and the guard. Typed, ordered and comparable, so that the difference from what is
//! observed is a pure function.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use gambeson_keys::{Generation, PublicKey, SecretId};
use ipnet::IpNet;
use serde::Serialize;

use crate::family::Family;
use crate::mac::Mac;
use crate::session::DeviceName;

/// Marks a link as made by Gambeson (`ip link` shows it as `alias gambeson`).
pub const LINK_ALIAS: &str = "gambeson";
/// Routing protocol number that marks a route as made by Gambeson (`proto 151`).
pub const ROUTE_PROTOCOL: u8 = 151;
/// Metric of routes to a peer's pod CIDR.
pub const PEER_ROUTE_METRIC: u32 = 1;
/// Metric of the fail-closed `unreachable` routes: any other route wins over them.
pub const FAIL_CLOSED_METRIC: u32 = u32::MAX;

/// Everything this node's kernel should have of ours.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Desired {
    /// Session devices that should exist. Other devices of ours should not.
    pub devices: BTreeMap<DeviceName, WireGuardDevice>,
    /// VXLAN devices that should exist.
    pub vteps: BTreeMap<DeviceName, Vtep>,
    /// Routes of ours in the main table.
    pub routes: BTreeMap<RouteKey, Route>,
    /// Policy routing rules of ours.
    pub rules: BTreeSet<Rule>,
    /// Kernel settings below `/proc/sys`.
    pub sysctls: BTreeMap<Sysctl, String>,
    /// The fail-closed guard and masquerade rules.
    pub ruleset: Ruleset,
}

/// Who implements WireGuard on this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Implementation {
    /// A link of type `wireguard`.
    Kernel,
    /// A TUN device served by `gambeson tunnel` through the UAPI socket.
    Userspace,
}

/// What a link is, for as long as it exists: to change it is to make another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkKind {
    /// WireGuard, in the kernel or not.
    WireGuard(Implementation),
    /// VXLAN.
    Vxlan(VxlanLink),
}

/// What a cluster's VXLAN devices have in common, as in Flannel's net-conf.json.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Vxlan {
    /// VXLAN network identifier, 24 bits.
    pub vni: u32,
    /// UDP port.
    pub port: u16,
    /// Whether devices learn addresses from what they receive.
    pub learning: bool,
    /// Whether they carry the group policy extension.
    pub gbp: bool,
}

impl Default for Vxlan {
    /// Flannel's: VNI 1 on UDP port 8472.
    fn default() -> Self {
        Self { vni: 1, port: 8472, learning: false, gbp: false }
    }
}

/// The fixed part of a VXLAN device (`ip link add type vxlan`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VxlanLink {
    /// What it shares with those of other nodes.
    pub vxlan: Vxlan,
    /// Source of what it sends.
    pub local: IpAddr,
    /// Index of the underlay interface.
    pub underlay: u32,
    /// Its address.
    pub mac: Mac,
}

/// A VXLAN device. (VTEP: VXLAN tunnel endpoint, RFC 7348.)
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vtep {
    /// What it is made as.
    pub link: VxlanLink,
    /// Inner MTU in bytes.
    pub mtu: u32,
    /// Addresses on the device: each pod CIDR's base address as /32 or /128.
    pub addresses: BTreeSet<IpNet>,
    /// Where its packets go.
    pub tables: VtepTables,
}

/// How a VXLAN device finds its peers: `next hop -> address -> node`, all of it permanent, so
/// that nothing is asked on the wire and nothing learnt from it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VtepTables {
    /// Neighbours: the address of the device behind a route's next hop.
    pub neighbours: BTreeMap<IpAddr, Mac>,
    /// Forwarding database: the node that has the device.
    pub forwarding: BTreeMap<Mac, IpAddr>,
}

/// One entry of these tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VtepEntry {
    /// The address of the device behind a next hop.
    Neighbour {
        /// The next hop.
        gateway: IpAddr,
        /// The device's address.
        mac: Mac,
    },
    /// The node that has a device.
    Forwarding {
        /// The device's address.
        mac: Mac,
        /// The node's address.
        node: IpAddr,
    },
}

/// A link that should exist, of whichever kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WantedLink<'a> {
    /// What it is made as.
    pub kind: LinkKind,
    /// MTU in bytes.
    pub mtu: u32,
    /// Its addresses.
    pub addresses: &'a BTreeSet<IpNet>,
}

impl Desired {
    /// Every link that should exist.
    pub fn links(&self) -> impl Iterator<Item = (DeviceName, WantedLink<'_>)> {
        let wireguard = self.devices.iter().map(|(name, device)| {
            let WireGuardDevice { implementation, mtu, addresses, .. } = device;
            let kind = LinkKind::WireGuard(*implementation);
            (*name, WantedLink { kind, mtu: *mtu, addresses })
        });
        let vxlan = self.vteps.iter().map(|(name, vtep)| {
            let Vtep { link, mtu, addresses, .. } = vtep;
            (*name, WantedLink { kind: LinkKind::Vxlan(*link), mtu: *mtu, addresses })
        });
        wireguard.chain(vxlan)
    }
}

/// A WireGuard device for one session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WireGuardDevice {
    /// Kernel or userspace.
    pub implementation: Implementation,
    /// Which of our keys the device holds. The private key itself never enters this crate.
    pub generation: Generation,
    /// The public key of that generation.
    pub public_key: PublicKey,
    /// UDP port, the same on both families.
    pub listen_port: u16,
    /// Inner MTU in bytes.
    pub mtu: u32,
    /// Addresses on the device: each pod CIDR's base address as /32 or /128.
    pub addresses: BTreeSet<IpNet>,
    /// Peers by their key.
    pub peers: BTreeMap<PublicKey, WireGuardPeer>,
}

/// One peer on a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WireGuardPeer {
    /// Where we send. It may roam afterwards; see [`crate::plan`].
    pub endpoint: SocketAddr,
    /// The peer's pod CIDRs.
    pub allowed_ips: BTreeSet<IpNet>,
    /// Persistent keepalive in seconds.
    pub persistent_keepalive: Option<u16>,
    /// Of which secret its preshared key is made, if it has one.
    pub secret: Option<SecretId>,
}

/// Identity of a route in the main table: the kernel allows one per destination and metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct RouteKey {
    /// Destination prefix.
    pub destination: IpNet,
    /// Priority; lower wins.
    pub metric: u32,
}

/// A policy routing rule: a wall that stands when both the guard and the routes are gone.
/// What goes to a cluster network finds a route that is more specific than the network itself,
/// or none: never the default route.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rule {
    /// A cluster network.
    pub destination: IpNet,
    /// What happens to packets to it.
    pub step: RuleStep,
}

/// The two steps of the wall.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum RuleStep {
    /// Look into the main table, for routes more specific than the destination
    /// (`lookup main suppress_prefixlength N`).
    MoreSpecific,
    /// Otherwise there is no way (`unreachable`).
    Unreachable,
}

impl RuleStep {
    /// Both, in order.
    pub const ALL: [Self; 2] = [Self::MoreSpecific, Self::Unreachable];

    /// Priority of the rule; lower is first. The main table's own rule has 32766.
    pub fn priority(self) -> u32 {
        match self {
            Self::MoreSpecific => 15_100,
            Self::Unreachable => 15_101,
        }
    }
}

/// The rest of a route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Through which device, or nowhere.
    pub next_hop: NextHop,
    /// Route MTU in bytes, so that a too-large packet is answered on this node.
    pub mtu: Option<u32>,
    /// Preferred source address of packets that the node itself sends.
    pub source: Option<IpAddr>,
}

/// Where a route leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NextHop {
    /// Out of one of our devices, on link.
    Device(DeviceName),
    /// Through the VXLAN device behind this address, which counts as on link.
    Vtep {
        /// Our own VXLAN device.
        device: DeviceName,
        /// Base address of the peer's IPv4 pod CIDR, or the link-local one of its device.
        gateway: IpAddr,
    },
    /// In clear to another node on the same link.
    Node {
        /// Index of the underlay interface.
        link: u32,
        /// The node's address.
        gateway: IpAddr,
    },
    /// An ICMP unreachable to the sender: the fail-closed route.
    Unreachable,
}

impl NextHop {
    /// The device of ours that it leads out of.
    pub fn device(self) -> Option<DeviceName> {
        match self {
            Self::Device(device) | Self::Vtep { device, .. } => Some(device),
            Self::Node { .. } | Self::Unreachable => None,
        }
    }
}

/// A kernel setting we own.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Sysctl {
    /// `net.ipv4.ip_forward`.
    Ipv4Forward,
    /// `net.ipv6.conf.all.forwarding`.
    Ipv6Forward,
    /// `net.ipv4.conf.<device>.rp_filter`: 2, because a pair's two directions may use two devices.
    RpFilter(DeviceName),
    /// `net.ipv4.conf.<device>.forwarding`: what comes out of the tunnel goes on to a pod.
    Forwarding(DeviceName),
    /// `net.ipv6.conf.<device>.disable_ipv6`.
    DisableIpv6(DeviceName),
    /// `net.ipv4.conf.<bridge>.forwarding`: what comes from a pod goes on into the tunnel.
    BridgeForwarding(String),
    /// `net.ipv6.conf.<bridge>.disable_ipv6`.
    BridgeDisableIpv6(String),
}

impl Sysctl {
    /// Path below `/proc/sys`.
    pub fn path(&self) -> String {
        match self {
            Self::Ipv4Forward => "net/ipv4/ip_forward".to_owned(),
            Self::Ipv6Forward => "net/ipv6/conf/all/forwarding".to_owned(),
            Self::RpFilter(device) => format!("net/ipv4/conf/{device}/rp_filter"),
            Self::Forwarding(device) => format!("net/ipv4/conf/{device}/forwarding"),
            Self::DisableIpv6(device) => format!("net/ipv6/conf/{device}/disable_ipv6"),
            Self::BridgeForwarding(bridge) => format!("net/ipv4/conf/{bridge}/forwarding"),
            Self::BridgeDisableIpv6(bridge) => format!("net/ipv6/conf/{bridge}/disable_ipv6"),
        }
    }

    /// The device of ours that it is a setting of.
    pub fn device(&self) -> Option<DeviceName> {
        match self {
            Self::RpFilter(device) | Self::Forwarding(device) | Self::DisableIpv6(device) => {
                Some(*device)
            }
            _ => None,
        }
    }

    /// Whether it is a setting of the pod bridge, which the CNI plugin makes with the first pod.
    pub fn is_of_bridge(&self) -> bool {
        matches!(self, Self::BridgeForwarding(_) | Self::BridgeDisableIpv6(_))
    }
}

/// Table `inet gambeson`, as data. Rendering it for nft is the agent's business.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ruleset {
    /// The cluster networks: packets to or from them may only use `trusted_links`.
    pub cluster_networks: BTreeSet<IpNet>,
    /// Links on which cluster packets may travel in clear inside this node: our WireGuard
    /// devices, the pod bridge and lo.
    pub trusted_links: BTreeSet<String>,
    /// What may travel in clear on other links, since this node and another allow it: packets
    /// to these networks may leave, packets from them may come in.
    pub plaintext: BTreeMap<String, BTreeSet<IpNet>>,
    /// Families of which what leaves the cluster networks is masqueraded (`--ip-masq`).
    pub masquerade: BTreeSet<Family>,
}
