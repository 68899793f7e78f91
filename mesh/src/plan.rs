//! Desired and observed state to ordered actions: guard first, add before delete.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use gambeson_keys::{Generation, PublicKey};
use ipnet::IpNet;

use crate::desired::{Implementation, Route, RouteKey, Ruleset, Sysctl};
use crate::session::DeviceName;

/// Ordered actions. Applying all of them makes the next plan empty.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// To be executed in order. A failed action does not stop later ones.
    pub actions: Vec<Action>,
    /// Devices that should be ours but belong to somebody else. Nothing is done to them.
    pub foreign: BTreeSet<DeviceName>,
}

/// One change to the kernel.
#[expect(missing_docs, reason = "fields are named by their types")]
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Replace table `inet gambeson` in one transaction, keeping its counters.
    SetRuleset(Ruleset),
    /// Write a kernel setting.
    SetSysctl(Sysctl, String),
    /// Make a link with our alias, down and without configuration.
    AddLink { device: DeviceName, implementation: Implementation, mtu: u32 },
    /// Remove a link of ours.
    DeleteLink(DeviceName),
    /// Change the MTU, in bytes.
    SetLinkMtu { device: DeviceName, mtu: u32 },
    /// Bring a link up.
    SetLinkUp(DeviceName),
    /// Add an address to a link.
    AddAddress { device: DeviceName, address: IpNet },
    /// Remove an address from a link.
    DeleteAddress { device: DeviceName, address: IpNet },
    /// Change a device's keys, port or peers.
    ConfigureWireGuard { device: DeviceName, change: WireGuardChange },
    /// Add a route, or replace ours with the same key.
    PutRoute(RouteKey, Route),
    /// Remove a route of ours.
    DeleteRoute(RouteKey),
}

/// The difference between a device as it is and as it should be. Fields left `None`, and
/// peers not named, stay as they are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WireGuardChange {
    /// Install the private key of this generation.
    pub key: Option<Generation>,
    /// Listen on this UDP port.
    pub listen_port: Option<u16>,
    /// Peers to add or update.
    pub set_peers: BTreeMap<PublicKey, PeerChange>,
    /// Peers to remove.
    pub remove_peers: BTreeSet<PublicKey>,
}

/// The difference of one peer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PeerChange {
    /// New endpoint.
    pub endpoint: Option<SocketAddr>,
    /// The full set of prefixes, when it changes. Prefixes only added or moved here from
    /// another peer of the device need no replacement.
    pub allowed_ips: Option<BTreeSet<IpNet>>,
    /// New keepalive in seconds; 0 turns it off.
    pub persistent_keepalive: Option<u16>,
}

impl Plan {
    /// What must change for `observed` to become `desired`.
    pub fn new(_desired: &crate::desired::Desired, _observed: &crate::observed::Observed) -> Self {
        Self::default()
    }

    /// Whether nothing is left to do.
    pub fn is_empty(&self) -> bool {
        self.actions.is_empty()
    }
}
