//! Kernel events, reduced to "look again".

use std::io;

use netlink_sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use netlink_sys::{AsyncSocket, AsyncSocketExt, TokioSocket};
use nix::libc::{
    ENOBUFS, RTNLGRP_IPV4_IFADDR, RTNLGRP_IPV4_NETCONF, RTNLGRP_IPV4_ROUTE, RTNLGRP_IPV6_IFADDR,
    RTNLGRP_IPV6_NETCONF, RTNLGRP_IPV6_ROUTE, RTNLGRP_LINK,
};

use super::ApplyError;

/// `NFNLGRP_NFTABLES` of linux/netfilter/nfnetlink.h.
const NFTABLES_GROUP: u32 = 7;
const BUFFER_BYTES: usize = 64 << 10;

/// Changes of links, addresses, routes, per-device settings and nftables in the network
/// namespace of the thread that subscribed, whoever made them: ours come back too.
pub struct Events {
    route: TokioSocket,
    nftables: TokioSocket,
}

impl std::fmt::Debug for Events {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Events")
    }
}

impl Events {
    /// Joins the kernel's multicast groups. Must be called within a tokio runtime, and before
    /// the first observation, so that no change falls between the two.
    ///
    /// # Errors
    /// [`ApplyError::Subscribe`].
    pub fn subscribe() -> Result<Self, ApplyError> {
        let groups = [
            RTNLGRP_LINK,
            RTNLGRP_IPV4_IFADDR,
            RTNLGRP_IPV6_IFADDR,
            RTNLGRP_IPV4_ROUTE,
            RTNLGRP_IPV6_ROUTE,
            RTNLGRP_IPV4_NETCONF,
            RTNLGRP_IPV6_NETCONF,
        ];
        let route = join(NETLINK_ROUTE, &groups)
            .map_err(|source| ApplyError::Subscribe { what: "network", source })?;
        let nftables = join(NETLINK_NETFILTER, &[NFTABLES_GROUP])
            .map_err(|source| ApplyError::Subscribe { what: "nftables", source })?;
        Ok(Self { route, nftables })
    }

    /// Waits until something changed. Everything that has arrived by then counts as one
    /// change. Events that were lost because too many came at once count as well.
    ///
    /// # Errors
    /// [`ApplyError::Events`] when a socket cannot be read; subscribe again.
    pub async fn changed(&mut self) -> Result<(), ApplyError> {
        let (mut route, mut nftables) =
            (Vec::with_capacity(BUFFER_BYTES), Vec::with_capacity(BUFFER_BYTES));
        let first = tokio::select! {
            result = self.route.recv(&mut route) => result,
            result = self.nftables.recv(&mut nftables) => result,
        };
        read(first)?;
        for socket in [&self.route, &self.nftables] {
            drain(socket)?;
        }
        Ok(())
    }
}

/// Takes what is queued, without waiting.
fn drain(socket: &TokioSocket) -> Result<(), ApplyError> {
    let mut buffer = Vec::with_capacity(BUFFER_BYTES);
    loop {
        buffer.clear();
        match socket.socket_ref().recv(&mut buffer, 0) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            result => read(result.map(drop))?,
        }
    }
}

fn read(result: io::Result<()>) -> Result<(), ApplyError> {
    match result {
        Err(error) if error.raw_os_error() == Some(ENOBUFS) => Ok(()),
        result => result.map_err(|source| ApplyError::Events { source }),
    }
}

fn join(protocol: isize, groups: &[u32]) -> io::Result<TokioSocket> {
    let mut socket = TokioSocket::new(protocol)?;
    socket.socket_mut().bind_auto()?;
    for group in groups {
        socket.socket_mut().add_membership(*group)?;
    }
    Ok(socket)
}
