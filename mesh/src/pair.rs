//! `Local + Node -> Transport`: how packets between this node and another travel. Both ends
//! come to the same answer, because both look at the same two Nodes.
//!
//! The best transport that both list is taken: WireGuard, then host-gw where both are on one
//! link, then VXLAN. Nothing else ever falls back.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::family::Family;
use crate::node::{Endpoints, Local, Node, Refusal, Transport, Vteps};

/// The transport of a pair.
///
/// # Errors
/// Why the pair has none.
pub fn transport(local: &Local, node: &Node) -> Result<Transport, Refusal> {
    match usable(local, node).next() {
        Some(transport) => Ok(transport),
        None => Err(refusal(local, node)),
    }
}

/// Every transport that the pair may use, best first.
fn usable<'a>(local: &'a Local, node: &'a Node) -> impl Iterator<Item = Transport> + 'a {
    let common = local.transports.intersection(&node.transports).copied();
    common.filter(|transport| is_possible(local, node, *transport))
}

/// Whether a transport would work for the pair, listed or not.
pub fn is_possible(local: &Local, node: &Node, transport: Transport) -> bool {
    match transport {
        Transport::Wireguard => node.endpoints.reachable_from(local.endpoints).is_some(),
        Transport::HostGw => is_on_link(local, node),
        Transport::Vxlan => Family::ALL.into_iter().any(|family| has_vteps(local, node, family)),
    }
}

/// The underlay family of the VXLAN device that carries pods of `family`: the same family
/// where both nodes have it, as Flannel does, else the other.
pub fn vxlan_family(local: &Local, node: &Node, family: Family) -> Option<Family> {
    [family, family.other()].into_iter().find(|family| has_vteps(local, node, *family))
}

/// Addresses of a node that would be next hops: one for each family of pods that both have.
pub fn next_hops(local: &Local, node: &Node) -> Vec<Option<IpAddr>> {
    let families = |cidrs: &BTreeSet<IpNet>| cidrs.iter().map(Family::of_net).collect();
    let (ours, theirs): (BTreeSet<_>, BTreeSet<_>) =
        (families(&local.pod_cidrs), families(&node.pod_cidrs));
    ours.intersection(&theirs).map(|family| node.endpoints.get(*family)).collect()
}

fn is_on_link(local: &Local, node: &Node) -> bool {
    let hops = next_hops(local, node);
    let on_link = |hop: &Option<IpAddr>| hop.is_some_and(|hop| local.on_link.contains(&hop));
    !hops.is_empty() && hops.iter().all(on_link)
}

fn has_vteps(local: &Local, node: &Node, family: Family) -> bool {
    let has = |endpoints: Endpoints, vteps: Vteps| {
        endpoints.get(family).is_some() && vteps.get(family).is_some()
    };
    has(local.endpoints, local.vteps) && has(node.endpoints, node.vteps)
}

fn refusal(local: &Local, node: &Node) -> Refusal {
    let mut common = local.transports.intersection(&node.transports);
    match (common.next(), common.next()) {
        (None, _) => Refusal::no_common_transport(&node.transports, &local.transports),
        (Some(Transport::HostGw), None) => Refusal::NotOnLink { ours: local.name.clone() },
        _ => {
            let family = |v4: bool| if v4 { "IPv4" } else { "IPv6" };
            Refusal::NoCommonFamily {
                theirs: family(node.endpoints.v4.is_some()),
                ours: family(local.endpoints.v4.is_some()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{local, record};

    fn with(i: u8, transports: &[Transport]) -> Local {
        Local { transports: transports.iter().copied().collect(), ..local(i, 0) }
    }

    fn of(ours: &Local, theirs: &Local) -> Result<Transport, String> {
        let node = Node::parse(&record(theirs), ours).unwrap();
        transport(ours, &node).map_err(|refusal| refusal.to_string())
    }

    #[test]
    fn the_best_that_both_list_is_taken_and_nothing_else() {
        use Transport::{HostGw, Vxlan, Wireguard};
        for (ours, theirs, expected) in [
            (&[Wireguard][..], &[Wireguard][..], Some(Wireguard)),
            (&[Wireguard], &[Vxlan], None),
            (&[Wireguard, Vxlan], &[Vxlan], Some(Vxlan)),
            (&[Wireguard, Vxlan], &[Wireguard, Vxlan], Some(Wireguard)),
            (&[Wireguard, Vxlan], &[Wireguard, HostGw], Some(Wireguard)),
            (&[HostGw, Vxlan], &[HostGw, Vxlan], Some(Vxlan)),
            (&[HostGw], &[HostGw, Vxlan], None),
        ] {
            let (ours, theirs) = (with(1, ours), with(2, theirs));
            assert_eq!(of(&ours, &theirs).ok(), expected, "{ours:?} {theirs:?}");
            assert_eq!(of(&theirs, &ours).ok(), expected, "{theirs:?} {ours:?}");
        }
    }

    #[test]
    fn host_gw_wants_both_families_on_the_link() {
        let mut ours = with(1, &[Transport::HostGw]);
        let theirs = with(2, &[Transport::HostGw]);
        let error = of(&ours, &theirs).unwrap_err();
        assert!(error.contains("node-1") && error.contains("vxlan"), "{error}");
        ours.on_link = BTreeSet::from([theirs.endpoints.v4.unwrap().into()]);
        assert!(of(&ours, &theirs).is_err(), "IPv6 pods have no way");
        ours.pod_cidrs.retain(|cidr| Family::of_net(cidr) == Family::V4);
        assert_eq!(of(&ours, &theirs), Ok(Transport::HostGw));
        ours = with(1, &[Transport::HostGw]);
        ours.on_link =
            [theirs.endpoints.v4.unwrap().into(), theirs.endpoints.v6.unwrap().into()].into();
        assert_eq!(of(&ours, &theirs), Ok(Transport::HostGw));
    }

    #[test]
    fn vxlan_takes_the_pods_family_where_it_can() {
        let ours = with(1, &[Transport::Vxlan]);
        let mut theirs = with(2, &[Transport::Vxlan]);
        let family = |theirs: &Local, family| {
            vxlan_family(&ours, &Node::parse(&record(theirs), &ours).unwrap(), family)
        };
        for pods in Family::ALL {
            assert_eq!(family(&theirs, pods), Some(pods));
        }
        theirs.endpoints = Endpoints { v6: None, ..theirs.endpoints };
        for pods in Family::ALL {
            assert_eq!(family(&theirs, pods), Some(Family::V4));
        }
        let v6_only = Local { endpoints: Endpoints { v4: None, ..ours.endpoints }, ..ours.clone() };
        let error = of(&v6_only, &theirs).unwrap_err();
        assert!(error.contains("IPv4 endpoint only"), "{error}");
    }
}
