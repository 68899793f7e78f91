//! Where a peer is, and from which of our addresses we talk to it.

use std::net::{IpAddr, SocketAddr};

/// A peer's address and port, with the address of ours that it sent to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Endpoint {
    /// The peer's underlay address and port.
    pub address: SocketAddr,
    /// Replies leave from here; `None` lets the kernel choose.
    pub source: Option<Source>,
}

/// An address of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Source {
    /// The address.
    pub ip: IpAddr,
    /// Index of the interface that the peer's message came in by. Only a link-local address
    /// ties the route to it; others are let go of when the route leads elsewhere.
    pub interface: u32,
}

impl Endpoint {
    /// `address`, reached from whatever source the kernel chooses. An IPv4 address in IPv6
    /// form becomes IPv4.
    pub fn new(address: SocketAddr) -> Self {
        let address = match address {
            SocketAddr::V6(v6) => match v6.ip().to_ipv4_mapped() {
                Some(ip) => SocketAddr::from((ip, v6.port())),
                None => address,
            },
            SocketAddr::V4(_) => address,
        };
        Self { address, source: None }
    }
}

impl Source {
    /// This address, on this interface.
    pub fn new(ip: IpAddr, interface: u32) -> Self {
        Self { ip, interface }
    }

    /// The interface that datagrams have to leave by, 0 for any.
    pub(crate) fn scope(&self) -> u32 {
        match self.ip {
            IpAddr::V6(ip) if ip.is_unicast_link_local() => self.interface,
            _ => 0,
        }
    }
}
