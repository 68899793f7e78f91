//! What Flannel leaves on a node. Its VXLAN devices become ours without going down, with their
//! addresses and routes; everything else goes. And the way back.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use gambeson_mesh::desired::{
    LinkKind, NextHop, PEER_ROUTE_METRIC, ROUTE_PROTOCOL, Route, RouteKey, VtepEntry,
};
use gambeson_mesh::family::Family;
use gambeson_mesh::node::Transport;
use gambeson_mesh::session::DeviceName;
use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::route::{RouteFlags, RouteMessage, RouteProtocol};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::link::{self, Link};
use super::netlink::Netlink;
use super::{ApplyError, route, vtep};

/// Flannel's WireGuard devices.
const WIREGUARD: [&str; 2] = ["flannel-wg", "flannel-wg-v6"];

/// What of Flannel's is looked for, and what of it may go on.
#[derive(Debug, Clone, Copy)]
pub struct Flannel<'a> {
    /// Of its VXLAN devices.
    pub vni: u32,
    /// Transports that this node accepts.
    pub accepted: &'a BTreeSet<Transport>,
    /// The cluster networks.
    pub networks: &'a BTreeSet<IpNet>,
}

/// Flannel's VXLAN device of this family of the underlay.
fn name(family: Family, vni: u32) -> String {
    match family {
        Family::V4 => format!("flannel.{vni}"),
        Family::V6 => format!("flannel-v6.{vni}"),
    }
}

/// Flannel's VXLAN devices that there are, and what they are to be.
pub(super) async fn devices(
    netlink: &mut Netlink,
    vni: u32,
) -> Result<Vec<(DeviceName, Link)>, ApplyError> {
    let mut found = Vec::new();
    for family in Family::ALL {
        let link = link::find(netlink, &name(family, vni)).await?;
        let is =
            |link: &Link| matches!(link.kind, Some(LinkKind::Vxlan(own)) if own.vxlan.vni == vni);
        if let Some(link) = link.filter(is) {
            found.push((DeviceName::Vxlan(family), link));
        }
    }
    Ok(found)
}

/// Where Flannel's routes lead that are to be taken over by transports that are `accepted`, under
/// the names that its devices have now and will have.
pub(super) async fn in_clear(
    netlink: &mut Netlink,
    flannel: &Flannel<'_>,
) -> Result<BTreeMap<String, BTreeSet<IpNet>>, ApplyError> {
    let mut found: BTreeMap<String, BTreeSet<IpNet>> = BTreeMap::new();
    if flannel.accepted.contains(&Transport::HostGw) {
        for (link, PeerRoute { key, gateway, .. }) in direct_routes(netlink, flannel).await? {
            let name = link::name(netlink, link).await?;
            found.entry(name).or_default().extend([key.destination, IpNet::from(gateway)]);
        }
    }
    let vxlan = flannel.accepted.contains(&Transport::Vxlan);
    for (device, link) in devices(netlink, flannel.vni).await?.into_iter().filter(|_| vxlan) {
        let routes = routes(netlink, link.index).await?;
        let behind: BTreeSet<_> = routes.iter().map(|route| route.key.destination).collect();
        found.insert(link.name, behind.clone());
        found.insert(device.to_string(), behind);
    }
    Ok(found)
}

/// Takes over Flannel's VXLAN devices and direct routes where these transports are accepted, and
/// removes them otherwise, and its WireGuard devices, which hold our port. Says what was done.
pub(super) async fn take_over(
    netlink: &mut Netlink,
    flannel: &Flannel<'_>,
) -> Result<Vec<String>, ApplyError> {
    let mut done = Vec::new();
    for (link, found) in direct_routes(netlink, flannel).await? {
        done.push(format!("route {}", found.key.destination));
        let next_hop = NextHop::Node { link, gateway: found.gateway };
        let keep = flannel.accepted.contains(&Transport::HostGw);
        take_over_route(netlink, found, keep.then_some(next_hop)).await?;
    }
    let keep = flannel.accepted.contains(&Transport::Vxlan);
    for (device, link) in devices(netlink, flannel.vni).await? {
        if keep && link::find(netlink, device.as_str()).await?.is_none() {
            link::take_over(netlink, device, link.index).await?;
            for found in routes(netlink, link.index).await? {
                let next_hop = NextHop::Vtep { device, gateway: found.gateway };
                take_over_route(netlink, found, Some(next_hop)).await?;
            }
            done.push(format!("{} is {device}", link.name));
        } else {
            link::delete_foreign(netlink, &link).await?;
            done.push(format!("- link {}", link.name));
        }
    }
    for name in WIREGUARD {
        if let Some(link) = link::find(netlink, name).await? {
            link::delete_foreign(netlink, &link).await?;
            done.push(format!("- link {name}"));
        }
    }
    Ok(done)
}

/// A route of Flannel's becomes one of ours that leads the same way, or none.
async fn take_over_route(
    netlink: &mut Netlink,
    PeerRoute { key, message, .. }: PeerRoute,
    next_hop: Option<NextHop>,
) -> Result<(), ApplyError> {
    if let Some(next_hop) = next_hop {
        let ours = RouteKey { destination: key.destination, metric: PEER_ROUTE_METRIC };
        route::put(netlink, ours, &leading(next_hop)).await?;
    }
    route::delete_message(netlink, key, message).await
}

fn leading(next_hop: NextHop) -> Route {
    Route { next_hop, mtu: None, source: None }
}

/// Gives our VXLAN devices and direct routes back to Flannel, with Flannel's routes and without a pause. The guard
/// has to be gone: it does not know them by that name.
pub(super) async fn hand_back(netlink: &mut Netlink) -> Result<Vec<String>, ApplyError> {
    let mut done = Vec::new();
    for family in Family::ALL {
        let device = DeviceName::Vxlan(family);
        let link = link::find(netlink, device.as_str()).await?.filter(|link| link.ours);
        let Some((link, LinkKind::Vxlan(vxlan))) =
            link.and_then(|link| Some((link.clone(), link.kind?)))
        else {
            continue;
        };
        let neighbours = vtep::observe(netlink, device, link.index).await?.neighbours;
        for PeerRoute { key, gateway, .. } in routes(netlink, link.index).await? {
            let base = key.destination.network();
            if let Some(mac) = neighbours.get(&gateway) {
                let entry = VtepEntry::Neighbour { gateway: base, mac: *mac };
                vtep::put(netlink, device, entry).await?;
            }
            let next_hop = NextHop::Vtep { device, gateway: base };
            hand_back_route(netlink, key, next_hop, link.index).await?;
        }
        let name = name(family, vxlan.vxlan.vni);
        link::give_away(netlink, device, link.index, &name).await?;
        done.push(format!("{device} is {name}"));
    }
    for (link, PeerRoute { key, gateway, message }) in all_routes(netlink).await? {
        if message.header.protocol == RouteProtocol::Other(ROUTE_PROTOCOL) {
            hand_back_route(netlink, key, NextHop::Node { link, gateway }, link).await?;
            done.push(format!("route {}", key.destination));
        }
    }
    Ok(done)
}

/// A route of ours becomes Flannel's: without a metric, and with the protocol of whoever sets none.
async fn hand_back_route(
    netlink: &mut Netlink,
    ours: RouteKey,
    next_hop: NextHop,
    link: u32,
) -> Result<(), ApplyError> {
    let key = RouteKey { metric: 0, ..ours };
    let mut message = route::message(key, &leading(next_hop), Some(link));
    message.header.protocol = RouteProtocol::Boot;
    let flags = NLM_F_CREATE | NLM_F_REPLACE;
    let added = netlink.change(RouteNetlinkMessage::NewRoute(message), flags).await;
    added.map_err(|source| ApplyError::PutRoute { key, source })?;
    route::delete(netlink, ours).await
}

/// A route to another node's pods.
struct PeerRoute {
    key: RouteKey,
    gateway: IpAddr,
    message: RouteMessage,
}

/// The routes to peers that lead out of a link.
async fn routes(netlink: &mut Netlink, index: u32) -> Result<Vec<PeerRoute>, ApplyError> {
    let all = all_routes(netlink).await?;
    Ok(all.into_iter().filter(|(link, _)| *link == index).map(|(_, route)| route).collect())
}

/// Flannel's routes of host-gw, with the link that each leads out of: into the cluster networks,
/// by a router, and with the protocol of whoever sets none.
async fn direct_routes(
    netlink: &mut Netlink,
    flannel: &Flannel<'_>,
) -> Result<Vec<(u32, PeerRoute)>, ApplyError> {
    let mut all = all_routes(netlink).await?;
    all.retain(|(_, PeerRoute { key, message, .. })| {
        let header = &message.header;
        let destination = &key.destination;
        let within = |network: &IpNet| network.contains(destination) && network != destination;
        header.protocol == RouteProtocol::Boot
            && !header.flags.contains(RouteFlags::Onlink)
            && flannel.networks.iter().any(within)
    });
    Ok(all)
}

/// Every route with a router, and its link.
async fn all_routes(netlink: &mut Netlink) -> Result<Vec<(u32, PeerRoute)>, ApplyError> {
    let mut found = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        for message in route::dump(netlink, family, RouteProtocol::Unspec).await? {
            if let (Some(link), Some(key), Some(gateway)) =
                (route::output_link(&message), route::key_of(&message), route::gateway(&message))
            {
                found.push((link, PeerRoute { key, gateway, message }));
            }
        }
    }
    Ok(found)
}
