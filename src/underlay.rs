//! `options + links, addresses and routes of this node -> Underlay`: the interface that
//! encrypted packets leave through, and the addresses that other nodes send to.
//!
//! The choice follows Flannel's options of the same names (flannel.md): an interface by name
//! or address, by pattern, by a destination that it reaches, or that of the default route.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use gambeson_mesh::node::Endpoints;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressFlags, AddressScope};
use netlink_packet_route::route::{RouteAttribute, RouteMessage, RouteProtocol, RouteType};
use regex::Regex;

use crate::apply::ApplyError;
use crate::apply::link::{self, Address, Link};
use crate::apply::netlink::Netlink;
use crate::apply::route;

/// The interface that carries encrypted packets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Underlay {
    /// Interface name.
    pub name: String,
    /// Interface index.
    pub index: u32,
    /// Interface MTU in bytes.
    pub mtu: u32,
    /// Addresses that other nodes send to; at least one.
    pub endpoints: Endpoints,
    /// Addresses of the interface, which behind NAT are others.
    pub addresses: Endpoints,
}

/// How an operator chooses the interface. All empty: by the default route.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Choice {
    /// `--iface`: interface names or addresses, the first that exists is taken.
    pub iface: Vec<String>,
    /// `--iface-regex`: patterns for an address or a name, tried after `iface`.
    pub iface_regex: Vec<String>,
    /// `--iface-can-reach`: the interface that packets to this address leave through.
    pub iface_can_reach: Option<IpAddr>,
    /// `--public-ip`: published in place of the interface's IPv4 address.
    pub public_ip: Option<Ipv4Addr>,
    /// `--public-ipv6`: published in place of the interface's IPv6 address.
    pub public_ipv6: Option<Ipv6Addr>,
}

/// Families that may be published as endpoints. One that the interface lacks is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Families {
    /// IPv4.
    pub v4: bool,
    /// IPv6.
    pub v6: bool,
}

impl Default for Families {
    fn default() -> Self {
        Self { v4: true, v6: true }
    }
}

/// Why no interface could be chosen.
#[expect(missing_docs, reason = "fields are named by their types")]
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UnderlayError {
    /// The kernel could not be read.
    #[error("cannot read the interfaces of this node")]
    Read(#[from] ApplyError),
    /// No interface has one of the names or addresses.
    #[error("no interface is or has {wanted} (--iface); there are: {present}")]
    NoInterface { wanted: String, present: String },
    /// A pattern is not a regular expression.
    #[error("--iface-regex {pattern:?} is not a regular expression")]
    Pattern { pattern: String, source: regex::Error },
    /// No interface matches.
    #[error(
        "no address or name of an interface matches {wanted} (--iface-regex); there are: {present}"
    )]
    NoMatch { wanted: String, present: String },
    /// There is no route.
    #[error("no interface reaches {address} (--iface-can-reach); there are: {present}")]
    NoRoute { address: IpAddr, present: String },
    /// Neither family has a default route.
    #[error(
        "this node has no default route that tells which interface to use; name it with --iface; \
         there are: {present}"
    )]
    NoDefaultRoute { present: String },
    /// The interface has nothing to publish.
    #[error(
        "interface {name} has no {families} address that other nodes could send to; give it one, \
         choose another interface with --iface, or publish one with --public-ip; there are: \
         {present}"
    )]
    NoAddress { name: String, families: &'static str, present: String },
}

/// Chooses the interface and its addresses as they are now. Call it again to follow a
/// changed address, MTU or default route.
///
/// # Errors
/// [`UnderlayError`]; it lists the interfaces that there are.
pub async fn pick(choice: &Choice, families: Families) -> Result<Underlay, UnderlayError> {
    let mut netlink = Netlink::connect().map_err(|source| ApplyError::Connect { source })?;
    let node = Interfaces::read(&mut netlink).await?;
    let Found { interface, prefer } = node.find(&mut netlink, choice, families).await?;
    let mut addresses = Endpoints::default();
    for address in interface.candidates(prefer) {
        match address {
            IpAddr::V4(v4) if families.v4 => addresses.v4 = addresses.v4.or(Some(v4)),
            IpAddr::V6(v6) if families.v6 => addresses.v6 = addresses.v6.or(Some(v6)),
            _ => {}
        }
    }
    let endpoints = Endpoints {
        v4: choice.public_ip.or(addresses.v4),
        v6: choice.public_ipv6.or(addresses.v6),
    };
    let Link { name, index, mtu, .. } = interface.link.clone();
    if endpoints == Endpoints::default() {
        let families = match families {
            Families { v4: true, v6: true } => "global IPv4 or IPv6",
            Families { v4: false, .. } => "global IPv6",
            Families { v6: false, .. } => "global IPv4",
        };
        return Err(UnderlayError::NoAddress { name, families, present: node.to_string() });
    }
    Ok(Underlay { name, index, mtu, endpoints, addresses })
}

/// The chosen interface, and the address that chose it.
struct Found<'a> {
    interface: &'a Interface,
    prefer: Option<IpAddr>,
}

struct Interface {
    link: Link,
    addresses: Vec<Address>,
}

impl Interface {
    fn has(&self, address: IpAddr) -> bool {
        self.addresses.iter().any(|a| a.address.addr() == address)
    }

    /// Usable addresses, best first: the preferred one, then those of a subnet rather than
    /// lone ones (virtual addresses of load balancers), permanent ones, the oldest.
    fn candidates(&self, prefer: Option<IpAddr>) -> Vec<IpAddr> {
        let mut usable: Vec<_> =
            self.addresses.iter().enumerate().filter(|(_, a)| is_usable(a)).collect();
        usable.sort_by_key(|(position, a)| {
            let flags = a.flags;
            let ip = a.address.addr();
            // The kernel lists the oldest IPv4 address and the newest IPv6 address first.
            let age = if ip.is_ipv6() { usize::MAX - position } else { *position };
            (
                Some(ip) != prefer,
                flags.contains(AddressFlags::Secondary),
                a.address.prefix_len() == a.address.max_prefix_len(),
                !flags.contains(AddressFlags::Permanent),
                age,
            )
        });
        usable.into_iter().map(|(_, a)| a.address.addr()).collect()
    }
}

/// Global, settled and there to stay.
fn is_usable(address: &Address) -> bool {
    let unfit = AddressFlags::Deprecated | AddressFlags::Dadfailed | AddressFlags::Tentative;
    let ip = address.address.addr();
    // For IPv6 the flag means a temporary privacy address.
    let temporary = ip.is_ipv6() && address.flags.contains(AddressFlags::Secondary);
    address.scope == AddressScope::Universe
        && !address.flags.intersects(unfit)
        && !temporary
        && !link::is_link_local(ip)
        && !ip.is_loopback()
        && !ip.is_multicast()
        && !ip.is_unspecified()
}

/// Interfaces that can be an underlay: neither loopback nor our own devices.
struct Interfaces(Vec<Interface>);

impl Interfaces {
    async fn read(netlink: &mut Netlink) -> Result<Self, ApplyError> {
        let links: Vec<_> = link::all(netlink)
            .await?
            .into_iter()
            .filter(|link| !link.loopback && !link.ours)
            .collect();
        let all = link::addresses(netlink, 0).await.map_err(|source| {
            ApplyError::ReadAddresses { link: "all interfaces".to_owned(), source }
        })?;
        let of = |index| all.iter().filter(|a| a.index == index).cloned().collect();
        let interfaces = links.into_iter().map(|l| Interface { addresses: of(l.index), link: l });
        Ok(Self(interfaces.collect()))
    }

    async fn find(
        &self,
        netlink: &mut Netlink,
        choice: &Choice,
        families: Families,
    ) -> Result<Found<'_>, UnderlayError> {
        let by_name = choice.iface.iter().find_map(|wanted| self.named(wanted));
        if let Some(found) = by_name {
            return Ok(found);
        }
        for pattern in &choice.iface_regex {
            if let Some(found) = self.matching(pattern)? {
                return Ok(found);
            }
        }
        if !choice.iface_regex.is_empty() {
            let wanted = choice.iface_regex.join(" or ");
            return Err(UnderlayError::NoMatch { wanted, present: self.to_string() });
        }
        if !choice.iface.is_empty() {
            let wanted = choice.iface.join(" or ");
            return Err(UnderlayError::NoInterface { wanted, present: self.to_string() });
        }
        match choice.iface_can_reach {
            Some(address) => self.reaching(netlink, address).await,
            None => self.default_route(netlink, families).await,
        }
    }

    /// By name or address.
    fn named(&self, wanted: &str) -> Option<Found<'_>> {
        let prefer = wanted.parse::<IpAddr>().ok();
        let interface = self.0.iter().find(|interface| match prefer {
            Some(address) => interface.has(address),
            None => interface.link.name == wanted,
        })?;
        Some(Found { interface, prefer })
    }

    /// By a pattern: for any address of an interface first, then for its name, as Flannel does.
    fn matching(&self, pattern: &str) -> Result<Option<Found<'_>>, UnderlayError> {
        let regex = Regex::new(pattern)
            .map_err(|source| UnderlayError::Pattern { pattern: pattern.to_owned(), source })?;
        for interface in &self.0 {
            let matched = |ip: &IpAddr| regex.is_match(&ip.to_string());
            if let Some(prefer) = interface.candidates(None).into_iter().find(matched) {
                return Ok(Some(Found { interface, prefer: Some(prefer) }));
            }
        }
        // One without an address cannot be meant while there is one that has some.
        let named = self.0.iter().filter(|interface| regex.is_match(&interface.link.name));
        let best = named.min_by_key(|interface| interface.candidates(None).is_empty());
        Ok(best.map(|interface| Found { interface, prefer: None }))
    }

    /// By the kernel's own choice for a destination.
    async fn reaching(
        &self,
        netlink: &mut Netlink,
        address: IpAddr,
    ) -> Result<Found<'_>, UnderlayError> {
        if let Some(interface) = self.0.iter().find(|interface| interface.has(address)) {
            return Ok(Found { interface, prefer: Some(address) });
        }
        let route = route::lookup(netlink, address).await;
        let found = route.and_then(|route| self.of_route(&route));
        found.ok_or_else(|| UnderlayError::NoRoute { address, present: self.to_string() })
    }

    /// By the default route with the lowest metric, IPv4 before IPv6.
    async fn default_route(
        &self,
        netlink: &mut Netlink,
        families: Families,
    ) -> Result<Found<'_>, UnderlayError> {
        let wanted = [(families.v4, AddressFamily::Inet), (families.v6, AddressFamily::Inet6)];
        for (_, family) in wanted.into_iter().filter(|(wanted, _)| *wanted) {
            let routes = route::dump(netlink, family, RouteProtocol::Unspec).await?;
            let best = routes
                .iter()
                .filter_map(|message| {
                    let key = route::key_of(message).filter(|k| k.destination.prefix_len() == 0)?;
                    Some((key.metric, self.of_route(message)?))
                })
                .min_by_key(|(metric, _)| *metric);
            if let Some((_, found)) = best {
                return Ok(found);
            }
        }
        Err(UnderlayError::NoDefaultRoute { present: self.to_string() })
    }

    fn of_route(&self, message: &RouteMessage) -> Option<Found<'_>> {
        if message.header.kind != RouteType::Unicast {
            return None;
        }
        let mut index = None;
        let mut prefer = None;
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Oif(oif) => index = Some(*oif),
                RouteAttribute::MultiPath(hops) => {
                    index = index.or(hops.first().map(|hop| hop.interface_index));
                }
                RouteAttribute::PrefSource(address) => prefer = route::ip_of(address),
                _ => {}
            }
        }
        let interface = self.0.iter().find(|i| Some(i.link.index) == index)?;
        Some(Found { interface, prefer })
    }
}

/// `eth0 (192.0.2.1, 2001:db8::1), eth1 (no address)`.
impl std::fmt::Display for Interfaces {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // A node may have hundreds of pods: links without an address are theirs.
        let mut text = String::new();
        for interface in self.0.iter().filter(|i| i.link.up && !i.candidates(None).is_empty()) {
            let addresses: Vec<_> =
                interface.candidates(None).iter().map(ToString::to_string).collect();
            let separator = if text.is_empty() { "" } else { ", " };
            write!(text, "{separator}{} ({})", interface.link.name, addresses.join(", "))?;
        }
        f.write_str(if text.is_empty() { "none that is up and has an address" } else { &text })
    }
}
