//! `Mesh + Local -> Desired` for VXLAN (RFC 7348), as Flannel has it.
//!
//! A device per family of the underlay. A peer's pods are behind a next hop, that is behind the
//! address of the peer's device, and that behind the peer's endpoint:
//!
//! ```text
//! route 10.244.2.0/24 via 10.244.2.0 onlink -> neighbour 0a:58:... -> forwarding 192.0.2.2
//! ```
//!
//! All three are written beforehand and never asked for on the wire. The next hop is the base
//! address of the pod CIDR, and for IPv6 the link-local address of the peer's device: the kernel
//! takes no next hop that a route leads to through another device
//! (`ip6_route_check_nh_onlink` in net/ipv6/route.c), and so none within the destination, while
//! the pair changes from one device to another.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{base_addresses, peer_route_mtu, source};
use crate::desired::{Desired, NextHop, PEER_ROUTE_METRIC, Route, RouteKey, Vtep, VxlanLink};
use crate::family::Family;
use crate::mac::Mac;
use crate::node::{Local, Node, Transport};
use crate::pair;
use crate::session::DeviceName;

/// Adds the devices of a node that accepts VXLAN, so that it is ready for the first peer.
pub(super) fn devices(local: &Local, desired: &mut Desired) {
    let accepts = local.transports.contains(&Transport::Vxlan);
    for family in Family::ALL.into_iter().filter(|_| accepts && !local.pod_cidrs.is_empty()) {
        let published = local.endpoints.get(family).and(local.vteps.get(family));
        let (Some(address), Some(mac)) = (local.addresses.get(family), published) else {
            continue;
        };
        let link =
            VxlanLink { vxlan: local.vxlan, local: address, underlay: local.underlay_index, mac };
        let overhead = Transport::Vxlan.overhead(family);
        let vtep = Vtep {
            link,
            mtu: local.underlay_mtu.saturating_sub(overhead),
            addresses: base_addresses(local),
            tables: Default::default(),
        };
        desired.vteps.insert(DeviceName::Vxlan(family), vtep);
    }
}

/// Lets packets of a peer pass through our devices, and knows the way to the peer's.
pub(super) fn admit(local: &Local, node: &Node, desired: &mut Desired) {
    for cidr in &node.pod_cidrs {
        let Some(family) = pair::vxlan_family(local, node, Family::of_net(cidr)) else { continue };
        let device = DeviceName::Vxlan(family);
        let Some(vtep) = desired.vteps.get_mut(&device) else { continue };
        let (Some(mac), Some(address)) = (node.vteps.get(family), node.endpoints.get(family))
        else {
            continue;
        };
        vtep.tables.neighbours.insert(next_hop(cidr, mac), mac);
        vtep.tables.forwarding.insert(mac, address);
        let plaintext = desired.ruleset.plaintext.entry(device.as_str().to_owned());
        plaintext.or_default().insert(*cidr);
    }
}

/// Routes to a peer's pods, for the families in which this node has an address to answer to.
pub(super) fn route(local: &Local, node: &Node, desired: &mut Desired) {
    for cidr in &node.pod_cidrs {
        let Some(family) = pair::vxlan_family(local, node, Family::of_net(cidr)) else { continue };
        let device = DeviceName::Vxlan(family);
        let Some((vtep, mac)) = desired.vteps.get(&device).zip(node.vteps.get(family)) else {
            continue;
        };
        let Some(source) = source(&local.pod_cidrs, cidr) else { continue };
        let mtu = peer_route_mtu(local, node).min(vtep.mtu);
        let key = RouteKey { destination: *cidr, metric: PEER_ROUTE_METRIC };
        let next_hop = NextHop::Vtep { device, gateway: next_hop(cidr, mac) };
        desired.routes.insert(key, Route { next_hop, mtu: Some(mtu), source: Some(source) });
    }
}

/// What the pods in this prefix are behind on our device, when the peer's has this address.
fn next_hop(pods: &IpNet, mac: Mac) -> IpAddr {
    match pods {
        IpNet::V4(pods) => pods.network().into(),
        IpNet::V6(_) => mac.link_local().into(),
    }
}
