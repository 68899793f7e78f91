//! `Mesh + Local -> Desired` for host-gw: a peer's pods are behind the peer's own address, on
//! the link that both nodes are on.
//!
//! Packets that a node itself sends carry its own address, as everything on that link does,
//! and so the answers go there: the guard lets pods' packets to a peer's address pass as well.

use ipnet::IpNet;

use super::peer_route_mtu;
use crate::desired::{Desired, NextHop, PEER_ROUTE_METRIC, Route, RouteKey};
use crate::family::Family;
use crate::node::{Local, Node, Transport};
use crate::pair;

/// Lets packets to and from a peer's pods pass on the underlay interface, and answers to the
/// peer itself.
pub(super) fn admit(local: &Local, node: &Node, desired: &mut Desired) {
    let plaintext = desired.ruleset.plaintext.entry(local.underlay.clone()).or_default();
    plaintext.extend(&node.pod_cidrs);
    plaintext.extend(pair::next_hops(local, node).into_iter().flatten().map(IpNet::from));
}

/// Routes to a peer's pods.
pub(super) fn route(local: &Local, node: &Node, desired: &mut Desired) {
    let mtu = Some(peer_route_mtu(local, node).min(local.mtu_over(Transport::HostGw)));
    for destination in &node.pod_cidrs {
        let Some(gateway) = node.endpoints.get(Family::of_net(destination)) else { continue };
        let key = RouteKey { destination: *destination, metric: PEER_ROUTE_METRIC };
        let next_hop = NextHop::Node { link: local.underlay_index, gateway };
        desired.routes.insert(key, Route { next_hop, mtu, source: None });
    }
}
