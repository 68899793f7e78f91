//! `Mesh + Local -> Desired` for WireGuard over IPv4 and IPv6 underlays.
//!
//! One tunnel per pair of keys carries both families of pod traffic. Which device it lives
//! on follows from the parities of both generations; see [`crate::session`].

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use gambeson_keys::{Generation, PublicKey};
use ipnet::IpNet;

use crate::desired::{
    Desired, NextHop, PEER_ROUTE_METRIC, Route, RouteKey, Sysctl, WireGuardDevice, WireGuardPeer,
};
use crate::node::{LARGEST_MTU, Local, Node, Transport};
use crate::session::{DeviceName, Session};
use crate::topology::Mesh;

#[cfg(test)]
mod tests;

/// `rp_filter` of our devices: loose, because the two directions of a pair may use two of
/// them while a key is replaced.
const LOOSE: &str = "2";

/// Adds the devices, peers and routes of every peer that is reached over WireGuard. A node
/// without peers still gets a device, so that it is ready for the first.
pub(super) fn desire(mesh: &Mesh, local: &Local, desired: &mut Desired) {
    let Some((current, _)) = local.current_key().filter(|_| !local.pod_cidrs.is_empty()) else {
        return;
    };
    for node in mesh.peers.values().filter(|node| uses_wireguard(local, node)) {
        for own in local.keys.keys() {
            for (theirs, key) in keys(node) {
                let session = Session::between(*own, theirs);
                let Some(peer) = peer(mesh, local, node, session) else { continue };
                let Some(device) = device(local, *own, session, desired) else { continue };
                device.peers.insert(key, peer);
            }
        }
        route(local, node, Session::between(current, node.generation).device(), desired);
    }
    if desired.devices.is_empty() {
        device(local, current, Session::between(current, Generation::FIRST), desired);
    }
    for (name, device) in &desired.devices {
        let mut set = |sysctl, value: &str| desired.sysctls.insert(sysctl, value.to_owned());
        set(Sysctl::RpFilter(*name), LOOSE);
        set(Sysctl::Forwarding(*name), "1");
        if device.addresses.iter().any(|address| address.addr().is_ipv6()) {
            set(Sysctl::DisableIpv6(*name), "0");
        }
    }
}

fn uses_wireguard(local: &Local, node: &Node) -> bool {
    let ours = local.transports.contains(&Transport::Wireguard);
    ours && node.transports.contains(&Transport::Wireguard)
}

fn keys(node: &Node) -> impl Iterator<Item = (Generation, PublicKey)> {
    let next = node.generation.next().zip(node.next_public_key);
    std::iter::once((node.generation, node.public_key)).chain(next)
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
        mtu: local.inner_mtu(),
        addresses: local.pod_cidrs.iter().map(|cidr| host(cidr.network())).collect(),
        peers: BTreeMap::new(),
    });
    (device.generation == generation).then_some(device)
}

fn peer(mesh: &Mesh, local: &Local, node: &Node, session: Session) -> Option<WireGuardPeer> {
    let address = node.endpoints.reachable_from(local.endpoints)?;
    let port = session.reversed().port(node.port)?;
    // Either side may be the one behind NAT, so the shorter wish of both counts for both.
    let keepalives = [mesh.persistent_keepalive, node.persistent_keepalive];
    Some(WireGuardPeer {
        endpoint: SocketAddr::new(address, port),
        allowed_ips: node.pod_cidrs.clone(),
        persistent_keepalive: keepalives.into_iter().flatten().min(),
    })
}

/// Routes to a peer's pods, for the families in which this node has an address to answer to.
fn route(local: &Local, node: &Node, device: DeviceName, desired: &mut Desired) {
    if !desired.devices.contains_key(&device) {
        return;
    }
    let mtu = local.inner_mtu().min(node.mtu.unwrap_or(u32::MAX)).min(LARGEST_MTU);
    for destination in &node.pod_cidrs {
        let Some(source) = source(&local.pod_cidrs, destination) else { continue };
        let key = RouteKey { destination: *destination, metric: PEER_ROUTE_METRIC };
        let next_hop = NextHop::Device(device);
        desired.routes.insert(key, Route { next_hop, mtu: Some(mtu), source: Some(source) });
    }
}

fn source(own: &BTreeSet<IpNet>, destination: &IpNet) -> Option<IpAddr> {
    let is_v4 = destination.network().is_ipv4();
    own.iter().map(IpNet::network).find(|address| address.is_ipv4() == is_v4)
}

fn host(address: IpAddr) -> IpNet {
    IpNet::from(address)
}
