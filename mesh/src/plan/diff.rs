//! `Desired - Observed -> ordered actions`.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use super::{Action, Plan, vxlan, wireguard};
use crate::desired::{
    Desired, Implementation, LinkKind, NextHop, Route, Ruleset, Sysctl, WantedLink, WireGuardDevice,
};
use crate::observed::{ForeignRoute, Observed, ObservedLink, ObservedWireGuard};
use crate::session::DeviceName;

pub(super) fn plan(desired: &Desired, observed: &Observed) -> Plan {
    let difference = Difference::new(desired, observed);
    let mut actions = Vec::new();
    difference.guard(&mut actions);
    difference.links(&mut actions);
    difference.wireguard(&mut actions);
    difference.addresses(&mut actions);
    difference.tables(&mut actions);
    difference.device_settings(&mut actions);
    difference.routes(&mut actions);
    difference.deletions(&mut actions);
    let overruled = overruled(desired, observed);
    let blocked = observed.forward_drops.iter().filter(|drop| !drop.is_of_iptables());
    let blocked = blocked.cloned().collect();
    Plan { actions, foreign: difference.foreign, overruled, blocked }
}

pub(super) fn ruleset(desired: &Desired, observed: &Observed) -> Ruleset {
    let mut ruleset = desired.ruleset.clone();
    for (name, link) in &observed.links {
        if !link.is_ours() {
            ruleset.trusted_links.remove(name.as_str());
            ruleset.plaintext.remove(name.as_str());
        }
    }
    ruleset
}

/// The kernel takes the longest prefix, and of equal ones the lowest metric.
fn overruled(desired: &Desired, observed: &Observed) -> BTreeMap<ForeignRoute, IpNet> {
    let wins = |foreign: &ForeignRoute| {
        let leads = |route: &Route| route.next_hop != NextHop::Unreachable;
        let ours = desired.routes.iter().filter(|(_, route)| leads(route));
        ours.map(|(key, _)| key).find(|ours| {
            let same = foreign.key.destination == ours.destination;
            let first = same && foreign.key.metric <= ours.metric;
            first || (!same && ours.destination.contains(&foreign.key.destination))
        })
    };
    let routes = observed.foreign_routes.iter();
    routes.filter_map(|foreign| Some((foreign.clone(), wins(foreign)?.destination))).collect()
}

struct Difference<'a> {
    desired: &'a Desired,
    observed: &'a Observed,
    /// Desired links, less those whose name somebody else has.
    links: BTreeMap<DeviceName, WantedLink<'a>>,
    /// Links of ours that stay.
    kept: BTreeMap<DeviceName, &'a ObservedLink>,
    /// Links of ours that are deleted and made again.
    remade: BTreeSet<DeviceName>,
    /// Links of ours that are no longer wanted.
    surplus: BTreeSet<DeviceName>,
    /// Links of ours that lost their mark.
    unmarked: BTreeSet<DeviceName>,
    foreign: BTreeSet<DeviceName>,
}

impl<'a> Difference<'a> {
    fn new(desired: &'a Desired, observed: &'a Observed) -> Self {
        let mut difference = Self {
            desired,
            observed,
            links: desired.links().collect(),
            kept: BTreeMap::new(),
            remade: BTreeSet::new(),
            surplus: BTreeSet::new(),
            unmarked: BTreeSet::new(),
            foreign: BTreeSet::new(),
        };
        for (name, link) in &observed.links {
            let wanted = difference.links.get(name);
            let ours = link.is_ours();
            if ours && !link.ours {
                difference.unmarked.insert(*name);
            }
            match (ours, wanted) {
                (false, None) => {}
                (false, Some(_)) => {
                    difference.foreign.insert(*name);
                    difference.links.remove(name);
                }
                (true, None) => _ = difference.surplus.insert(*name),
                (true, Some(wanted)) if must_be_remade(wanted.kind, link) => {
                    difference.remade.insert(*name);
                }
                (true, Some(_)) => _ = difference.kept.insert(*name, link),
            }
        }
        difference
    }

    /// The guard, node-wide settings and fail-closed routes.
    fn guard(&self, actions: &mut Vec<Action>) {
        let ruleset = ruleset(self.desired, self.observed);
        if self.observed.ruleset.as_ref() != Some(&ruleset) {
            actions.push(Action::SetRuleset(ruleset));
        }
        // Before any setting of a device: the kernel resets those when it turns forwarding on
        // (Documentation/networking/ip-sysctl.rst, ip_forward).
        for (sysctl, value) in &self.desired.sysctls {
            let is = self.observed.sysctls.get(sysctl);
            // Without a bridge there is nothing to set yet.
            let absent = sysctl.is_of_bridge() && is.is_none();
            if sysctl.device().is_none() && !absent && is != Some(value) {
                actions.push(Action::SetSysctl(sysctl.clone(), value.clone()));
            }
        }
        for (key, route) in &self.desired.routes {
            let fail_closed = route.next_hop == NextHop::Unreachable;
            if fail_closed && self.observed.routes.get(key) != Some(route) {
                actions.push(Action::PutRoute(*key, route.clone()));
            }
        }
        let iptables = self.observed.forward_drops.iter().filter(|drop| drop.is_of_iptables());
        actions.extend(iptables.map(|drop| Action::AcceptForwarded(drop.clone())));
        let missing = self.desired.rules.difference(&self.observed.rules);
        actions.extend(missing.map(|rule| Action::AddRule(*rule)));
    }

    fn links(&self, actions: &mut Vec<Action>) {
        actions.extend(self.unmarked.iter().map(|device| Action::MarkLink(*device)));
        for (device, wanted) in &self.links {
            let (device, mtu, kind) = (*device, wanted.mtu, wanted.kind);
            match self.kept.get(&device) {
                Some(link) if link.mtu == mtu => {}
                Some(_) => actions.push(Action::SetLinkMtu { device, mtu }),
                None => {
                    if self.remade.contains(&device) {
                        actions.push(Action::DeleteLink(device));
                    }
                    actions.push(Action::AddLink { device, kind, mtu });
                }
            }
        }
    }

    fn wireguard(&self, actions: &mut Vec<Action>) {
        let mut changes: Vec<_> = self
            .wireguard_devices()
            .map(|(name, device)| (name, wireguard::additions(device, &self.state_of(name))))
            .filter(|(_, change)| !change.is_empty())
            .collect();
        // When the base port grows, a device's new port may still be the old one of the next
        // device, so that the last goes first.
        let grows = |(name, _): &(DeviceName, _)| {
            let device = self.desired.devices.get(name);
            device.is_some_and(|device| device.listen_port > self.state_of(*name).listen_port)
        };
        if changes.iter().any(grows) {
            changes.reverse();
        }
        let configure = |(device, change)| Action::ConfigureWireGuard { device, change };
        actions.extend(changes.into_iter().map(configure));
    }

    fn addresses(&self, actions: &mut Vec<Action>) {
        // Where IPv6 is disabled there are no addresses of it.
        self.settings(actions, |sysctl| matches!(sysctl, Sysctl::DisableIpv6(_)));
        for (device, wanted) in &self.links {
            let device = *device;
            let has = self.kept.get(&device).map(|link| &link.addresses);
            let missing = |address: &&_| !has.is_some_and(|has| has.contains(address));
            let add = |address: &_| Action::AddAddress { device, address: *address };
            actions.extend(wanted.addresses.iter().filter(missing).map(add));
        }
        for device in self.links.keys() {
            if !self.kept.get(device).is_some_and(|link| link.up) {
                actions.push(Action::SetLinkUp(*device));
            }
        }
    }

    /// Where packets of the VXLAN devices go; a device that comes up forgets its neighbours.
    fn tables(&self, actions: &mut Vec<Action>) {
        for (device, vtep) in &self.desired.vteps {
            if self.links.contains_key(device) {
                let up = self.kept.get(device).filter(|link| link.up);
                let observed = up.map(|link| link.tables.clone()).unwrap_or_default();
                let put = |entry| Action::PutEntry { device: *device, entry };
                actions.extend(vxlan::additions(&vtep.tables, &observed).into_iter().map(put));
            }
        }
    }

    fn device_settings(&self, actions: &mut Vec<Action>) {
        self.settings(actions, |sysctl| !matches!(sysctl, Sysctl::DisableIpv6(_)));
    }

    fn settings(&self, actions: &mut Vec<Action>, which: impl Fn(&Sysctl) -> bool) {
        for (sysctl, value) in self.desired.sysctls.iter().filter(|(sysctl, _)| which(sysctl)) {
            let Some(device) = sysctl.device() else { continue };
            let stays = self.kept.contains_key(&device);
            let is = self.observed.sysctls.get(sysctl).filter(|_| stays);
            // A kernel without IPv6 has no setting for it.
            let absent = stays && is.is_none() && matches!(sysctl, Sysctl::DisableIpv6(_));
            if self.links.contains_key(&device) && !absent && is != Some(value) {
                actions.push(Action::SetSysctl(sysctl.clone(), value.clone()));
            }
        }
    }

    fn routes(&self, actions: &mut Vec<Action>) {
        for (key, route) in &self.desired.routes {
            let (exists, stays) = match (route.next_hop, route.next_hop.device()) {
                (NextHop::Unreachable, _) => continue,
                // A link takes its routes with it when it is deleted.
                (_, Some(device)) => {
                    (self.links.contains_key(&device), self.kept.contains_key(&device))
                }
                (_, None) => (true, true),
            };
            let is_set = stays && self.observed.routes.get(key) == Some(route);
            if exists && !is_set {
                actions.push(Action::PutRoute(*key, route.clone()));
            }
        }
    }

    fn deletions(&self, actions: &mut Vec<Action>) {
        let surplus = self.observed.rules.difference(&self.desired.rules);
        actions.extend(surplus.map(|rule| Action::DeleteRule(*rule)));
        for (key, route) in &self.observed.routes {
            if !self.is_wanted_route(key) && !self.is_flushed(route.next_hop) {
                actions.push(Action::DeleteRoute(*key));
            }
        }
        for (device, wanted) in self.wireguard_devices() {
            let change = wireguard::removals(wanted, &self.state_of(device));
            if !change.is_empty() {
                actions.push(Action::ConfigureWireGuard { device, change });
            }
        }
        for (device, link) in &self.kept {
            if let Some(vtep) = self.desired.vteps.get(device) {
                let delete = |entry| Action::DeleteEntry { device: *device, entry };
                let surplus = vxlan::removals(&vtep.tables, &link.tables);
                actions.extend(surplus.into_iter().map(delete));
            }
        }
        for (device, link) in &self.kept {
            let wanted = self.links.get(device).map(|wanted| wanted.addresses);
            for address in &link.addresses {
                if !wanted.is_some_and(|wanted| wanted.contains(address)) {
                    actions.push(Action::DeleteAddress { device: *device, address: *address });
                }
            }
        }
        actions.extend(self.surplus.iter().map(|device| Action::DeleteLink(*device)));
    }

    /// Desired WireGuard devices, less those whose name somebody else has.
    fn wireguard_devices(&self) -> impl Iterator<Item = (DeviceName, &'a WireGuardDevice)> {
        let devices = self.desired.devices.iter().map(|(name, device)| (*name, device));
        devices.filter(|(name, _)| self.links.contains_key(name))
    }

    /// The WireGuard state that a device starts from: nothing, for one that is made anew or
    /// whose state could not be read, for which everything is set again.
    fn state_of(&self, device: DeviceName) -> ObservedWireGuard {
        let link = self.kept.get(&device);
        link.and_then(|link| link.wireguard.clone()).unwrap_or_default()
    }

    /// Desired, and not through a device that belongs to somebody else.
    fn is_wanted_route(&self, key: &crate::desired::RouteKey) -> bool {
        self.desired.routes.get(key).is_some_and(|route| {
            route.next_hop.device().is_none_or(|device| self.links.contains_key(&device))
        })
    }

    /// Gone by now, because its link was deleted to be made again.
    fn is_flushed(&self, next_hop: NextHop) -> bool {
        next_hop.device().is_some_and(|device| self.remade.contains(&device))
    }
}

/// Of another kind, or a TUN device whose process is gone. A kernel link whose state could
/// not be read is still there, and works: its state is set again in place.
fn must_be_remade(wanted: LinkKind, link: &ObservedLink) -> bool {
    let userspace = link.kind == Some(LinkKind::WireGuard(Implementation::Userspace));
    let tunnel_is_gone = userspace && link.wireguard.is_none();
    link.kind != Some(wanted) || tunnel_is_gone
}
