//! Cluster networks against what this host already uses. The guard drops what travels to and
//! from the cluster networks in clear, so that a node whose own network is among them would be
//! cut off, for as long as the guard is there.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use gambeson_mesh::node::overlap;
use gambeson_mesh::session::DeviceName;
use ipnet::IpNet;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::RouteProtocol;

use crate::apply::netlink::Netlink;
use crate::apply::{ApplyError, link, route};

/// Devices on which addresses of the cluster networks are at home: of the reference CNI plugins
/// and of Flannel, whose place may be taken while its pods run.
const AT_HOME: [&str; 5] = ["cni0", "flannel.1", "flannel-v6.1", "flannel-wg", "flannel-wg-v6"];

/// A cluster network with something of this host in it, or the other way round.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Overlap {
    network: IpNet,
    with: String,
}

impl fmt::Display for Overlap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cluster network {} overlaps {}", self.network, self.with)
    }
}

/// The API server's address, when it is in a cluster network.
pub(super) fn with_server(networks: &BTreeSet<IpNet>, server: IpAddr) -> Option<Overlap> {
    let network = *networks.iter().find(|network| network.contains(&server))?;
    Some(Overlap { network, with: format!("the API server's address {server}") })
}

/// The first address or connected route of this host that overlaps a cluster network, those
/// on the pod bridge and on devices that carry pod traffic excepted.
pub(super) async fn with_host(
    networks: &BTreeSet<IpNet>,
    bridge: &str,
) -> Result<Option<Overlap>, ApplyError> {
    let mut netlink = Netlink::connect().map_err(|source| ApplyError::Connect { source })?;
    let links: BTreeMap<u32, String> = link::all(&mut netlink)
        .await?
        .into_iter()
        .filter(|link| !link.ours && link.name != bridge && !is_at_home(&link.name))
        .map(|link| (link.index, link.name))
        .collect();
    let addresses = link::addresses(&mut netlink, 0).await.map_err(|source| {
        ApplyError::ReadAddresses { link: "all interfaces".to_owned(), source }
    })?;
    for address in addresses {
        let Some(link) = links.get(&address.index) else { continue };
        if let Some(network) = overlapping(networks, address.address) {
            let with = format!("address {} of {link}", address.address);
            return Ok(Some(Overlap { network, with }));
        }
    }
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        for message in route::dump(&mut netlink, family, RouteProtocol::Kernel).await? {
            let Some(link) = route::output_link(&message).and_then(|index| links.get(&index))
            else {
                continue;
            };
            let Some(key) = route::key_of(&message) else { continue };
            if let Some(network) = overlapping(networks, key.destination) {
                let with = format!("the connected route {} of {link}", key.destination);
                return Ok(Some(Overlap { network, with }));
            }
        }
    }
    Ok(None)
}

/// A foreign device with one of our names is refused by that name, with its own remedy.
fn is_at_home(name: &str) -> bool {
    AT_HOME.contains(&name) || DeviceName::parse(name).is_some()
}

fn overlapping(networks: &BTreeSet<IpNet>, used: IpNet) -> Option<IpNet> {
    // A default route is no network of this host.
    let other = networks.iter().find(|network| overlap(network, &used));
    other.filter(|_| used.prefix_len() != 0).copied()
}
