//! A kernel for tests: applies a plan to what was observed, and panics on an action that the
//! real one would refuse.

use std::collections::BTreeMap;
use std::time::Duration;

use gambeson_keys::{Generation, PublicKey};

use crate::desired::{Desired, LinkKind, NextHop, Sysctl, VtepEntry, VtepTables};
use crate::observed::{Observed, ObservedLink, ObservedPeer, ObservedWireGuard, Preshared};
use crate::plan::{Action, PeerChange, Plan, WireGuardChange};
use crate::session::DeviceName;

/// Applies every action of a plan, with the keys of the desired devices at hand.
pub(crate) fn apply(plan: &Plan, desired: &Desired, observed: &mut Observed) {
    let keys = desired.devices.values().map(|device| (device.generation, device.public_key));
    let keys = keys.collect();
    for action in &plan.actions {
        step(action, &keys, observed);
    }
}

/// Applies one action.
pub(crate) fn step(
    action: &Action,
    keys: &BTreeMap<Generation, PublicKey>,
    observed: &mut Observed,
) {
    match action {
        Action::SetRuleset(ruleset) => observed.ruleset = Some(ruleset.clone()),
        Action::SetSysctl(sysctl, value) => {
            if let Some(device) = sysctl.device() {
                own_link(observed, device);
            }
            assert!(!sysctl.is_of_bridge() || observed.sysctls.contains_key(sysctl), "no bridge");
            observed.sysctls.insert(sysctl.clone(), value.clone());
        }
        Action::AddLink { device, kind, mtu } => {
            let link = ObservedLink {
                ours: true,
                known: true,
                kind: Some(*kind),
                up: false,
                mtu: *mtu,
                addresses: [].into(),
                wireguard: matches!(kind, LinkKind::WireGuard(_)).then(Default::default),
                tables: VtepTables::default(),
            };
            assert!(observed.links.insert(*device, link).is_none(), "{device} exists");
            observed.sysctls.insert(Sysctl::RpFilter(*device), "0".to_owned());
            observed.sysctls.insert(Sysctl::Forwarding(*device), "1".to_owned());
        }
        Action::DeleteLink(device) => {
            own_link(observed, *device);
            observed.links.remove(device);
            observed.routes.retain(|_, route| route.next_hop.device() != Some(*device));
            observed.sysctls.retain(|sysctl, _| sysctl.device() != Some(*device));
        }
        Action::MarkLink(device) => {
            let link = observed.links.get_mut(device).unwrap_or_else(|| panic!("no {device}"));
            link.ours = true;
        }
        Action::SetLinkMtu { device, mtu } => own_link(observed, *device).mtu = *mtu,
        Action::SetLinkUp(device) => own_link(observed, *device).up = true,
        Action::AddAddress { device, address } => {
            assert!(own_link(observed, *device).addresses.insert(*address), "{address} exists");
        }
        Action::DeleteAddress { device, address } => {
            assert!(own_link(observed, *device).addresses.remove(address), "no {address}");
            delete_routes_from_lost_sources(observed);
        }
        Action::ConfigureWireGuard { device, change } => {
            let state = own_link(observed, *device).wireguard.get_or_insert_default();
            configure(change, keys, state);
        }
        Action::PutEntry { device, entry } => {
            let link = own_link(observed, *device);
            match entry {
                VtepEntry::Neighbour { gateway, mac } => {
                    assert!(link.up, "a neighbour on {device}, which is down");
                    link.tables.neighbours.insert(*gateway, *mac);
                }
                VtepEntry::Forwarding { mac, node } => {
                    link.tables.forwarding.insert(*mac, *node);
                }
            }
        }
        Action::DeleteEntry { device, entry } => {
            let tables = &mut own_link(observed, *device).tables;
            match entry {
                VtepEntry::Neighbour { gateway, mac } => {
                    assert_eq!(tables.neighbours.remove(gateway), Some(*mac), "no {gateway}");
                }
                VtepEntry::Forwarding { mac, node } => {
                    assert_eq!(tables.forwarding.remove(mac), Some(*node), "no entry for {mac}");
                }
            }
        }
        Action::PutRoute(key, route) => {
            if let Some(device) = route.next_hop.device() {
                assert!(own_link(observed, device).up, "{key:?} through {device}, which is down");
            }
            if let NextHop::Vtep { device, gateway } = route.next_hop {
                let tables = &own_link(observed, device).tables;
                let mac = tables.neighbours.get(&gateway);
                assert!(mac.is_some_and(|mac| tables.forwarding.contains_key(mac)), "{key:?}");
            }
            if let Some(source) = route.source {
                assert!(has_address(observed, source), "no address {source} for {key:?}");
            }
            observed.routes.insert(*key, route.clone());
        }
        Action::AcceptForwarded(drop) => {
            assert!(drop.is_of_iptables() && observed.forward_drops.remove(drop), "{drop:?}");
        }
        Action::AddRule(rule) => _ = observed.rules.insert(*rule),
        Action::DeleteRule(rule) => assert!(observed.rules.remove(rule), "no {rule:?}"),
        Action::DeleteRoute(key) => {
            assert!(observed.routes.remove(key).is_some(), "no route {key:?}");
        }
    }
}

fn own_link(observed: &mut Observed, device: DeviceName) -> &mut ObservedLink {
    let link = observed.links.get_mut(&device).unwrap_or_else(|| panic!("no link {device}"));
    assert!(link.ours && link.kind.is_some(), "{device} is not ours");
    link
}

fn has_address(observed: &Observed, source: std::net::IpAddr) -> bool {
    observed.links.values().any(|link| link.addresses.iter().any(|net| net.addr() == source))
}

/// `fib_sync_down_addr` in net/ipv4/fib_semantics.c.
fn delete_routes_from_lost_sources(observed: &mut Observed) {
    let routes = std::mem::take(&mut observed.routes);
    let stays = |source: Option<std::net::IpAddr>| source.is_none_or(|s| has_address(observed, s));
    let routes = routes.into_iter().filter(|(_, route)| stays(route.source)).collect();
    observed.routes = routes;
}

fn configure(
    change: &WireGuardChange,
    keys: &BTreeMap<Generation, PublicKey>,
    state: &mut ObservedWireGuard,
) {
    if let Some(generation) = change.key {
        state.public_key = Some(keys[&generation]);
    }
    if let Some(port) = change.listen_port {
        state.listen_port = port;
    }
    if change.clear_fwmark {
        state.fwmark = 0;
    }
    for (key, peer) in &change.set_peers {
        if let Some(prefixes) = &peer.allowed_ips {
            for other in state.peers.values_mut() {
                other.allowed_ips.retain(|prefix| !prefixes.contains(prefix));
            }
        }
        set_peer(peer, state.peers.entry(*key).or_default());
    }
    for key in &change.remove_peers {
        assert!(state.peers.remove(key).is_some(), "no peer {key}");
    }
}

fn set_peer(change: &PeerChange, peer: &mut ObservedPeer) {
    if let Some(endpoint) = change.endpoint {
        peer.endpoint = Some(endpoint);
        peer.pinned_endpoint = Some(endpoint);
    }
    if let Some(prefixes) = &change.allowed_ips {
        peer.allowed_ips = prefixes.clone();
    }
    if let Some(seconds) = change.persistent_keepalive {
        peer.persistent_keepalive = Some(seconds);
    }
    if let Some(secret) = change.preshared_key {
        peer.preshared = secret.map_or(Preshared::None, Preshared::Of);
    }
}

/// A handshake of this age on every peer.
pub(crate) fn handshakes(observed: &mut Observed, age: Option<Duration>) {
    let states = observed.links.values_mut().filter_map(|link| link.wireguard.as_mut());
    for peer in states.flat_map(|state| state.peers.values_mut()) {
        peer.handshake_age = age;
    }
}
