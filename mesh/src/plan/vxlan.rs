//! The difference of one VXLAN device's tables.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::desired::{VtepEntry, VtepTables};
use crate::mac::Mac;

/// Entries to set: from the node to the next hop, so that none leads nowhere.
pub(super) fn additions(desired: &VtepTables, observed: &VtepTables) -> Vec<VtepEntry> {
    let forwarding = changed(&desired.forwarding, &observed.forwarding).map(forwarding);
    let neighbours = changed(&desired.neighbours, &observed.neighbours).map(neighbour);
    forwarding.chain(neighbours).collect()
}

/// Entries to remove, in the other order.
pub(super) fn removals(desired: &VtepTables, observed: &VtepTables) -> Vec<VtepEntry> {
    let neighbours = surplus(&desired.neighbours, &observed.neighbours).map(neighbour);
    let forwarding = surplus(&desired.forwarding, &observed.forwarding).map(forwarding);
    neighbours.chain(forwarding).collect()
}

fn neighbour((gateway, mac): (&IpAddr, &Mac)) -> VtepEntry {
    VtepEntry::Neighbour { gateway: *gateway, mac: *mac }
}

fn forwarding((mac, node): (&Mac, &IpAddr)) -> VtepEntry {
    VtepEntry::Forwarding { mac: *mac, node: *node }
}

fn changed<'a, K: Ord, V: PartialEq>(
    desired: &'a BTreeMap<K, V>,
    observed: &BTreeMap<K, V>,
) -> impl Iterator<Item = (&'a K, &'a V)> {
    desired.iter().filter(|(key, value)| observed.get(key) != Some(value))
}

fn surplus<'a, K: Ord, V>(
    desired: &BTreeMap<K, V>,
    observed: &'a BTreeMap<K, V>,
) -> impl Iterator<Item = (&'a K, &'a V)> {
    observed.iter().filter(|(key, _)| !desired.contains_key(key))
}
