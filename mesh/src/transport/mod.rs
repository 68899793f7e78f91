//! `Mesh + Local + Paths -> Desired`. A transport is one pure file; here they come together.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use crate::changeover::{Change, Changes};
use crate::desired::{
    Desired, FAIL_CLOSED_METRIC, NextHop, Route, RouteKey, Rule, RuleStep, Ruleset, Sysctl,
};
use crate::family::Family;
use crate::live::{Pair, Pairs};
use crate::node::{LARGEST_MTU, Local, Node, Transport};
use crate::pair;
use crate::session::Session;
use crate::topology::Mesh;

mod host_gw;
#[cfg(test)]
mod tests;
mod vxlan;
mod wireguard;

/// The loopback link.
const LOOPBACK: &str = "lo";
/// `rp_filter` of our devices: loose, because the two directions of a pair may use two of
/// them while a key is replaced or the transport changes.
const LOOSE: &str = "2";

/// Of the ways to each peer, what the kernel tells and time decides.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Paths {
    /// Pairs whose transport is changing.
    pub changes: Changes,
    /// Which of their sessions are live.
    pub pairs: Pairs,
}

/// What this node should have: the guard, fail-closed routes and settings always, and each
/// peer through its transport once this node has a key and a pod CIDR: both of its transports,
/// while it changes.
pub fn desired(mesh: &Mesh, local: &Local, paths: &Paths) -> Desired {
    let mut desired = Desired {
        routes: fail_closed(local),
        rules: rules(local),
        sysctls: settings(local),
        ruleset: ruleset(local),
        ..Desired::default()
    };
    vxlan::devices(local, &mut desired);
    for node in mesh.peers.values() {
        let (change, pair) = (paths.changes.get(&node.name), paths.pairs.get(&node.name));
        reach(mesh, local, node, (change, pair), &mut desired);
    }
    wireguard::first_device(local, &mut desired);
    device_settings(&mut desired);
    desired
}

/// Takes packets from a peer and sends packets to it. Transports that the pair allows and does
/// not use are shut: what is in clear could be forged.
fn reach(
    mesh: &Mesh,
    local: &Local,
    node: &Node,
    (change, pair): (Option<&Change>, Option<&Pair>),
    desired: &mut Desired,
) {
    let Ok(transport) = pair::transport(local, node) else { return };
    let change = change.copied();
    let (old, new) = change.map_or((None, transport), |change| (Some(change.from), change.to));
    let provoke = change.is_some_and(Change::awaits_handshake);
    for transport in old.into_iter().chain([new]) {
        match transport {
            Transport::Wireguard => wireguard::admit(mesh, local, node, (pair, provoke), desired),
            Transport::HostGw => host_gw::admit(local, node, desired),
            Transport::Vxlan => vxlan::admit(local, node, desired),
        }
    }
    match change.map_or(transport, Change::sends_by) {
        Transport::Wireguard => wireguard::route(local, node, pair, desired),
        Transport::HostGw => host_gw::route(local, node, desired),
        Transport::Vxlan => vxlan::route(local, node, desired),
    }
}

fn ruleset(local: &Local) -> Ruleset {
    let devices = Session::all().map(|session| session.device().as_str().to_owned());
    Ruleset {
        cluster_networks: local.cluster_networks.iter().map(IpNet::trunc).collect(),
        // All four devices from the start, so that a rotation does not touch the guard.
        trusted_links: devices.chain([local.bridge.clone(), LOOPBACK.to_owned()]).collect(),
        plaintext: BTreeMap::new(),
        masquerade: local.masquerade.clone(),
    }
}

/// Settings of the devices of both kinds.
fn device_settings(desired: &mut Desired) {
    let mut settings = Vec::new();
    for (name, link) in desired.links() {
        settings.push((Sysctl::RpFilter(name), LOOSE));
        settings.push((Sysctl::Forwarding(name), "1"));
        if link.addresses.iter().any(|address| address.addr().is_ipv6()) {
            settings.push((Sysctl::DisableIpv6(name), "0"));
        }
    }
    let settings = settings.into_iter().map(|(sysctl, value)| (sysctl, value.to_owned()));
    desired.sysctls.extend(settings);
}

/// Each pod CIDR's base address, which a node's devices have.
fn base_addresses(local: &Local) -> BTreeSet<IpNet> {
    local.pod_cidrs.iter().map(|cidr| IpNet::from(cidr.network())).collect()
}

/// What this node sends to pods in this prefix from.
fn source(own: &BTreeSet<IpNet>, destination: &IpNet) -> Option<IpAddr> {
    let same = |cidr: &&IpNet| Family::of_net(cidr) == Family::of_net(destination);
    own.iter().find(same).map(IpNet::network)
}

/// MTU of routes to a peer in bytes: what both ends can take.
fn peer_route_mtu(local: &Local, node: &Node) -> u32 {
    local.inner_mtu().min(node.mtu.unwrap_or(u32::MAX)).min(LARGEST_MTU)
}

fn fail_closed(local: &Local) -> BTreeMap<RouteKey, Route> {
    let unreachable = Route { next_hop: NextHop::Unreachable, mtu: None, source: None };
    local
        .cluster_networks
        .iter()
        .map(|network| RouteKey { destination: network.trunc(), metric: FAIL_CLOSED_METRIC })
        .map(|key| (key, unreachable.clone()))
        .collect()
}

fn rules(local: &Local) -> BTreeSet<Rule> {
    let networks = local.cluster_networks.iter().map(IpNet::trunc);
    networks.flat_map(|destination| RuleStep::ALL.map(|step| Rule { destination, step })).collect()
}

fn settings(local: &Local) -> BTreeMap<Sysctl, String> {
    let setting = |network: &IpNet| {
        let bridge = local.bridge.clone();
        match network {
            IpNet::V4(_) => [(Sysctl::Ipv4Forward, "1"), (Sysctl::BridgeForwarding(bridge), "1")],
            IpNet::V6(_) => [(Sysctl::Ipv6Forward, "1"), (Sysctl::BridgeDisableIpv6(bridge), "0")],
        }
    };
    let settings = local.cluster_networks.iter().flat_map(setting);
    settings.map(|(sysctl, value)| (sysctl, value.to_owned())).collect()
}
