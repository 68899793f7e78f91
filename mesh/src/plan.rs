//! Desired and observed state to ordered actions: guard first, add before delete.
//!
//! ```text
//! guard -> settings -> fail-closed routes, rules     nothing can leave in clear from here on
//! -> links -> keys, ports, peers -> addresses -> up -> neighbours, forwarding -> device settings
//! -> routes -> delete routes -> delete peers, neighbours -> delete addresses -> delete links
//! ```
//!
//! A link that must become another kind, or whose tunnel process is gone, is deleted right
//! before it is added again: two links cannot share a name. The fail-closed routes hold
//! its packets back meanwhile.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use gambeson_keys::{Generation, PublicKey, SecretId};
use ipnet::IpNet;

use crate::desired::{
    Desired, LinkKind, NextHop, Route, RouteKey, Rule, Ruleset, Sysctl, VtepEntry, WireGuardDevice,
};
use crate::observed::{ForeignRoute, ForwardDrop, Observed, ObservedWireGuard};
use crate::session::DeviceName;

mod diff;
#[cfg(test)]
mod tests;
mod vxlan;
mod wireguard;

/// Ordered actions. Applying all of them makes the next plan empty.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// To be executed in order. A failed action does not stop later ones.
    pub actions: Vec<Action>,
    /// Devices that should be ours but belong to somebody else. Nothing is done to them.
    pub foreign: BTreeSet<DeviceName>,
    /// Routes of somebody else that take packets away from our devices, and the destination
    /// of ours that they win over. Nothing is done to them.
    pub overruled: BTreeMap<ForeignRoute, IpNet>,
    /// Firewall chains of somebody else that drop pods' packets, in which we have no place.
    pub blocked: BTreeSet<ForwardDrop>,
}

/// One change to the kernel.
#[expect(missing_docs, reason = "fields are named by their types")]
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Replace table `inet gambeson` in one transaction, keeping its counters.
    SetRuleset(Ruleset),
    /// Accept the cluster networks' packets in the firewall of iptables-nft.
    AcceptForwarded(ForwardDrop),
    /// Write a kernel setting.
    SetSysctl(Sysctl, String),
    /// Make a link with our alias, down and without configuration.
    AddLink { device: DeviceName, kind: LinkKind, mtu: u32 },
    /// Give a link of ours its alias back.
    MarkLink(DeviceName),
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
    /// Set an entry of a VXLAN device's tables.
    PutEntry { device: DeviceName, entry: VtepEntry },
    /// Remove an entry of a VXLAN device's tables.
    DeleteEntry { device: DeviceName, entry: VtepEntry },
    /// Add a route, or replace ours with the same key.
    PutRoute(RouteKey, Route),
    /// Remove a route of ours.
    DeleteRoute(RouteKey),
    /// Add a policy routing rule.
    AddRule(Rule),
    /// Remove a policy routing rule of ours.
    DeleteRule(Rule),
}

/// The difference between a device as it is and as it should be. Fields left `None`, and
/// peers not named, stay as they are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WireGuardChange {
    /// Install the private key of this generation.
    pub key: Option<Generation>,
    /// Listen on this UDP port.
    pub listen_port: Option<u16>,
    /// Take away the mark that somebody set.
    pub clear_fwmark: bool,
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
    /// The full set of prefixes, when it changes. Giving a prefix to a peer takes it from
    /// any other peer of the device.
    pub allowed_ips: Option<BTreeSet<IpNet>>,
    /// New keepalive in seconds; 0 turns it off.
    pub persistent_keepalive: Option<u16>,
    /// Set the preshared key that is made of this secret, or take away the one that is there.
    pub preshared_key: Option<Option<SecretId>>,
}

impl Plan {
    /// What must change for `observed` to become `desired`.
    pub fn new(desired: &Desired, observed: &Observed) -> Self {
        diff::plan(desired, observed)
    }

    /// The guard and the fail-closed routes alone, whatever the kernel has.
    pub fn fail_closed(desired: &Desired) -> Self {
        let mut actions = vec![Action::SetRuleset(desired.ruleset.clone())];
        let routes = desired.routes.iter();
        let closed = routes.filter(|(_, route)| route.next_hop == NextHop::Unreachable);
        actions.extend(closed.map(|(key, route)| Action::PutRoute(*key, route.clone())));
        actions.extend(desired.rules.iter().map(|rule| Action::AddRule(*rule)));
        Self { actions, ..Self::default() }
    }

    /// Everything of ours that there is goes; of what is fail-closed only with `walls`.
    pub fn removal(observed: &Observed, walls: bool) -> Self {
        let routes = observed.routes.iter();
        let routes = routes.filter(|(_, route)| walls || route.next_hop != NextHop::Unreachable);
        let ours = observed.links.iter().filter(|(_, link)| link.ours && link.kind.is_some());
        let rules = observed.rules.iter().filter(|_| walls);
        let actions = routes.map(|(key, _)| Action::DeleteRoute(*key));
        let actions = actions.chain(ours.map(|(device, _)| Action::DeleteLink(*device)));
        let actions = actions.chain(rules.map(|rule| Action::DeleteRule(*rule))).collect();
        Self { actions, ..Self::default() }
    }

    /// Whether nothing is left to do.
    pub fn is_empty(&self) -> bool {
        self.actions.is_empty()
    }
}

/// The guard that should be in force: a link with one of our names that somebody else made
/// is not trusted.
pub fn ruleset(desired: &Desired, observed: &Observed) -> Ruleset {
    diff::ruleset(desired, observed)
}

/// Whether the guard, every fail-closed route and every device was there already.
pub fn is_in_place(desired: &Desired, observed: &Observed) -> bool {
    observed.ruleset.as_ref() == Some(&ruleset(desired, observed))
        && desired.links().all(|(name, wanted)| {
            let link = observed.links.get(&name).filter(|link| link.ours);
            link.is_some_and(|link| match wanted.kind {
                LinkKind::WireGuard(_) => link.wireguard.is_some(),
                LinkKind::Vxlan(_) => link.kind == Some(wanted.kind),
            })
        })
        && desired
            .routes
            .iter()
            .filter(|(_, route)| route.next_hop == NextHop::Unreachable)
            .all(|(key, route)| observed.routes.get(key) == Some(route))
}

/// Whether a device has the keys, the port and the peers that it should. Where packets to a
/// peer go is left out: that follows the peer.
pub fn is_configured(device: &WireGuardDevice, observed: &ObservedWireGuard) -> bool {
    wireguard::is_configured(device, observed)
}

impl WireGuardChange {
    /// Whether nothing changes.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl PeerChange {
    /// Whether nothing changes. A peer that is to be added without any change is still named.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}
