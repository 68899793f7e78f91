//! Routes of ours (protocol 151) in the main table, both families, and those of others into
//! the cluster networks.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use gambeson_mesh::desired::{NextHop, ROUTE_PROTOCOL, Route, RouteKey};
use gambeson_mesh::node::Transport;
use gambeson_mesh::observed::ForeignRoute;
use gambeson_mesh::session::DeviceName;
use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric,
    RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::libc::{EEXIST, ESRCH};

use super::netlink::{Netlink, family_of};
use super::{ApplyError, link};

/// Reads our routes, and those of others into `networks`. `devices` are the links with our
/// names by interface index.
///
/// A route with our protocol number that leads elsewhere than we ever route counts as
/// somebody else's: it is replaced when one of ours has the same key, and otherwise is not
/// known to be ours.
pub(super) async fn observe(
    netlink: &mut Netlink,
    devices: &BTreeMap<u32, DeviceName>,
    networks: &BTreeSet<IpNet>,
) -> Result<(BTreeMap<RouteKey, Route>, BTreeSet<ForeignRoute>), ApplyError> {
    let (mut routes, mut foreign) = (BTreeMap::new(), BTreeSet::new());
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        for message in dump(netlink, family, RouteProtocol::Unspec).await? {
            let Some(key) = key_of(&message) else { continue };
            let protocol = u8::from(message.header.protocol);
            match route_of(&message, devices).filter(|_| protocol == ROUTE_PROTOCOL) {
                Some(route) => _ = routes.insert(key, route),
                None if networks.iter().any(|network| network.contains(&key.destination)) => {
                    let leads = leads(netlink, &message).await?;
                    foreign.insert(ForeignRoute { key, protocol, leads });
                }
                None => {}
            }
        }
    }
    Ok((routes, foreign))
}

/// Where our routes lead by transports that are `allowed` and in clear, and who is behind them,
/// by the name of the link.
pub(super) async fn in_clear(
    netlink: &mut Netlink,
    allowed: &BTreeSet<Transport>,
) -> Result<BTreeMap<String, BTreeSet<IpNet>>, ApplyError> {
    let mut devices = BTreeMap::new();
    for device in DeviceName::all() {
        if let Some(link) = link::find(netlink, device.as_str()).await?.filter(|link| link.ours) {
            devices.insert(link.index, device);
        }
    }
    let (routes, _) = observe(netlink, &devices, &BTreeSet::new()).await?;
    let mut found: BTreeMap<String, BTreeSet<IpNet>> = BTreeMap::new();
    for (key, route) in routes {
        if !Transport::of(route.next_hop).is_some_and(|transport| allowed.contains(&transport)) {
            continue;
        }
        let (link, gateway) = match route.next_hop {
            NextHop::Vtep { device, .. } => (device.to_string(), None),
            NextHop::Node { link, gateway } => (link::name(netlink, link).await?, Some(gateway)),
            NextHop::Device(_) | NextHop::Unreachable => continue,
        };
        let behind = found.entry(link).or_default();
        behind.extend(gateway.map(IpNet::from).into_iter().chain([key.destination]));
    }
    Ok(found)
}

/// The kernel's own choice for a destination, where there is one.
pub(crate) async fn lookup(netlink: &mut Netlink, address: IpAddr) -> Option<RouteMessage> {
    let mut request = RouteMessage::default();
    request.header.address_family = family_of(address);
    request.header.destination_prefix_length = IpNet::from(address).prefix_len();
    request.attributes.push(RouteAttribute::Destination(address.into()));
    match netlink.get(RouteNetlinkMessage::GetRoute(request)).await {
        Ok(RouteNetlinkMessage::NewRoute(route)) => Some(route),
        // It answers an unreachable destination with an errno.
        _ => None,
    }
}

/// Whether a destination is reached over the link with this index and no router.
pub(super) async fn is_on_link(netlink: &mut Netlink, address: IpAddr, index: u32) -> bool {
    let Some(route) = lookup(netlink, address).await else { return false };
    let is_gateway = |attribute: &RouteAttribute| {
        matches!(attribute, RouteAttribute::Gateway(_) | RouteAttribute::Via(_))
    };
    route.header.kind == RouteType::Unicast
        && output_link(&route) == Some(index)
        && !route.attributes.iter().any(is_gateway)
}

/// Index of the link that a route leads out of, if it is one.
pub(crate) fn output_link(message: &RouteMessage) -> Option<u32> {
    message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => Some(*index),
        _ => None,
    })
}

/// The router that a route leads to, if it is one.
pub(super) fn gateway(message: &RouteMessage) -> Option<IpAddr> {
    message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Gateway(address) => ip_of(address),
        _ => None,
    })
}

/// Where a route leads, as `ip route` says it.
async fn leads(netlink: &mut Netlink, message: &RouteMessage) -> Result<String, ApplyError> {
    let kind = match message.header.kind {
        RouteType::Unicast => "",
        RouteType::BlackHole => "blackhole",
        RouteType::Unreachable => "unreachable",
        RouteType::Prohibit => "prohibit",
        RouteType::Throw => "throw",
        _ => "of another type",
    };
    Ok(match (kind, output_link(message)) {
        ("", Some(index)) => format!("dev {}", link::name(netlink, index).await?),
        ("", None) => "over several links".to_owned(),
        _ => kind.to_owned(),
    })
}

/// Adds a route, or replaces ours with the same key.
pub(super) async fn put(
    netlink: &mut Netlink,
    key: RouteKey,
    route: &Route,
) -> Result<(), ApplyError> {
    let index = match route.next_hop {
        NextHop::Device(device) | NextHop::Vtep { device, .. } => {
            Some(link::ours(netlink, device).await?.index)
        }
        NextHop::Node { link, .. } => Some(link),
        NextHop::Unreachable => None,
    };
    let message = RouteNetlinkMessage::NewRoute(message(key, route, index));
    let failed = |source| ApplyError::PutRoute { key, source };
    match netlink.change(message.clone(), NLM_F_CREATE | NLM_F_EXCL).await {
        Err(error) if error.raw_os_error() == Some(EEXIST) => {}
        result => return result.map_err(failed),
    }
    match owner(netlink, key).await? {
        Some(protocol) if protocol != ROUTE_PROTOCOL => {
            Err(ApplyError::ForeignRoute { key, protocol })
        }
        _ => netlink.change(message, NLM_F_CREATE | NLM_F_REPLACE).await.map_err(failed),
    }
}

/// Removes a route of ours. One that is gone already is success.
pub(super) async fn delete(netlink: &mut Netlink, key: RouteKey) -> Result<(), ApplyError> {
    let mut message = blank(key);
    // The kernel compares only what is set, and the protocol is: a foreign route stays.
    message.header.kind = RouteType::Unspec;
    message.header.scope = RouteScope::NoWhere;
    delete_message(netlink, key, message).await
}

/// Removes the route that a message describes. One that is gone already is success.
pub(super) async fn delete_message(
    netlink: &mut Netlink,
    key: RouteKey,
    message: RouteMessage,
) -> Result<(), ApplyError> {
    match netlink.change(RouteNetlinkMessage::DelRoute(message), 0).await {
        Err(error) if error.raw_os_error() == Some(ESRCH) => Ok(()),
        result => result.map_err(|source| ApplyError::DeleteRoute { key, source }),
    }
}

/// Who has a route with this key: a protocol other than ours where there is one, because
/// replacing takes the first that the kernel finds.
async fn owner(netlink: &mut Netlink, key: RouteKey) -> Result<Option<u8>, ApplyError> {
    let family = family_of(key.destination.addr());
    let mut owner = None;
    for message in dump(netlink, family, RouteProtocol::Unspec).await? {
        if key_of(&message) == Some(key) && owner.is_none_or(|o| o == ROUTE_PROTOCOL) {
            owner = Some(u8::from(message.header.protocol));
        }
    }
    Ok(owner)
}

/// The main table's routes of one protocol, or of all for [`RouteProtocol::Unspec`].
pub(crate) async fn dump(
    netlink: &mut Netlink,
    family: AddressFamily,
    protocol: RouteProtocol,
) -> Result<Vec<RouteMessage>, ApplyError> {
    let mut request = RouteMessage::default();
    request.header.address_family = family;
    request.header.table = RouteHeader::RT_TABLE_MAIN;
    request.header.protocol = protocol;
    let replies = match netlink.dump(RouteNetlinkMessage::GetRoute(request)).await {
        Ok(replies) => replies,
        // The kernel says this when the filtered table has never been used.
        Err(error) if error.raw_os_error() == Some(nix::libc::ENOENT) => Vec::new(),
        Err(source) => return Err(ApplyError::ReadRoutes { source }),
    };
    // Checked again here: a kernel without strict checking, or without IPv6, answers with
    // more than was asked for.
    Ok(replies
        .into_iter()
        .filter_map(|reply| match reply {
            RouteNetlinkMessage::NewRoute(route) => Some(route),
            _ => None,
        })
        .filter(|route| {
            let header = &route.header;
            header.address_family == family
                && header.table == RouteHeader::RT_TABLE_MAIN
                && !header.flags.contains(RouteFlags::Cloned)
                && (protocol == RouteProtocol::Unspec || header.protocol == protocol)
        })
        .collect())
}

pub(super) fn message(key: RouteKey, route: &Route, index: Option<u32>) -> RouteMessage {
    let mut message = blank(key);
    message.header.kind = RouteType::Unicast;
    message.attributes.extend(index.map(RouteAttribute::Oif));
    match route.next_hop {
        NextHop::Device(_) => {
            message.header.scope = match key.destination {
                IpNet::V4(_) => RouteScope::Link,
                IpNet::V6(_) => RouteScope::Universe,
            };
        }
        NextHop::Vtep { gateway, .. } => {
            message.header.flags = RouteFlags::Onlink;
            message.attributes.push(RouteAttribute::Gateway(gateway.into()));
        }
        NextHop::Node { gateway, .. } => {
            message.attributes.push(RouteAttribute::Gateway(gateway.into()));
        }
        NextHop::Unreachable => message.header.kind = RouteType::Unreachable,
    }
    if let Some(mtu) = route.mtu {
        message.attributes.push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(mtu)]));
    }
    if let Some(source) = route.source {
        message.attributes.push(RouteAttribute::PrefSource(source.into()));
    }
    message
}

fn blank(key: RouteKey) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family_of(key.destination.addr());
    message.header.destination_prefix_length = key.destination.prefix_len();
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Other(ROUTE_PROTOCOL);
    message.attributes.push(RouteAttribute::Destination(key.destination.network().into()));
    message.attributes.push(RouteAttribute::Priority(key.metric));
    message
}

/// Destination and metric of a route. A default route carries no destination.
pub(crate) fn key_of(message: &RouteMessage) -> Option<RouteKey> {
    let header = &message.header;
    let address = message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Destination(address) => Some(ip_of(address)),
            _ => None,
        })
        .unwrap_or(match header.address_family {
            AddressFamily::Inet => Some(IpAddr::from([0; 4])),
            AddressFamily::Inet6 => Some(IpAddr::from([0; 16])),
            _ => None,
        })?;
    let metric = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Priority(metric) => Some(*metric),
        _ => None,
    });
    let destination = IpNet::new(address, header.destination_prefix_length).ok()?;
    Some(RouteKey { destination, metric: metric.unwrap_or(0) })
}

fn route_of(message: &RouteMessage, devices: &BTreeMap<u32, DeviceName>) -> Option<Route> {
    let (mut link, mut gateway) = (None, None);
    let mut route = Route { next_hop: NextHop::Unreachable, mtu: None, source: None };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => link = Some(*index),
            RouteAttribute::PrefSource(address) => route.source = ip_of(address),
            RouteAttribute::Metrics(metrics) => {
                route.mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
            }
            RouteAttribute::Gateway(address) => gateway = Some(ip_of(address)?),
            RouteAttribute::Via(_) | RouteAttribute::MultiPath(_) => return None,
            _ => {}
        }
    }
    match message.header.kind {
        RouteType::Unicast => {
            let on_link = message.header.flags.contains(RouteFlags::Onlink);
            let link = link?;
            route.next_hop = match (devices.get(&link).copied(), gateway) {
                (Some(device), None) => NextHop::Device(device),
                (Some(device), Some(gateway)) if on_link => NextHop::Vtep { device, gateway },
                (None, Some(gateway)) if !on_link => NextHop::Node { link, gateway },
                _ => return None,
            };
        }
        RouteType::Unreachable => {}
        _ => return None,
    }
    Some(route)
}

pub(crate) fn ip_of(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Some((*v4).into()),
        RouteAddress::Inet6(v6) => Some((*v6).into()),
        _ => None,
    }
}
