//! Pairs of different transports in one mesh.

use super::*;
use crate::desired::{LinkKind, PEER_ROUTE_METRIC, VtepTables};
use crate::fixtures::{local, net, record, records};
use crate::mac::Mac;
use crate::node::{Endpoints, Vteps};
use crate::session::DeviceName;
use crate::topology::Topology;

const VX4: DeviceName = DeviceName::Vxlan(Family::V4);
const VX6: DeviceName = DeviceName::Vxlan(Family::V6);

fn accepting(i: u8, transports: &[Transport]) -> Local {
    Local { transports: transports.iter().copied().collect(), ..local(i, 0) }
}

fn desired_with(own: &Local, others: &[Local]) -> Desired {
    let others: Vec<_> = others.iter().map(record).collect();
    desired(&Topology::new().resolve(own, &records(&others)), own, &Paths::default())
}

fn route_to<'a>(desired: &'a Desired, destination: &str) -> Option<&'a Route> {
    let key = RouteKey { destination: net(destination), metric: PEER_ROUTE_METRIC };
    desired.routes.get(&key)
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn a_vxlan_peer_is_behind_its_device_and_its_endpoint() {
    let own = accepting(1, &[Transport::Vxlan]);
    let desired = desired_with(&own, &[accepting(2, &[Transport::Vxlan])]);
    assert!(desired.devices.is_empty(), "no WireGuard where nobody wants it");
    let mac = Mac::of(ip("10.244.2.0"));
    for (device, cidr, gateway, node, source, mtu) in [
        (VX4, "10.244.2.0/24", "10.244.2.0", "192.168.240.2", "10.244.1.0", 1430),
        (
            VX6,
            "fd00:10:244:2::/64",
            "fe80::858:aff:fef4:200",
            "fd00:240::2",
            "fd00:10:244:1::",
            1430,
        ),
    ] {
        let vtep = &desired.vteps[&device];
        assert_eq!(vtep.link.local, own.endpoints.get(Family::of(ip(node))).unwrap());
        let tables = VtepTables {
            neighbours: [(ip(gateway), mac)].into(),
            forwarding: [(mac, ip(node))].into(),
        };
        assert_eq!(vtep.tables, tables);
        let next_hop = NextHop::Vtep { device, gateway: ip(gateway) };
        let expected = Route { next_hop, mtu: Some(mtu), source: Some(ip(source)) };
        assert_eq!(route_to(&desired, cidr), Some(&expected));
        assert_eq!(desired.ruleset.plaintext[device.as_str()], [net(cidr)].into());
        assert_eq!(desired.sysctls[&Sysctl::RpFilter(device)], "2");
    }
    assert_eq!((desired.vteps[&VX4].mtu, desired.vteps[&VX6].mtu), (1450, 1430));
    assert_eq!(desired.links().count(), 2);
    assert!(!desired.ruleset.trusted_links.contains("gambeson-vx4"));
}

#[test]
fn both_families_of_pods_share_the_underlay_there_is() {
    let mut own = accepting(1, &[Transport::Vxlan]);
    let mut other = accepting(2, &[Transport::Vxlan]);
    for node in [&mut own, &mut other] {
        node.endpoints = Endpoints { v6: None, ..node.endpoints };
        node.vteps = Vteps { v6: None, ..node.vteps };
    }
    let desired = desired_with(&own, &[other]);
    assert_eq!(desired.vteps.keys().collect::<Vec<_>>(), [&VX4]);
    let vtep = &desired.vteps[&VX4];
    assert_eq!((vtep.tables.neighbours.len(), vtep.tables.forwarding.len()), (2, 1));
    assert_eq!(desired.ruleset.plaintext["gambeson-vx4"].len(), 2);
    let route = route_to(&desired, "fd00:10:244:2::/64").unwrap();
    assert_eq!((route.next_hop.device(), route.mtu), (Some(VX4), Some(1450)));
}

#[test]
fn a_host_gw_peer_is_behind_its_own_address() {
    let other = accepting(2, &[Transport::HostGw]);
    let hops = [ip("192.168.240.2"), ip("fd00:240::2")];
    let own = Local { on_link: hops.into(), ..accepting(1, &[Transport::HostGw]) };
    let desired = desired_with(&own, std::slice::from_ref(&other));
    assert_eq!(desired.links().count(), 0);
    for (cidr, gateway) in [("10.244.2.0/24", hops[0]), ("fd00:10:244:2::/64", hops[1])] {
        let next_hop = NextHop::Node { link: 2, gateway };
        let expected = Route { next_hop, mtu: Some(1500), source: None };
        assert_eq!(route_to(&desired, cidr), Some(&expected));
    }
    let allowed: BTreeSet<_> =
        other.pod_cidrs.iter().copied().chain(hops.map(IpNet::from)).collect();
    assert_eq!(desired.ruleset.plaintext, [("eth0".to_owned(), allowed)].into());
}

#[test]
fn each_pair_has_its_own_transport_and_only_that_may_be_plain() {
    use Transport::{HostGw, Vxlan, Wireguard};
    let own = Local {
        on_link: [ip("192.168.240.4"), ip("fd00:240::4")].into(),
        ..accepting(1, &Transport::ALL)
    };
    let others = [
        accepting(2, &[Wireguard]),
        accepting(3, &[Vxlan]),
        accepting(4, &[HostGw]),
        accepting(5, &[Wireguard, Vxlan]),
    ];
    let desired = desired_with(&own, &others);
    let next_hop = |i: u8| route_to(&desired, &format!("10.244.{i}.0/24")).unwrap().next_hop;
    let session = DeviceName::parse("gambeson0").unwrap();
    assert_eq!(next_hop(2), NextHop::Device(session));
    assert_eq!(next_hop(3).device(), Some(VX4));
    assert_eq!(next_hop(4), NextHop::Node { link: 2, gateway: ip("192.168.240.4") });
    assert_eq!(next_hop(5), NextHop::Device(session), "the better of the two");
    let plain = &desired.ruleset.plaintext;
    assert_eq!(plain["gambeson-vx4"], [net("10.244.3.0/24")].into(), "what is used, no more");
    assert!(plain.values().all(|networks| !networks.contains(&net("10.244.2.0/24"))));
    // The MTU of the transport that takes most, over IPv6.
    assert_eq!(route_to(&desired, "10.244.4.0/24").unwrap().mtu, Some(1420));
}

#[test]
fn a_vxlan_device_is_made_anew_when_it_has_to_be() {
    let own = accepting(1, &[Transport::Vxlan]);
    let kind = |own: &Local| desired_with(own, &[]).links().next().map(|(_, link)| link.kind);
    let Some(LinkKind::Vxlan(link)) = kind(&own) else { panic!("no VXLAN") };
    assert_eq!((link.vxlan.vni, link.vxlan.port, link.underlay), (1, 8472, 2));
    let moved = Endpoints { v4: Some([192, 0, 2, 1].into()), ..own.addresses };
    assert_ne!(kind(&Local { addresses: moved, ..own.clone() }), kind(&own));
    assert_eq!(kind(&Local { underlay_mtu: 1400, ..own.clone() }), kind(&own));
}
