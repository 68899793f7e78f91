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
    /// Index of the interface that a link-local address is on, otherwise 0: other sources do
    /// not tie the route to an interface.
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
        let link_local = matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local());
        Self { ip, interface: if link_local { interface } else { 0 } }
    }
}
