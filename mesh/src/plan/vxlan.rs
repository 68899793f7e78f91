//! The difference of one VXLAN device's tables.

use super::Action;
use crate::desired::VtepTables;
use crate::session::DeviceName;

/// Entries to set: from the node to the next hop, so that none leads nowhere.
pub(super) fn additions(
    device: DeviceName,
    desired: &VtepTables,
    observed: &VtepTables,
) -> Vec<Action> {
    let forwarding = desired.forwarding.iter();
    let forwarding = forwarding.filter(|(mac, node)| observed.forwarding.get(mac) != Some(node));
    let neighbours = desired.neighbours.iter();
    let neighbours =
        neighbours.filter(|(gateway, mac)| observed.neighbours.get(gateway) != Some(mac));
    let put = |(mac, node): (&_, &_)| Action::PutForwarding { device, mac: *mac, node: *node };
    let resolve =
        |(gateway, mac): (&_, &_)| Action::PutNeighbour { device, gateway: *gateway, mac: *mac };
    forwarding.map(put).chain(neighbours.map(resolve)).collect()
}

/// Entries to remove.
pub(super) fn removals(
    device: DeviceName,
    desired: &VtepTables,
    observed: &VtepTables,
) -> Vec<Action> {
    let neighbours = observed.neighbours.keys();
    let neighbours = neighbours.filter(|gateway| !desired.neighbours.contains_key(gateway));
    let forwarding = observed.forwarding.iter();
    let forwarding = forwarding.filter(|(mac, _)| !desired.forwarding.contains_key(mac));
    let forget = |gateway: &_| Action::DeleteNeighbour { device, gateway: *gateway };
    let delete =
        |(mac, node): (&_, &_)| Action::DeleteForwarding { device, mac: *mac, node: *node };
    neighbours.map(forget).chain(forwarding.map(delete)).collect()
}
