//! Any observed state is led to any desired one, and stays there.

use std::net::IpAddr;

use proptest::collection::{btree_map, btree_set};
use proptest::option;
use proptest::prelude::*;

use super::*;
use crate::desired::{RuleStep, Sysctl, VtepTables, Vxlan, VxlanLink};
use crate::mac::Mac;
use crate::node::Transport;
use crate::observed::{ObservedPeer, ObservedWireGuard, Preshared};
use crate::topology::Mesh;
use crate::transport::{self, Paths};

fn any_device() -> impl Strategy<Value = DeviceName> {
    prop::sample::select(DeviceName::all().collect::<Vec<_>>())
}

fn any_mac() -> impl Strategy<Value = Mac> {
    (1_u8..7).prop_map(|i| Mac::of([10, 244, i, 0].into()))
}

fn any_node_address() -> impl Strategy<Value = IpAddr> {
    (1_u8..7).prop_map(|i| [192, 168, 240, i].into())
}

fn any_kind() -> impl Strategy<Value = LinkKind> {
    let vxlan = (any_node_address(), any_mac(), prop::bool::weighted(0.1));
    prop_oneof![
        any_implementation().prop_map(LinkKind::WireGuard),
        vxlan.prop_map(|(local, mac, learning)| LinkKind::Vxlan(VxlanLink {
            vxlan: Vxlan { learning, ..Vxlan::default() },
            local,
            underlay: 2,
            mac,
        })),
    ]
}

fn any_tables() -> impl Strategy<Value = VtepTables> {
    let gateway = any_net().prop_map(|net| net.network());
    (btree_map(gateway, any_mac(), 0..4), btree_map(any_mac(), any_node_address(), 0..4))
        .prop_map(|(neighbours, forwarding)| VtepTables { neighbours, forwarding })
}

fn any_implementation() -> impl Strategy<Value = Implementation> {
    prop_oneof![Just(Implementation::Kernel), Just(Implementation::Userspace)]
}

/// From a small set, so that observed and desired have much in common.
fn any_net() -> impl Strategy<Value = IpNet> {
    prop_oneof![
        (1_u8..6).prop_map(|i| net(&format!("10.244.{i}.0/24"))),
        (1_u8..6).prop_map(|i| net(&format!("fd00:10:244:{i}::/64"))),
        (1_u8..3).prop_map(|i| net(&format!("10.244.{i}.0/32"))),
        Just(net("10.244.0.0/16")),
        Just(net("fd00:10:244::/48")),
    ]
}

fn any_endpoint() -> impl Strategy<Value = SocketAddr> {
    (1_u8..4, 0_u16..4).prop_map(|(i, s)| SocketAddr::from(([192, 168, 240, i], 51820 + 2 * s)))
}

fn any_peer() -> impl Strategy<Value = ObservedPeer> {
    let keepalive = option::of(prop_oneof![Just(0_u16), Just(25)]);
    let age = option::of((0_u64..400).prop_map(Duration::from_secs));
    (
        option::of(any_endpoint()),
        option::of(any_endpoint()),
        btree_set(any_net(), 0..4),
        keepalive,
        age,
    )
        .prop_map(
            |(endpoint, pinned_endpoint, allowed_ips, persistent_keepalive, handshake_age)| {
                ObservedPeer {
                    endpoint,
                    pinned_endpoint,
                    allowed_ips,
                    persistent_keepalive,
                    handshake_age,
                    preshared: match handshake_age.map(|age| age.as_secs() % 3) {
                        Some(0) => Preshared::Foreign,
                        Some(1) => Preshared::Of(SecretId::from_bytes([1; 8])),
                        _ => Preshared::None,
                    },
                    ..ObservedPeer::default()
                }
            },
        )
}

fn any_wireguard() -> impl Strategy<Value = ObservedWireGuard> {
    let peers = btree_map((1_u8..8).prop_map(key), any_peer(), 0..5);
    (option::of((1_u8..4).prop_map(key)), 51818_u16..51832, peers).prop_map(
        |(public_key, listen_port, mut peers)| {
            // A prefix has one owner on a device.
            let mut taken = BTreeSet::new();
            for peer in peers.values_mut() {
                peer.allowed_ips.retain(|prefix| taken.insert(*prefix));
            }
            let fwmark = u32::from(listen_port % 5 / 4);
            ObservedWireGuard { public_key, listen_port, fwmark, peers }
        },
    )
}

fn any_link() -> impl Strategy<Value = ObservedLink> {
    (
        prop::bool::weighted(0.85),
        option::weighted(0.9, any_kind()),
        any::<bool>(),
        prop_oneof![Just(1420_u32), Just(1440), Just(1320)],
        btree_set(any_net(), 0..3),
        option::weighted(0.8, any_wireguard()),
        any_tables(),
    )
        .prop_map(|(ours, kind, up, mtu, addresses, wireguard, tables)| ObservedLink {
            ours,
            known: !ours && mtu == 1320,
            kind,
            up,
            mtu,
            addresses,
            wireguard,
            // A link that is down has no neighbours (neigh_ifdown in net/core/neighbour.c).
            tables: if up { tables } else { VtepTables::default() },
        })
}

fn any_route() -> impl Strategy<Value = (RouteKey, Route)> {
    let metric = prop_oneof![Just(1_u32), Just(u32::MAX), Just(50)];
    let next_hop = prop_oneof![
        4 => any_device().prop_map(NextHop::Device),
        1 => (any_device(), any_node_address())
            .prop_map(|(device, gateway)| NextHop::Vtep { device, gateway }),
        1 => any_node_address().prop_map(|gateway| NextHop::Node { link: 2, gateway }),
        1 => Just(NextHop::Unreachable)
    ];
    let mtu = option::of(Just(1420_u32));
    (any_net(), metric, next_hop, mtu).prop_map(|(destination, metric, next_hop, mtu)| {
        (RouteKey { destination, metric }, Route { next_hop, mtu, source: None })
    })
}

fn any_observed() -> impl Strategy<Value = Observed> {
    let sysctl = prop_oneof![
        Just(Sysctl::Ipv4Forward),
        Just(Sysctl::Ipv6Forward),
        any_device().prop_map(Sysctl::RpFilter),
        any_device().prop_map(Sysctl::Forwarding),
        any_device().prop_map(Sysctl::DisableIpv6),
        Just(Sysctl::BridgeForwarding("cni0".to_owned())),
        Just(Sysctl::BridgeDisableIpv6("cni0".to_owned())),
    ];
    let value = prop_oneof![Just("0".to_owned()), Just("1".to_owned()), Just("2".to_owned())];
    (
        btree_map(any_device(), any_link(), 0..5),
        prop::collection::vec(any_route(), 0..8),
        btree_map(sysctl, value, 0..6),
    )
        .prop_map(|(links, routes, sysctls)| {
            let up = |device| links.get(&device).is_some_and(|link: &ObservedLink| link.up);
            let possible = |route: &Route| route.next_hop.device().is_none_or(up);
            let routes = routes.into_iter().filter(|(_, route)| possible(route)).collect();
            let destination = net("10.245.0.0/16");
            let rules = [Rule { destination, step: RuleStep::Unreachable }].into();
            Observed { links, routes, rules, sysctls, ..Observed::default() }
        })
}

/// Node 1 with any keys, ports and peers; the two last may rotate.
fn any_desired() -> impl Strategy<Value = Desired> {
    let peer =
        (2_u8..6, 0_u64..3, option::of(50_u8..60), 0_u16..2, prop::bool::ANY, any_transports());
    (
        any_implementation(),
        0_u64..3,
        option::weighted(0.3, 60_u8..65),
        prop_oneof![Just(51820_u16), Just(51822)],
        prop::collection::vec(peer, 0..5),
        option::of(Just(25_u16)),
        any_transports(),
    )
        .prop_map(|(implementation, generation, next, port, peers, keepalive, transports)| {
            let mut own = Local { implementation, port, transports, ..local(1, generation) };
            // Of the others, the odd ones are on this node's link.
            own.on_link =
                [3_u8, 5].iter().flat_map(|i| local(*i, 0).endpoints.addresses()).collect();
            own.keys.extend(next.map(|n| (Generation::new(generation + 1), key(n))));
            let others = peers.into_iter().map(|(i, generation, next, port, v6, transports)| {
                let port = 51820 + 2 * port;
                let mut other = Local { port, transports, ..local(i, generation) };
                other.keys.extend(next.map(|n| (Generation::new(generation + 1), key(n))));
                other.endpoints.v6 = other.endpoints.v6.filter(|_| v6);
                record(&other)
            });
            let others: Vec<_> = others.collect();
            let mut mesh = Topology::new().resolve(&own, &records(&others));
            mesh.persistent_keepalive = keepalive;
            transport::desired(&mesh, &own, &Paths::default())
        })
}

fn any_transports() -> impl Strategy<Value = BTreeSet<Transport>> {
    prop_oneof![
        3 => Just(BTreeSet::from([Transport::Wireguard])),
        2 => btree_set(prop::sample::select(Transport::ALL.to_vec()), 1..4),
    ]
}

fn rank(action: &Action) -> u8 {
    match action {
        Action::SetRuleset(_) => 0,
        Action::SetSysctl(sysctl, _) if sysctl.device().is_none() => 1,
        Action::PutRoute(_, Route { next_hop: NextHop::Unreachable, .. }) => 2,
        Action::AcceptForwarded(_) | Action::AddRule(_) => 2,
        Action::MarkLink(_) | Action::AddLink { .. } | Action::SetLinkMtu { .. } => 3,
        Action::ConfigureWireGuard { change, .. } if change.remove_peers.is_empty() => 4,
        Action::SetSysctl(Sysctl::DisableIpv6(_), _) => 5,
        Action::AddAddress { .. } => 5,
        Action::SetLinkUp(_) => 6,
        Action::PutEntry { .. } => 7,
        Action::SetSysctl(..) => 8,
        Action::PutRoute(..) => 9,
        Action::DeleteRule(_) | Action::DeleteRoute(_) => 10,
        Action::ConfigureWireGuard { .. } => 11,
        Action::DeleteEntry { .. } => 12,
        Action::DeleteAddress { .. } => 13,
        Action::DeleteLink(_) => 14,
    }
}

fn check_reached(desired: &Desired, observed: &Observed) -> Result<(), TestCaseError> {
    prop_assert_eq!(observed.ruleset.as_ref(), Some(&ruleset(desired, observed)));
    let is_ours =
        |name: &DeviceName| observed.links[name].ours && observed.links[name].kind.is_some();
    for (name, wanted) in desired.links().filter(|(name, _)| is_ours(name)) {
        let link = &observed.links[&name];
        prop_assert_eq!(link.kind, Some(wanted.kind));
        prop_assert!(link.up);
        prop_assert_eq!(link.mtu, wanted.mtu);
        prop_assert_eq!(&link.addresses, wanted.addresses);
        prop_assert_eq!(observed.sysctls.get(&Sysctl::RpFilter(name)), Some(&"2".to_owned()));
        if let Some(vtep) = desired.vteps.get(&name) {
            prop_assert_eq!(&link.tables, &vtep.tables);
        }
    }
    for (name, device) in desired.devices.iter().filter(|(name, _)| is_ours(name)) {
        let state = observed.links[name].wireguard.as_ref().unwrap();
        prop_assert_eq!(state.public_key, Some(device.public_key));
        prop_assert_eq!(state.listen_port, device.listen_port);
        prop_assert_eq!(state.fwmark, 0);
        prop_assert!(state.peers.keys().eq(device.peers.keys()));
        for (key, peer) in &device.peers {
            let reached = &state.peers[key];
            prop_assert_eq!(&reached.allowed_ips, &peer.allowed_ips);
            let keepalive = reached.persistent_keepalive.filter(|seconds| *seconds != 0);
            prop_assert_eq!(keepalive, peer.persistent_keepalive);
            prop_assert_eq!(reached.preshared, Preshared::None);
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn any_plan_reaches_desired_and_the_next_is_empty(
        desired in any_desired(),
        before in any_observed(),
    ) {
        let plan = Plan::new(&desired, &before);
        let mut after = before.clone();
        sim::apply(&plan, &desired, &mut after);
        check_reached(&desired, &after)?;
        let next = Plan::new(&desired, &after);
        prop_assert_eq!(next.actions, vec![]);
        prop_assert_eq!(&next.foreign, &plan.foreign);

        let foreign = |name| plan.foreign.contains(&name);
        let wanted: BTreeMap<_, _> = desired.routes.clone().into_iter().filter(|(_, route)| {
            !route.next_hop.device().is_some_and(foreign)
        }).collect();
        prop_assert_eq!(&after.routes, &wanted);
        prop_assert_eq!(&after.rules, &desired.rules);
        let wanted: BTreeSet<_> = desired.links().map(|(name, _)| name).collect();
        for name in DeviceName::all() {
            let is_foreign = |link: &&ObservedLink| !link.is_ours();
            if let Some(link) = before.links.get(&name).filter(is_foreign) {
                prop_assert_eq!(after.links.get(&name), Some(link));
            } else {
                prop_assert_eq!(after.links.contains_key(&name), wanted.contains(&name));
            }
        }
    }

    #[test]
    fn actions_are_in_order(desired in any_desired(), before in any_observed()) {
        let plan = Plan::new(&desired, &before);
        let actions = &plan.actions;
        let mut ranks = Vec::new();
        for (at, action) in actions.iter().enumerate() {
            // A link that is made again is the one exception to "add before delete".
            let remade = matches!(
                (action, actions.get(at + 1)),
                (Action::DeleteLink(old), Some(Action::AddLink { device, .. })) if old == device
            );
            if !remade {
                ranks.push(rank(action));
            }
        }
        prop_assert!(ranks.is_sorted(), "{:#?}", actions);
    }

    #[test]
    fn an_interrupted_plan_is_finished_by_the_next(
        desired in any_desired(),
        before in any_observed(),
        done in 0_usize..40,
    ) {
        let mut plan = Plan::new(&desired, &before);
        plan.actions.truncate(done);
        let mut after = before;
        sim::apply(&plan, &desired, &mut after);
        let rest = Plan::new(&desired, &after);
        sim::apply(&rest, &desired, &mut after);
        prop_assert_eq!(Plan::new(&desired, &after).actions, vec![]);
    }

    #[test]
    fn a_node_without_pod_cidr_has_a_guard_and_no_device(before in any_observed()) {
        let own = Local { pod_cidrs: BTreeSet::new(), ..local(1, 0) };
        let desired = transport::desired(&Mesh::default(), &own, &Paths::default());
        prop_assert!(desired.devices.is_empty());
        prop_assert_eq!(desired.routes.len(), 2);
        let mut after = before.clone();
        sim::apply(&Plan::new(&desired, &before), &desired, &mut after);
        prop_assert_eq!(after.ruleset.as_ref(), Some(&ruleset(&desired, &after)));
    }
}
