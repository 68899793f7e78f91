//! `Mesh + Local -> Desired`. A transport is one pure file; here they come together.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use crate::desired::{
    Desired, FAIL_CLOSED_METRIC, NextHop, Route, RouteKey, Rule, RuleStep, Ruleset, Sysctl,
};
use crate::family::Family;
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

/// What this node should have: the guard, fail-closed routes and settings always, and each
/// peer through its transport once this node has a key and a pod CIDR.
pub fn desired(mesh: &Mesh, local: &Local) -> Desired {
    let mut desired = Desired {
        routes: fail_closed(local),
        rules: rules(local),
        sysctls: settings(local),
        ruleset: ruleset(local),
        ..Desired::default()
    };
    vxlan::devices(local, &mut desired);
    for node in mesh.peers.values() {
        // The others that a pair allows are shut: what is in clear could be forged.
        match pair::transport(local, node) {
            Ok(Transport::Wireguard) => wireguard::reach(mesh, local, node, &mut desired),
            Ok(Transport::HostGw) => host_gw::reach(local, node, &mut desired),
            Ok(Transport::Vxlan) => vxlan::reach(local, node, &mut desired),
            Err(_) => {}
        }
    }
    wireguard::first_device(local, &mut desired);
    device_settings(&mut desired);
    desired
}

fn ruleset(local: &Local) -> Ruleset {
    let devices = Session::all().map(|session| session.device().as_str().to_owned());
    Ruleset {
        cluster_networks: local.cluster_networks.iter().map(IpNet::trunc).collect(),
        // All four devices from the start, so that a rotation does not touch the guard.
        trusted_links: devices.chain([local.bridge.clone(), LOOPBACK.to_owned()]).collect(),
        plaintext: BTreeMap::new(),
        masquerade: local.masquerade,
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
