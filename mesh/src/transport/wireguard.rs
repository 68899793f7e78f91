//! `Mesh + Local -> Desired` for WireGuard over IPv4 and IPv6 underlays.
//!
//! One tunnel per pair of keys carries both families of pod traffic. Which device it lives
//! on follows from the parities of both generations; see [`crate::session`].

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::net::SocketAddr;

use gambeson_keys::Generation;

use super::{base_addresses, peer_route_mtu, source};
use crate::desired::{
    Desired, NextHop, PEER_ROUTE_METRIC, Route, RouteKey, WireGuardDevice, WireGuardPeer,
};
use crate::live::{self, Pair};
use crate::node::{Local, Node, Transport};
use crate::preshared;
use crate::session::Session;
use crate::topology::Mesh;

#[cfg(test)]
mod tests;

/// Seconds between keepalives where a handshake is wanted and nothing else is sent.
const PROVOKING: u16 = 1;

/// Adds a peer to the devices of its sessions, which are made when they are first needed. A
/// handshake is asked for on those that are newer than the one in use, and on that one too where
/// `provoke` says so, or its device is another than the peer knows.
pub(super) fn admit(
    mesh: &Mesh,
    local: &Local,
    node: &Node,
    (pair, provoke): (Option<&Pair>, bool),
    desired: &mut Desired,
) {
    if local.pod_cidrs.is_empty() {
        return;
    }
    let used = live::used(local, node, pair);
    let provoke = provoke || pair.is_some_and(|pair| pair.lost);
    for (keys, key) in live::sessions(local, node) {
        let session = Session::between(keys.own, keys.theirs);
        let Some(mut peer) = peer(mesh, local, node, session) else { continue };
        peer.secret = preshared::of_session(local, node, (keys.own, keys.theirs));
        match Some(keys).cmp(&used) {
            Ordering::Greater => peer.persistent_keepalive = Some(PROVOKING),
            Ordering::Equal if provoke => peer.persistent_keepalive = Some(PROVOKING),
            Ordering::Equal => {}
            // What only waits to be shut stays silent, so that it can be seen to be unused.
            Ordering::Less => peer.persistent_keepalive = None,
        }
        let Some(device) = device(local, keys.own, session, desired) else { continue };
        device.peers.insert(key, peer);
    }
}

/// A node that accepts WireGuard and has no peer yet still gets a device, so that it is ready
/// for the first.
pub(super) fn first_device(local: &Local, desired: &mut Desired) {
    let accepts = local.transports.contains(&Transport::Wireguard);
    let key = local.current_key().filter(|_| accepts && !local.pod_cidrs.is_empty());
    if let Some((current, _)) = key.filter(|_| desired.devices.is_empty()) {
        device(local, current, Session::between(current, Generation::FIRST), desired);
    }
}

/// The device of a session, made when first asked for. `None` when its port would be past
/// 65535 or when a key of the same parity has it.
fn device<'a>(
    local: &Local,
    generation: Generation,
    session: Session,
    desired: &'a mut Desired,
) -> Option<&'a mut WireGuardDevice> {
    let (listen_port, public_key) = session.port(local.port).zip(local.keys.get(&generation))?;
    let device = desired.devices.entry(session.device()).or_insert_with(|| WireGuardDevice {
        implementation: local.implementation,
        generation,
        public_key: *public_key,
        listen_port,
        mtu: local.mtu_over(Transport::Wireguard),
        addresses: base_addresses(local),
        peers: BTreeMap::new(),
    });
    (device.generation == generation).then_some(device)
}

fn peer(mesh: &Mesh, local: &Local, node: &Node, session: Session) -> Option<WireGuardPeer> {
    let address = node.endpoints.reachable_from(local.endpoints)?;
    let port = match node.flannel {
        true => node.port,
        false => session.reversed().port(node.port)?,
    };
    // Either side may be the one behind NAT, so the shorter wish of both counts for both.
    let keepalives = [mesh.persistent_keepalive, node.persistent_keepalive];
    Some(WireGuardPeer {
        endpoint: SocketAddr::new(address, port),
        allowed_ips: node.pod_cidrs.clone(),
        persistent_keepalive: keepalives.into_iter().flatten().min(),
        secret: None,
    })
}

/// Routes to a peer's pods, for the families in which this node has an address to answer to.
pub(super) fn route(local: &Local, node: &Node, pair: Option<&Pair>, desired: &mut Desired) {
    let Some(used) = live::used(local, node, pair) else { return };
    let device = Session::between(used.own, used.theirs).device();
    let Some(link) = desired.devices.get(&device) else { return };
    let mtu = peer_route_mtu(local, node).min(link.mtu);
    for destination in &node.pod_cidrs {
        let Some(source) = source(&local.pod_cidrs, destination) else { continue };
        let key = RouteKey { destination: *destination, metric: PEER_ROUTE_METRIC };
        let next_hop = NextHop::Device(device);
        desired.routes.insert(key, Route { next_hop, mtu: Some(mtu), source: Some(source) });
    }
}
