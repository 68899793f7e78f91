use std::collections::BTreeMap;
use std::time::Duration;

use super::*;
use crate::desired::{Implementation, LinkKind, NextHop};
use crate::fixtures::{key, local, net, record, records};
use crate::node::{Local, NodeRecord};
use crate::observed::{ObservedLink, Preshared};
use crate::sim;
use crate::topology::Topology;
use crate::transport::{self, Paths};

mod model;

fn desired(local: &Local, others: &[NodeRecord]) -> Desired {
    transport::desired(&Topology::new().resolve(local, &records(others)), local, &Paths::default())
}

/// The desired state of node 1 in a mesh of three, and the kernel that has it.
fn settled() -> (Desired, Observed) {
    let others = [record(&local(2, 0)), record(&local(3, 1))];
    let desired = desired(&local(1, 0), &others);
    let mut observed = Observed::default();
    sim::apply(&Plan::new(&desired, &observed), &desired, &mut observed);
    assert_eq!(Plan::new(&desired, &observed), Plan::default());
    (desired, observed)
}

/// The plan, after checking that it leads where it should.
fn plan(desired: &Desired, observed: &Observed) -> Vec<Action> {
    let plan = Plan::new(desired, observed);
    let mut after = observed.clone();
    sim::apply(&plan, desired, &mut after);
    assert_eq!(Plan::new(desired, &after).actions, []);
    plan.actions
}

fn device(number: u8) -> DeviceName {
    DeviceName::parse(&format!("gambeson{number}")).unwrap()
}

fn first_state(observed: &mut Observed) -> &mut crate::observed::ObservedWireGuard {
    observed.links.get_mut(&device(0)).unwrap().wireguard.as_mut().unwrap()
}

#[test]
fn a_fresh_node_gets_its_guard_before_anything_else() {
    let desired = desired(&local(1, 0), &[record(&local(2, 0))]);
    let actions = plan(&desired, &Observed::default());
    let position = |wanted: &dyn Fn(&Action) -> bool| actions.iter().position(wanted).unwrap();
    let is_fail_closed =
        |a: &Action| matches!(a, Action::PutRoute(_, r) if r.next_hop == NextHop::Unreachable);
    let is_peer_route =
        |a: &Action| matches!(a, Action::PutRoute(_, r) if r.next_hop != NextHop::Unreachable);
    let order = [
        position(&|a| matches!(a, Action::SetRuleset(_))),
        position(&|a| matches!(a, Action::SetSysctl(Sysctl::Ipv4Forward, _))),
        position(&is_fail_closed),
        position(&|a| matches!(a, Action::AddLink { .. })),
        position(&|a| matches!(a, Action::ConfigureWireGuard { .. })),
        position(&|a| matches!(a, Action::AddAddress { .. })),
        position(&|a| matches!(a, Action::SetLinkUp(_))),
        position(&|a| matches!(a, Action::SetSysctl(Sysctl::RpFilter(_), _))),
        position(&is_peer_route),
    ];
    assert_eq!(order[0], 0);
    assert!(order.is_sorted(), "{actions:#?}");
}

#[test]
fn what_somebody_removed_comes_back_and_nothing_else_is_touched() {
    let (desired, settled) = settled();
    let ruleset = Action::SetRuleset(desired.ruleset.clone());
    assert_eq!(plan(&desired, &Observed { ruleset: None, ..settled.clone() }), [ruleset]);

    for (key, route) in &desired.routes {
        let mut observed = settled.clone();
        observed.routes.remove(key);
        assert_eq!(plan(&desired, &observed), [Action::PutRoute(*key, route.clone())]);
    }
    assert_eq!(desired.rules.len(), 4);
    for rule in &desired.rules {
        let mut observed = settled.clone();
        observed.rules.remove(rule);
        assert_eq!(plan(&desired, &observed), [Action::AddRule(*rule)]);
    }
    for (sysctl, value) in &desired.sysctls {
        let mut observed = settled.clone();
        observed.sysctls.insert(sysctl.clone(), "7".to_owned());
        let repair = Action::SetSysctl(sysctl.clone(), value.clone());
        assert_eq!(plan(&desired, &observed), [repair]);
    }
    let mut observed = settled.clone();
    observed.links.remove(&device(1));
    observed.routes.retain(|_, route| route.next_hop != NextHop::Device(device(1)));
    let touched = |action: &Action| match action {
        Action::AddLink { device, .. }
        | Action::ConfigureWireGuard { device, .. }
        | Action::AddAddress { device, .. }
        | Action::SetLinkUp(device)
        | Action::PutRoute(_, Route { next_hop: NextHop::Device(device), .. }) => *device,
        Action::SetSysctl(sysctl, _) => sysctl.device().unwrap(),
        other => panic!("{other:?}"),
    };
    assert!(plan(&desired, &observed).iter().all(|action| touched(action) == device(1)));
}

#[test]
fn a_foreign_device_is_named_and_left_alone() {
    let (desired, settled) = settled();
    for (ours, implementation) in [(false, Some(Implementation::Kernel)), (true, None)] {
        let mut observed = settled.clone();
        let link = observed.links.get_mut(&device(0)).unwrap();
        let kind = implementation.map(LinkKind::WireGuard);
        (link.ours, link.known, link.kind) = (ours, false, kind);
        link.wireguard.as_mut().unwrap().public_key = Some(key(99));
        let plan = Plan::new(&desired, &observed);
        assert_eq!(plan.foreign, BTreeSet::from([device(0)]));
        // Packets must not go through it either.
        let routes = desired.routes.iter();
        let through = routes.filter(|(_, r)| r.next_hop == NextHop::Device(device(0)));
        let mut actions = vec![Action::SetRuleset(without(&desired, "gambeson0"))];
        actions.extend(through.map(|(key, _)| Action::DeleteRoute(*key)));
        assert_eq!(actions.len(), 3);
        assert_eq!(plan.actions, actions);
    }
    // Nor through one whose name is not in use.
    let mut observed = settled.clone();
    let foreign = ObservedLink { ours: false, known: false, ..observed.links[&device(0)].clone() };
    observed.links.insert(device(3), foreign);
    let plan = Plan::new(&desired, &observed);
    assert_eq!(plan.actions, [Action::SetRuleset(without(&desired, "gambeson3"))]);
    assert_eq!(plan.foreign, BTreeSet::new());
}

/// The guard, less a link that it would trust by its name.
fn without(desired: &Desired, name: &str) -> Ruleset {
    let mut ruleset = desired.ruleset.clone();
    assert!(ruleset.trusted_links.remove(name));
    ruleset
}

#[test]
fn a_device_that_lost_its_alias_and_is_known_gets_it_back_before_anything_else() {
    let (desired, mut observed) = settled();
    observed.links.get_mut(&device(0)).unwrap().ours = false;
    assert_eq!(plan(&desired, &observed), [Action::MarkLink(device(0))]);
    first_state(&mut observed).public_key = None;
    let actions = plan(&desired, &observed);
    assert_eq!(actions[0], Action::MarkLink(device(0)));
    assert!(matches!(&actions[1..], [Action::ConfigureWireGuard { .. }]), "{actions:?}");
}

#[test]
fn a_foreign_mark_or_preshared_key_is_taken_away() {
    let (desired, mut observed) = settled();
    first_state(&mut observed).fwmark = 1;
    first_state(&mut observed).peers.get_mut(&key(2)).unwrap().preshared = Preshared::Foreign;
    let actions = plan(&desired, &observed);
    let [Action::ConfigureWireGuard { change, .. }] = &actions[..] else { panic!("{actions:?}") };
    let peer = PeerChange { preshared_key: Some(None), ..PeerChange::default() };
    let set_peers = [(key(2), peer)].into();
    assert!(!is_configured(&desired.devices[&device(0)], first_state(&mut observed)));
    let expected = WireGuardChange { clear_fwmark: true, set_peers, ..WireGuardChange::default() };
    assert_eq!(*change, expected);
}

#[test]
fn a_configuration_is_compared_without_its_endpoints() {
    type Damage = fn(&mut crate::observed::ObservedWireGuard);
    let (desired, settled) = settled();
    let damages: [(bool, Damage); 7] = [
        (true, |_| {}),
        (true, |state| state.peers.get_mut(&key(2)).unwrap().endpoint = None),
        (false, |state| state.public_key = None),
        (false, |state| state.listen_port = 7),
        (false, |state| _ = state.peers.remove(&key(2))),
        (false, |state| _ = state.peers.insert(key(9), Default::default())),
        (false, |state| _ = state.peers.get_mut(&key(2)).unwrap().allowed_ips.pop_first()),
    ];
    for (number, (is, damage)) in damages.into_iter().enumerate() {
        let mut observed = settled.clone();
        damage(first_state(&mut observed));
        let state = first_state(&mut observed);
        assert_eq!(is_configured(&desired.devices[&device(0)], state), is, "{number}");
    }
}

#[test]
fn a_firewall_that_drops_by_policy_is_opened_or_named() {
    let (desired, settled) = settled();
    let drop = |family: &str, table: &str, chain: &str| ForwardDrop {
        family: family.to_owned(),
        table: table.to_owned(),
        chain: chain.to_owned(),
    };
    let iptables = [drop("ip", "filter", "FORWARD"), drop("ip6", "filter", "FORWARD")];
    let others = [drop("inet", "filter", "FORWARD"), drop("ip", "filter", "forward")];
    let forward_drops = iptables.iter().chain(&others).cloned().collect();
    let plan = Plan::new(&desired, &Observed { forward_drops, ..settled });
    assert_eq!(plan.actions, iptables.map(Action::AcceptForwarded));
    assert_eq!(plan.blocked, others.into());
}

#[test]
fn foreign_routes_that_win_over_ours_are_named() {
    let (desired, settled) = settled();
    for (destination, metric, wins) in [
        ("10.244.2.0/24", 0, Some("10.244.2.0/24")),
        ("10.244.2.0/24", 1, Some("10.244.2.0/24")),
        ("10.244.2.0/24", 2, None),
        ("10.244.2.128/25", 900, Some("10.244.2.0/24")),
        ("fd00:10:244:3::7/128", 1024, Some("fd00:10:244:3::/64")),
        ("10.244.0.0/16", 0, None),
        ("10.244.9.0/24", 0, None),
    ] {
        let key = RouteKey { destination: net(destination), metric };
        let foreign = ForeignRoute { key, protocol: 4, leads: "blackhole".to_owned() };
        let foreign_routes = [foreign.clone()].into();
        let plan = Plan::new(&desired, &Observed { foreign_routes, ..settled.clone() });
        assert_eq!(plan.actions, []);
        let wins = wins.map(|ours| (foreign, net(ours)));
        assert_eq!(plan.overruled, wins.into_iter().collect(), "{destination} {metric}");
    }
}

#[test]
fn a_removal_leaves_the_walls_unless_it_is_told_otherwise() {
    let (desired, settled) = settled();
    for (walls, left) in [(false, (2, 4)), (true, (0, 0))] {
        let mut observed = settled.clone();
        sim::apply(&Plan::removal(&observed, walls), &desired, &mut observed);
        assert!(observed.links.is_empty());
        assert_eq!((observed.routes.len(), observed.rules.len()), left);
        assert!(observed.routes.values().all(|route| route.next_hop == NextHop::Unreachable));
    }
    let mut foreign = settled.clone();
    foreign.links.get_mut(&device(0)).unwrap().ours = false;
    let actions = Plan::removal(&foreign, true).actions;
    assert!(!actions.contains(&Action::DeleteLink(device(0))));
}

#[test]
fn another_implementation_means_another_link() {
    let (_, settled) = settled();
    let userspace = Local { implementation: Implementation::Userspace, ..local(1, 0) };
    let desired = desired(&userspace, &[record(&local(2, 0)), record(&local(3, 1))]);
    let actions = plan(&desired, &settled);
    for number in [0, 1] {
        let at = actions.iter().position(|a| *a == Action::DeleteLink(device(number))).unwrap();
        assert!(matches!(actions[at + 1], Action::AddLink { .. }));
    }
    let routes = actions.iter().filter(|a| matches!(a, Action::PutRoute(..))).count();
    assert_eq!(routes, 4, "the links took their routes with them");
}

#[test]
fn a_dead_tunnel_is_replaced_but_an_unreadable_kernel_device_is_set_again() {
    let (desired, settled) = settled();
    let mut observed = settled.clone();
    observed.links.get_mut(&device(0)).unwrap().wireguard = None;
    let actions = plan(&desired, &observed);
    assert!(matches!(&actions[..], [Action::ConfigureWireGuard { .. }]), "{actions:?}");

    let userspace = Local { implementation: Implementation::Userspace, ..local(1, 0) };
    let desired =
        transport::desired(&crate::topology::Mesh::default(), &userspace, &Paths::default());
    let mut observed = Observed::default();
    sim::apply(&Plan::new(&desired, &observed), &desired, &mut observed);
    observed.links.get_mut(&device(0)).unwrap().wireguard = None;
    let actions = plan(&desired, &observed);
    assert_eq!(actions[0], Action::DeleteLink(device(0)));
    assert!(matches!(actions[1], Action::AddLink { .. }));
}

#[test]
fn a_roamed_endpoint_is_followed_until_the_session_goes_stale() {
    let (desired, settled) = settled();
    let published = desired.devices[&device(0)].peers[&key(2)].endpoint;
    let roamed: SocketAddr = "198.51.100.7:1234".parse().unwrap();
    let with = |age: Option<u64>, pinned: Option<SocketAddr>| {
        let mut observed = settled.clone();
        let peer = first_state(&mut observed).peers.get_mut(&key(2)).unwrap();
        (peer.endpoint, peer.pinned_endpoint) = (Some(roamed), pinned);
        sim::handshakes(&mut observed, age.map(Duration::from_secs));
        plan(&desired, &observed).len()
    };
    assert_eq!(with(Some(10), Some(published)), 0, "roaming is not fought");
    assert_eq!(with(Some(180), Some(published)), 0);
    assert_eq!(with(Some(181), Some(published)), 1, "stale: back to what is published");
    assert_eq!(with(None, Some(published)), 1, "never a handshake");
    assert_eq!(with(Some(10), Some(roamed)), 1, "the published endpoint changed");
    assert_eq!(with(Some(10), None), 0, "what a former agent wrote is not known, and it works");
    assert_eq!(with(Some(181), None), 1);
}

#[test]
fn a_changed_key_adds_the_new_peer_before_the_old_one_goes() {
    let (_, settled) = settled();
    let mut changed = local(2, 2);
    changed.keys = BTreeMap::from([(Generation::new(2), key(22))]);
    let desired = desired(&local(1, 0), &[record(&changed), record(&local(3, 1))]);
    let actions = plan(&desired, &settled);
    let [
        Action::ConfigureWireGuard { change: add, .. },
        Action::ConfigureWireGuard { change: remove, .. },
    ] = &actions[..]
    else {
        panic!("{actions:?}")
    };
    assert_eq!(add.set_peers.keys().collect::<Vec<_>>(), [&key(22)]);
    assert_eq!(remove.remove_peers, BTreeSet::from([key(2)]));
}

#[test]
fn changed_prefixes_are_given_in_full() {
    let (desired, settled) = settled();
    let wanted = &desired.devices[&device(0)].peers[&key(2)].allowed_ips;
    for changed in [BTreeSet::new(), BTreeSet::from([net("10.0.0.0/8"), net("10.244.2.0/24")])] {
        let mut observed = settled.clone();
        first_state(&mut observed).peers.get_mut(&key(2)).unwrap().allowed_ips = changed;
        let actions = plan(&desired, &observed);
        let [Action::ConfigureWireGuard { change, .. }] = &actions[..] else {
            panic!("{actions:?}")
        };
        let peer = PeerChange { allowed_ips: Some(wanted.clone()), ..PeerChange::default() };
        assert_eq!(change.set_peers, BTreeMap::from([(key(2), peer)]));
    }
}

#[test]
fn a_keepalive_of_zero_is_none() {
    let (desired, mut observed) = settled();
    for peer in first_state(&mut observed).peers.values_mut() {
        peer.persistent_keepalive = Some(0);
    }
    assert_eq!(plan(&desired, &observed), []);
}

#[test]
fn a_base_port_that_moves_up_frees_each_port_before_it_is_taken() {
    let (_, settled) = settled();
    let others = [record(&local(2, 0)), record(&local(3, 1))];
    for (port, first) in [(51822, 1), (51818, 0)] {
        let moved = Local { port, ..local(1, 0) };
        let actions = plan(&desired(&moved, &others), &settled);
        let devices: Vec<_> = actions
            .iter()
            .map(|action| match action {
                Action::ConfigureWireGuard { device, .. } => *device,
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(devices, [device(first), device(1 - first)]);
    }
}

#[test]
fn a_lower_underlay_mtu_reaches_links_and_routes() {
    let (_, settled) = settled();
    let lowered = Local { underlay_mtu: 1400, ..local(1, 0) };
    let actions = plan(&desired(&lowered, &[record(&local(2, 0))]), &settled);
    assert!(actions.contains(&Action::SetLinkMtu { device: device(0), mtu: 1320 }));
    let route = |a: &&Action| matches!(a, Action::PutRoute(_, r) if r.mtu == Some(1320));
    assert_eq!(actions.iter().filter(route).count(), 2);
}

#[test]
fn a_node_that_leaves_takes_its_peer_routes_and_device_along() {
    let (_, settled) = settled();
    let actions = plan(&desired(&local(1, 0), &[record(&local(2, 0))]), &settled);
    let key = |text| RouteKey { destination: net(text), metric: 1 };
    assert_eq!(
        actions,
        [
            Action::DeleteRoute(key("10.244.3.0/24")),
            Action::DeleteRoute(key("fd00:10:244:3::/64")),
            Action::DeleteLink(device(1)),
        ]
    );
}
