//! Tables of a VXLAN device: neighbours of both families and the forwarding database, as far
//! as they are permanent. What the kernel learns by itself is its own business.

use std::io;
use std::net::IpAddr;

use gambeson_mesh::desired::VtepTables;
use gambeson_mesh::mac::Mac;
use gambeson_mesh::session::DeviceName;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::libc::{ENOENT, EOPNOTSUPP};

use super::netlink::Netlink;
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

/// Sets the address of the device behind a next hop.
pub(super) async fn put_neighbour(
    netlink: &mut Netlink,
    device: DeviceName,
    gateway: IpAddr,
    mac: Mac,
) -> Result<(), ApplyError> {
    let index = link::ours(netlink, device).await?.index;
    let message = message(family_of(gateway), index, mac, gateway);
    put(netlink, message).await.map_err(|source| ApplyError::PutNeighbour {
        device,
        gateway,
        source,
    })
}

/// Removes a next hop. One that is gone already is success.
pub(super) async fn delete_neighbour(
    netlink: &mut Netlink,
    device: DeviceName,
    gateway: IpAddr,
) -> Result<(), ApplyError> {
    let index = link::ours(netlink, device).await?.index;
    let mut message = NeighbourMessage::default();
    message.header.family = family_of(gateway);
    message.header.ifindex = index;
    message.attributes.push(NeighbourAttribute::Destination(address(gateway)));
    delete(netlink, message).await.map_err(|source| ApplyError::DeleteNeighbour {
        device,
        gateway,
        source,
    })
}

/// Sets the node that has the device with this address.
pub(super) async fn put_forwarding(
    netlink: &mut Netlink,
    device: DeviceName,
    mac: Mac,
    node: IpAddr,
) -> Result<(), ApplyError> {
    let index = link::ours(netlink, device).await?.index;
    put(netlink, message(AddressFamily::Bridge, index, mac, node))
        .await
        .map_err(|source| ApplyError::PutForwarding { device, mac, source })
}

/// Removes an address from the forwarding database. One that is gone already is success.
pub(super) async fn delete_forwarding(
    netlink: &mut Netlink,
    device: DeviceName,
    mac: Mac,
    node: IpAddr,
) -> Result<(), ApplyError> {
    let index = link::ours(netlink, device).await?.index;
    delete(netlink, message(AddressFamily::Bridge, index, mac, node))
        .await
        .map_err(|source| ApplyError::DeleteForwarding { device, mac, source })
}

async fn put(netlink: &mut Netlink, message: NeighbourMessage) -> io::Result<()> {
    let message = RouteNetlinkMessage::NewNeighbour(message);
    netlink.change(message, NLM_F_CREATE | NLM_F_REPLACE).await
}

async fn delete(netlink: &mut Netlink, message: NeighbourMessage) -> io::Result<()> {
    match netlink.change(RouteNetlinkMessage::DelNeighbour(message), 0).await {
        Err(error) if error.raw_os_error() == Some(ENOENT) => Ok(()),
        result => result,
    }
}

/// One permanent entry. An address that no device of ours can have is left out.
struct Entry {
    mac: Option<Mac>,
    address: Option<IpAddr>,
}

async fn dump(netlink: &mut Netlink, family: AddressFamily, index: u32) -> io::Result<Vec<Entry>> {
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

fn entry(message: &NeighbourMessage) -> Entry {
    let mut entry = Entry { mac: None, address: None };
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

fn message(family: AddressFamily, index: u32, mac: Mac, of: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family;
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    if family == AddressFamily::Bridge {
        // In the device's own database, not in that of a bridge that it may be a port of.
        message.header.flags = NeighbourFlags::Own;
    }
    message.attributes = vec![
        NeighbourAttribute::LinkLayerAddress(mac.octets().to_vec()),
        NeighbourAttribute::Destination(address(of)),
    ];
    message
}

fn address(ip: IpAddr) -> NeighbourAddress {
    match ip {
        IpAddr::V4(v4) => NeighbourAddress::Inet(v4),
        IpAddr::V6(v6) => NeighbourAddress::Inet6(v6),
    }
}

fn family_of(ip: IpAddr) -> AddressFamily {
    match ip {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}
