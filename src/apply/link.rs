//! Links with our names, and their addresses.
//!
//! A link is ours when it carries the alias [`LINK_ALIAS`]. A kernel device is therefore made
//! under a name that nobody waits for, given the alias, and only then renamed: whatever
//! instant the agent dies at, a link with one of our names and without the alias was made by
//! somebody else.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;

use gambeson_mesh::desired::{Implementation, LINK_ALIAS, LinkKind, Vxlan, VxlanLink};
use gambeson_mesh::mac::Mac;
use gambeson_mesh::session::DeviceName;
use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use nix::libc::{EADDRNOTAVAIL, EBUSY, EEXIST, ENODEV, EOPNOTSUPP};
use rtnetlink::{LinkUnspec, LinkVxlan, LinkWireguard};

use super::ApplyError;
use super::netlink::{Netlink, family_of};

/// Name prefix of a link that is being made.
const TEMPORARY_PREFIX: &str = "gmbtmp";

/// What matters of a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) index: u32,
    pub(crate) name: String,
    pub(crate) ours: bool,
    /// One of those that we make.
    pub(crate) kind: Option<LinkKind>,
    pub(crate) up: bool,
    pub(crate) loopback: bool,
    pub(crate) mtu: u32,
}

impl Link {
    pub(crate) fn parse(message: &LinkMessage) -> Self {
        let flags = message.header.flags;
        let mut link = Self {
            index: message.header.index,
            name: String::new(),
            ours: false,
            kind: None,
            up: flags.contains(LinkFlags::Up),
            loopback: flags.contains(LinkFlags::Loopback),
            mtu: 0,
        };
        let mac = message.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::Address(bytes) => Mac::from_bytes(bytes),
            _ => None,
        });
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name.clone_from(name),
                LinkAttribute::IfAlias(alias) => link.ours = alias == LINK_ALIAS,
                LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
                LinkAttribute::LinkInfo(infos) => link.kind = kind_of(infos, mac),
                _ => {}
            }
        }
        link
    }
}

fn kind_of(infos: &[LinkInfo], mac: Option<Mac>) -> Option<LinkKind> {
    infos.iter().find_map(|info| match info {
        LinkInfo::Kind(InfoKind::Wireguard) => Some(LinkKind::WireGuard(Implementation::Kernel)),
        LinkInfo::Kind(InfoKind::Tun) => Some(LinkKind::WireGuard(Implementation::Userspace)),
        LinkInfo::Data(InfoData::Vxlan(data)) => Some(LinkKind::Vxlan(vxlan_of(data, mac?))),
        _ => None,
    })
}

fn vxlan_of(data: &[InfoVxlan], mac: Mac) -> VxlanLink {
    let vxlan = Vxlan { vni: 0, port: 0, learning: false, gbp: false };
    let mut link = VxlanLink { vxlan, local: IpAddr::from([0; 4]), underlay: 0, mac };
    for attribute in data {
        match attribute {
            InfoVxlan::Id(vni) => link.vxlan.vni = *vni,
            InfoVxlan::Port(port) => link.vxlan.port = *port,
            InfoVxlan::Local(v4) => link.local = (*v4).into(),
            InfoVxlan::Local6(v6) => link.local = (*v6).into(),
            InfoVxlan::Link(index) => link.underlay = *index,
            InfoVxlan::Learning(learning) => link.vxlan.learning = *learning,
            InfoVxlan::Gbp => link.vxlan.gbp = true,
            _ => {}
        }
    }
    link
}

/// The link with this name, if there is one.
pub(crate) async fn find(netlink: &mut Netlink, name: &str) -> Result<Option<Link>, ApplyError> {
    let request = RouteNetlinkMessage::GetLink(LinkUnspec::new_with_name(name).build());
    match netlink.get(request).await {
        Ok(RouteNetlinkMessage::NewLink(message)) => Ok(Some(Link::parse(&message))),
        Ok(_) => Ok(None),
        Err(error) if error.raw_os_error() == Some(ENODEV) => Ok(None),
        Err(source) => Err(ApplyError::ReadLink { name: name.to_owned(), source }),
    }
}

/// Name of the link with this index, or the index where it is gone.
pub(super) async fn name(netlink: &mut Netlink, index: u32) -> Result<String, ApplyError> {
    let request = RouteNetlinkMessage::GetLink(LinkUnspec::new_with_index(index).build());
    match netlink.get(request).await {
        Ok(RouteNetlinkMessage::NewLink(message)) => Ok(Link::parse(&message).name),
        Err(error) if error.raw_os_error() != Some(ENODEV) => {
            Err(ApplyError::ReadLink { name: index.to_string(), source: error })
        }
        _ => Ok(index.to_string()),
    }
}

/// All links.
pub(crate) async fn all(netlink: &mut Netlink) -> Result<Vec<Link>, ApplyError> {
    let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
    let replies = netlink
        .dump(request)
        .await
        .map_err(|source| ApplyError::ReadLink { name: "list".to_owned(), source })?;
    let links = replies.into_iter().filter_map(|reply| match reply {
        RouteNetlinkMessage::NewLink(message) => Some(Link::parse(&message)),
        _ => None,
    });
    Ok(links.collect())
}

/// A link of ours, which must exist.
pub(super) async fn ours(netlink: &mut Netlink, device: DeviceName) -> Result<Link, ApplyError> {
    match find(netlink, device.as_str()).await? {
        Some(link) if link.ours => Ok(link),
        Some(_) => Err(ApplyError::ForeignLink { device }),
        None => Err(ApplyError::LinkGone { device }),
    }
}

/// Makes a kernel WireGuard link: down, without configuration, with our alias.
pub(super) async fn add_kernel(
    netlink: &mut Netlink,
    device: DeviceName,
    mtu: u32,
) -> Result<(), ApplyError> {
    let name = temporary_name();
    let create = LinkWireguard::new(&name).mtu(mtu).build();
    add(netlink, device, &name, create).await.map_err(|error| match error {
        ApplyError::AddLink { device, source } if is(&source, EOPNOTSUPP) => {
            ApplyError::NoWireGuard { device, source }
        }
        other => other,
    })
}

/// Makes a VXLAN link: down, with empty tables and our alias.
pub(super) async fn add_vxlan(
    netlink: &mut Netlink,
    device: DeviceName,
    link: &VxlanLink,
    mtu: u32,
) -> Result<(), ApplyError> {
    let Vxlan { vni, port, learning, gbp } = link.vxlan;
    let name = temporary_name();
    let create = LinkVxlan::new(&name, vni)
        .port(port)
        .dev(link.underlay)
        .learning(learning)
        .address(link.mac.octets().to_vec())
        .mtu(mtu);
    let create = match link.local {
        IpAddr::V4(v4) => create.local(v4),
        IpAddr::V6(v6) => create.local6(v6),
    };
    let create = if gbp { create.append_info_data(InfoVxlan::Gbp) } else { create };
    add(netlink, device, &name, create.build()).await.map_err(|error| match error {
        ApplyError::AddLink { device, source } if is(&source, EEXIST) => {
            ApplyError::VniTaken { device, vni, port, source }
        }
        ApplyError::AddLink { device, source } if is(&source, EOPNOTSUPP) => {
            ApplyError::NoVxlan { device, source }
        }
        other => other,
    })
}

fn is(error: &io::Error, errno: i32) -> bool {
    error.raw_os_error() == Some(errno)
}

/// Makes a link under its temporary name, marks it, and gives it its own.
async fn add(
    netlink: &mut Netlink,
    device: DeviceName,
    name: &str,
    create: LinkMessage,
) -> Result<(), ApplyError> {
    delete_abandoned(netlink, device).await?;
    let flags = NLM_F_CREATE | NLM_F_EXCL;
    let created = netlink.change(RouteNetlinkMessage::NewLink(create), flags).await;
    created.map_err(|source| ApplyError::AddLink { device, source })?;
    let Some(link) = find(netlink, name).await? else {
        return Err(ApplyError::LinkGone { device });
    };
    let result = publish(netlink, link.index, device).await;
    if result.is_err() {
        delete_index(netlink, link.index)
            .await
            .map_err(|source| ApplyError::DeleteLink { device, source })?;
    }
    result
}

/// Removes links with our alias that an agent left behind between alias and name.
async fn delete_abandoned(netlink: &mut Netlink, device: DeviceName) -> Result<(), ApplyError> {
    let abandoned = |link: &Link| link.ours && link.name.starts_with(TEMPORARY_PREFIX);
    for link in all(netlink).await?.into_iter().filter(abandoned) {
        delete_index(netlink, link.index)
            .await
            .map_err(|source| ApplyError::DeleteLink { device, source })?;
    }
    Ok(())
}

async fn publish(netlink: &mut Netlink, index: u32, device: DeviceName) -> Result<(), ApplyError> {
    let steps = [
        LinkUnspec::new_with_index(index).alias(LINK_ALIAS).build(),
        LinkUnspec::new_with_index(index).name(device.as_str()).build(),
    ];
    for step in steps {
        netlink.change(RouteNetlinkMessage::SetLink(step), 0).await.map_err(
            |source| match source.raw_os_error() {
                Some(EEXIST) => ApplyError::ForeignLink { device },
                _ => ApplyError::AddLink { device, source },
            },
        )?;
    }
    Ok(())
}

/// Whether this kernel makes links of type `wireguard` and we may.
pub(super) async fn can_add_kernel(netlink: &mut Netlink) -> bool {
    let name = temporary_name();
    let create = RouteNetlinkMessage::NewLink(LinkWireguard::new(&name).build());
    if let Err(error) = netlink.change(create, NLM_F_CREATE | NLM_F_EXCL).await {
        tracing::debug!(%error, "no link of type wireguard can be made");
        return false;
    }
    let deleted = match find(netlink, &name).await {
        Ok(Some(link)) => delete_index(netlink, link.index).await,
        _ => Ok(()),
    };
    if let Err(error) = deleted {
        tracing::warn!(%error, link = name, "a link made to try the kernel out stays behind");
    }
    true
}

/// Gives a link its alias back, which is known to be ours in another way.
pub(super) async fn mark(netlink: &mut Netlink, device: DeviceName) -> Result<(), ApplyError> {
    match find(netlink, device.as_str()).await? {
        Some(link) if link.ours => Ok(()),
        Some(link) => set_alias(netlink, device, link.index).await,
        None => Err(ApplyError::LinkGone { device }),
    }
}

/// Makes somebody else's link ours, by mark and name. From Linux 6.2 on it need not go down.
pub(super) async fn take_over(
    netlink: &mut Netlink,
    device: DeviceName,
    index: u32,
) -> Result<(), ApplyError> {
    set_alias(netlink, device, index).await?;
    rename(netlink, device, index, device.as_str()).await
}

/// Takes our mark from a link, and gives it another name.
pub(super) async fn give_away(
    netlink: &mut Netlink,
    device: DeviceName,
    index: u32,
    name: &str,
) -> Result<(), ApplyError> {
    let unmark = LinkUnspec::new_with_index(index).alias("").build();
    let unmarked = netlink.change(RouteNetlinkMessage::SetLink(unmark), 0).await;
    unmarked.map_err(|source| ApplyError::MarkLink { device, source })?;
    rename(netlink, device, index, name).await
}

async fn rename(
    netlink: &mut Netlink,
    device: DeviceName,
    index: u32,
    name: &str,
) -> Result<(), ApplyError> {
    let rename = || LinkUnspec::new_with_index(index).name(name);
    let failed = |source| ApplyError::Rename { device, name: name.to_owned(), source };
    match netlink.change(RouteNetlinkMessage::SetLink(rename().build()), 0).await {
        Err(error) if error.raw_os_error() == Some(EBUSY) => {
            let down = LinkUnspec::new_with_index(index).down().build();
            netlink.change(RouteNetlinkMessage::SetLink(down), 0).await.map_err(failed)?;
            let up = rename().up().build();
            netlink.change(RouteNetlinkMessage::SetLink(up), 0).await.map_err(failed)
        }
        result => result.map_err(failed),
    }
}

/// Removes a link that is not ours. One that is gone already is success.
pub(super) async fn delete_foreign(netlink: &mut Netlink, link: &Link) -> Result<(), ApplyError> {
    let deleted = delete_index(netlink, link.index).await;
    deleted.map_err(|source| ApplyError::DeleteForeign { name: link.name.clone(), source })
}

async fn set_alias(
    netlink: &mut Netlink,
    device: DeviceName,
    index: u32,
) -> Result<(), ApplyError> {
    let message = LinkUnspec::new_with_index(index).alias(LINK_ALIAS).build();
    netlink
        .change(RouteNetlinkMessage::SetLink(message), 0)
        .await
        .map_err(|source| ApplyError::MarkLink { device, source })
}

/// Removes a link of ours. One that is gone already is success.
pub(super) async fn delete(netlink: &mut Netlink, device: DeviceName) -> Result<(), ApplyError> {
    match ours(netlink, device).await {
        Ok(link) => delete_index(netlink, link.index)
            .await
            .map_err(|source| ApplyError::DeleteLink { device, source }),
        Err(ApplyError::LinkGone { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

async fn delete_index(netlink: &mut Netlink, index: u32) -> io::Result<()> {
    let message = LinkUnspec::new_with_index(index).build();
    match netlink.change(RouteNetlinkMessage::DelLink(message), 0).await {
        Err(error) if error.raw_os_error() == Some(ENODEV) => Ok(()),
        result => result,
    }
}

/// Sets the MTU, in bytes.
pub(super) async fn set_mtu(
    netlink: &mut Netlink,
    device: DeviceName,
    mtu: u32,
) -> Result<(), ApplyError> {
    let index = ours(netlink, device).await?.index;
    let message = LinkUnspec::new_with_index(index).mtu(mtu).build();
    netlink
        .change(RouteNetlinkMessage::SetLink(message), 0)
        .await
        .map_err(|source| ApplyError::SetMtu { device, mtu, source })
}

/// Brings a link up.
pub(super) async fn set_up(netlink: &mut Netlink, device: DeviceName) -> Result<(), ApplyError> {
    let index = ours(netlink, device).await?.index;
    let message = LinkUnspec::new_with_index(index).up().build();
    netlink
        .change(RouteNetlinkMessage::SetLink(message), 0)
        .await
        .map_err(|source| ApplyError::SetUp { device, source })
}

/// Marks a kernel device as ours when it is not the one with index `before` any more.
/// Configuring a WireGuard device makes the link if it went a moment ago, without our alias.
pub(super) async fn adopt(
    netlink: &mut Netlink,
    device: DeviceName,
    before: u32,
) -> Result<(), ApplyError> {
    let Some(link) = find(netlink, device.as_str()).await? else { return Ok(()) };
    if link.index == before || link.ours {
        return Ok(());
    }
    set_alias(netlink, device, link.index).await
}

/// An address as the kernel has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Address {
    pub(crate) index: u32,
    pub(crate) address: IpNet,
    pub(crate) scope: AddressScope,
    pub(crate) flags: AddressFlags,
}

/// Addresses of the link with this index, or of all links for 0.
pub(crate) async fn addresses(netlink: &mut Netlink, index: u32) -> io::Result<Vec<Address>> {
    let mut request = AddressMessage::default();
    request.header.index = index;
    let replies = match netlink.dump(RouteNetlinkMessage::GetAddress(request)).await {
        // The link went meanwhile, and its addresses with it.
        Err(error) if error.raw_os_error() == Some(ENODEV) => Vec::new(),
        result => result?,
    };
    Ok(replies
        .into_iter()
        .filter_map(|reply| match reply {
            RouteNetlinkMessage::NewAddress(message) => address_of(&message),
            _ => None,
        })
        .filter(|address| index == 0 || address.index == index)
        .collect())
}

/// Addresses of a device without link-local ones.
pub(super) async fn device_addresses(
    netlink: &mut Netlink,
    link: &Link,
) -> Result<BTreeSet<IpNet>, ApplyError> {
    let found = addresses(netlink, link.index)
        .await
        .map_err(|source| ApplyError::ReadAddresses { link: link.name.clone(), source })?;
    Ok(found.into_iter().map(|a| a.address).filter(|a| !is_link_local(a.addr())).collect())
}

pub(crate) fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

/// Adds an address. One that is there already is success.
pub(super) async fn add_address(
    netlink: &mut Netlink,
    device: DeviceName,
    address: IpNet,
) -> Result<(), ApplyError> {
    let index = ours(netlink, device).await?.index;
    let message = RouteNetlinkMessage::NewAddress(address_message(index, address));
    match netlink.change(message, NLM_F_CREATE | NLM_F_EXCL).await {
        Err(error) if error.raw_os_error() == Some(EEXIST) => Ok(()),
        result => result.map_err(|source| ApplyError::AddAddress { device, address, source }),
    }
}

/// Removes an address. One that is gone already is success.
pub(super) async fn delete_address(
    netlink: &mut Netlink,
    device: DeviceName,
    address: IpNet,
) -> Result<(), ApplyError> {
    let index = ours(netlink, device).await?.index;
    let message = RouteNetlinkMessage::DelAddress(address_message(index, address));
    match netlink.change(message, 0).await {
        Err(error) if error.raw_os_error() == Some(EADDRNOTAVAIL) => Ok(()),
        result => result.map_err(|source| ApplyError::DeleteAddress { device, address, source }),
    }
}

fn address_message(index: u32, address: IpNet) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.index = index;
    message.header.prefix_len = address.prefix_len();
    message.header.family = family_of(address.addr());
    if address.addr().is_ipv6() {
        // Nobody else answers on a point-to-point device: usable at once, not a second later.
        message.header.flags = AddressHeaderFlags::Nodad;
    }
    message.attributes.push(AddressAttribute::Local(address.addr()));
    message.attributes.push(AddressAttribute::Address(address.addr()));
    message
}

fn address_of(message: &AddressMessage) -> Option<Address> {
    let mut local = None;
    let mut peer = None;
    let mut flags = AddressFlags::from_bits_retain(message.header.flags.bits().into());
    for attribute in &message.attributes {
        match attribute {
            // With a point-to-point IPv4 address, `Address` is the other end.
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => peer = Some(*ip),
            AddressAttribute::Flags(all) => flags = *all,
            _ => {}
        }
    }
    let address = IpNet::new(local.or(peer)?, message.header.prefix_len).ok()?;
    Some(Address { index: message.header.index, address, scope: message.header.scope, flags })
}

/// A link name that is not in use, within the 15 bytes that the kernel allows.
fn temporary_name() -> String {
    format!("{TEMPORARY_PREFIX}{:08x}", rand::random::<u32>())
}
