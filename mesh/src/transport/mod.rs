//! `Mesh + Local -> Desired`. A transport is one pure file; here they come together.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use crate::desired::{
    Desired, FAIL_CLOSED_METRIC, NextHop, Route, RouteKey, Rule, RuleStep, Ruleset, Sysctl,
};
use crate::node::Local;
use crate::session::Session;
use crate::topology::Mesh;

mod wireguard;

/// The loopback link.
const LOOPBACK: &str = "lo";

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
    wireguard::desire(mesh, local, &mut desired);
    desired
}

fn ruleset(local: &Local) -> Ruleset {
    let devices = Session::all().map(|session| session.device().as_str().to_owned());
    Ruleset {
        cluster_networks: local.cluster_networks.iter().map(IpNet::trunc).collect(),
        // All four devices from the start, so that a rotation does not touch the guard.
        trusted_links: devices.chain([local.bridge.clone(), LOOPBACK.to_owned()]).collect(),
        masquerade: local.masquerade,
    }
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
