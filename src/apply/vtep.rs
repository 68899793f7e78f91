//! Tables of a VXLAN device: neighbours of both families and the forwarding database, as far
//! as they are permanent. What the kernel learns by itself is its own business.

use std::io;
use std::net::IpAddr;

use gambeson_mesh::desired::{VtepEntry, VtepTables};
use gambeson_mesh::mac::Mac;
use gambeson_mesh::session::DeviceName;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::libc::{ENOENT, EOPNOTSUPP};

use super::netlink::{Netlink, family_of};
use super::{ApplyError, link};

/// Reads the permanent entries of the device with this index.
pub(super) async fn observe(
    netlink: &mut Netlink,
    device: DeviceName,
    index: u32,
) -> Result<VtepTables, ApplyError> {
    let mut tables = VtepTables::default();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let entries = dump(netlink, family, index).await;
        for entry in entries.map_err(|source| ApplyError::ReadTables { device, source })? {
            tables.neighbours.extend(entry.address.zip(entry.mac));
        }
    }
    let entries = dump(netlink, AddressFamily::Bridge, index).await;
    for entry in entries.map_err(|source| ApplyError::ReadTables { device, source })? {
        tables.forwarding.extend(entry.mac.zip(entry.address));
    }
    Ok(tables)
}

/// Sets an entry.
pub(super) async fn put(
    netlink: &mut Netlink,
    device: DeviceName,
    entry: VtepEntry,
) -> Result<(), ApplyError> {
    let index = link::ours(netlink, device).await?.index;
    let message = RouteNetlinkMessage::NewNeighbour(message(index, entry));
    let result = netlink.change(message, NLM_F_CREATE | NLM_F_REPLACE).await;
    result.map_err(|source| ApplyError::PutEntry { device, entry, source })
}

/// Removes an entry. One that is gone already is success.
pub(super) async fn delete(
    netlink: &mut Netlink,
    device: DeviceName,
    entry: VtepEntry,
) -> Result<(), ApplyError> {
    let index = link::ours(netlink, device).await?.index;
    let message = RouteNetlinkMessage::DelNeighbour(message(index, entry));
    match netlink.change(message, 0).await {
        Err(error) if error.raw_os_error() == Some(ENOENT) => Ok(()),
        result => result.map_err(|source| ApplyError::DeleteEntry { device, entry, source }),
    }
}

/// What the kernel says of an entry. An address that no device of ours can have is left out.
struct Found {
    mac: Option<Mac>,
    address: Option<IpAddr>,
}

async fn dump(netlink: &mut Netlink, family: AddressFamily, index: u32) -> io::Result<Vec<Found>> {
    let mut request = NeighbourMessage::default();
    request.header.family = family;
    // Each kind of dump has its own place for it (neigh_valid_dump_req in net/core/neighbour.c,
    // valid_fdb_dump_strict in net/core/rtnetlink.c).
    match family {
        AddressFamily::Bridge => request.header.ifindex = index,
        _ => request.attributes.push(NeighbourAttribute::IfIndex(index)),
    }
    let replies = match netlink.dump(RouteNetlinkMessage::GetNeighbour(request)).await {
        Ok(replies) => replies,
        // Without the family there are no entries of it.
        Err(error) if error.raw_os_error() == Some(EOPNOTSUPP) => Vec::new(),
        Err(error) => return Err(error),
    };
    let entries = replies.into_iter().filter_map(|reply| match reply {
        RouteNetlinkMessage::NewNeighbour(message) => Some(message),
        _ => None,
    });
    Ok(entries
        .filter(|message| {
            let header = &message.header;
            header.family == family && header.ifindex == index && is_permanent(header.state)
        })
        .map(|message| entry(&message))
        .collect())
}

/// Other bits may be set beside it.
fn is_permanent(state: NeighbourState) -> bool {
    u16::from(state) & u16::from(NeighbourState::Permanent) != 0
}

fn entry(message: &NeighbourMessage) -> Found {
    let mut entry = Found { mac: None, address: None };
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::LinkLayerAddress(bytes) => entry.mac = Mac::from_bytes(bytes),
            NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => {
                entry.address = Some((*v4).into());
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => {
                entry.address = Some((*v6).into());
            }
            // The forwarding database has addresses of either family.
            NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => {
                let v4 = <[u8; 4]>::try_from(bytes.as_slice()).map(IpAddr::from);
                let v6 = <[u8; 16]>::try_from(bytes.as_slice()).map(IpAddr::from);
                entry.address = v4.or(v6).ok();
            }
            _ => {}
        }
    }
    entry
}

fn message(index: u32, entry: VtepEntry) -> NeighbourMessage {
    let (family, flags, mac, ip) = match entry {
        VtepEntry::Neighbour { gateway, mac } => {
            (family_of(gateway), NeighbourFlags::empty(), mac, gateway)
        }
        // In the device's own database, not in that of a bridge that it may be a port of.
        VtepEntry::Forwarding { mac, node } => {
            (AddressFamily::Bridge, NeighbourFlags::Own, mac, node)
        }
    };
    let mut message = NeighbourMessage::default();
    message.header.family = family;
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.header.flags = flags;
    let destination = match ip {
        IpAddr::V4(v4) => NeighbourAddress::Inet(v4),
        IpAddr::V6(v6) => NeighbourAddress::Inet6(v6),
    };
    message.attributes = vec![
        NeighbourAttribute::LinkLayerAddress(mac.octets().to_vec()),
        NeighbourAttribute::Destination(destination),
    ];
    message
}
