//! Kernel events, reduced to "look again".

use std::ffi::CStr;
use std::io;

use gambeson_mesh::family::Family;
use gambeson_mesh::session::DeviceName;
use netlink_sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use netlink_sys::{AsyncSocket, AsyncSocketExt, TokioSocket};
use nix::libc::{
    ENOBUFS, RT_TABLE_MAIN, RTM_DELNEIGH, RTM_DELROUTE, RTM_NEWNEIGH, RTM_NEWROUTE,
    RTNLGRP_IPV4_IFADDR, RTNLGRP_IPV4_NETCONF, RTNLGRP_IPV4_ROUTE, RTNLGRP_IPV4_RULE,
    RTNLGRP_IPV6_IFADDR, RTNLGRP_IPV6_NETCONF, RTNLGRP_IPV6_ROUTE, RTNLGRP_IPV6_RULE, RTNLGRP_LINK,
    RTNLGRP_NEIGH,
};
use nix::net::if_::if_nametoindex;

use super::netlink::{attributes, split_message};
use super::{ApplyError, nfnetlink};

/// `NFNLGRP_NFTABLES` of linux/netfilter/nfnetlink.h.
const NFTABLES_GROUP: u32 = 7;
/// More than the kernel puts into one datagram.
const BUFFER_BYTES: usize = 64 << 10;
/// Place of `rtm_table` in a route message: after the netlink header and four bytes.
const RTM_TABLE: usize = 16 + 4;
/// Place of `ndm_ifindex` in a neighbour message: after the netlink header and four bytes.
const NDM_IFINDEX: std::ops::Range<usize> = 16 + 4..16 + 8;
/// The attribute that names the table, in every kind of nftables message.
const NFT_TABLE_NAME: u16 = 1;
/// `NFT_MSG_NEWCHAIN` of linux/netfilter/nf_tables.h, and the attribute that only base chains
/// have, whose policy may drop what pods send.
const NEW_CHAIN: u16 = 3;
const CHAIN_HOOK: u16 = 4;
/// The attribute of a rule that names its chain, and the chains of iptables-nft that matter.
const RULE_CHAIN: u16 = 2;
const FORWARD_CHAINS: [&CStr; 2] = [c"FORWARD", c"GAMBESON-FWD"];
const OUR_TABLE: &CStr = c"gambeson";

/// Changes of links, addresses, routes, neighbours, per-device settings and nftables in the network
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
            RTNLGRP_IPV4_RULE,
            RTNLGRP_IPV6_RULE,
            RTNLGRP_NEIGH,
        ];
        let route = join(NETLINK_ROUTE, &groups)
            .map_err(|source| ApplyError::Subscribe { what: "network", source })?;
        let nftables = join(NETLINK_NETFILTER, &[NFTABLES_GROUP])
            .map_err(|source| ApplyError::Subscribe { what: "nftables", source })?;
        Ok(Self { route, nftables })
    }

    /// Waits until something changed that may concern this node's mesh. Everything that has
    /// arrived by then counts as one change. Events that were lost because too many came at
    /// once count as well.
    ///
    /// # Errors
    /// [`ApplyError::Events`] when a socket cannot be read; subscribe again.
    pub async fn changed(&mut self) -> Result<(), ApplyError> {
        loop {
            let mut buffer = Vec::with_capacity(BUFFER_BYTES);
            let mut other = Vec::with_capacity(BUFFER_BYTES);
            let first = tokio::select! {
                result = self.route.recv(&mut buffer) => result,
                result = self.nftables.recv(&mut other) => result,
            };
            let mut concerned = concerns_us(first, &buffer)? | concerns_us(Ok(()), &other)?;
            for socket in [&self.route, &self.nftables] {
                concerned |= drain(socket)?;
            }
            if concerned {
                return Ok(());
            }
        }
    }
}

/// Takes what is queued, without waiting, and says whether any of it concerns us.
fn drain(socket: &TokioSocket) -> Result<bool, ApplyError> {
    let mut concerned = false;
    let mut buffer = Vec::with_capacity(BUFFER_BYTES);
    loop {
        buffer.clear();
        match socket.socket_ref().recv(&mut buffer, 0) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(concerned),
            result => concerned |= concerns_us(result.map(drop), &buffer)?,
        }
    }
}

/// Whether anything read may concern us: lost events do.
fn concerns_us(result: io::Result<()>, mut bytes: &[u8]) -> Result<bool, ApplyError> {
    match result {
        Err(error) if error.raw_os_error() == Some(ENOBUFS) => return Ok(true),
        result => result.map_err(|source| ApplyError::Events { source })?,
    }
    while let Some((message, rest)) = split_message(bytes) {
        if is_relevant(message) {
            return Ok(true);
        }
        bytes = rest;
    }
    Ok(false)
}

/// Leaves out what a busy node does all the time: rules in other tables of nftables (kube-proxy) and
/// of routes (routing daemons), neighbours of other links. Everything else is relevant.
fn is_relevant(message: &[u8]) -> bool {
    let kind = message.get(4..6).map_or(0, |b| u16::from_ne_bytes([b[0], b[1]]));
    match (kind, kind >> 8) {
        (RTM_NEWROUTE | RTM_DELROUTE, _) => {
            message.get(RTM_TABLE).is_none_or(|table| *table == RT_TABLE_MAIN)
        }
        (RTM_NEWNEIGH | RTM_DELNEIGH, _) => {
            let index = message.get(NDM_IFINDEX).and_then(|bytes| bytes.try_into().ok());
            index.is_none_or(|index| is_vxlan_of_ours(u32::from_ne_bytes(index)))
        }
        (_, subsystem) if subsystem == u16::from(nfnetlink::NFTABLES) => {
            let body = message.get(nfnetlink::HEADER_BYTES..).unwrap_or_default();
            let is_chain = kind & 0xff == NEW_CHAIN;
            attributes(body).any(|(kind, value)| {
                (kind == NFT_TABLE_NAME && value == OUR_TABLE.to_bytes_with_nul())
                    || (is_chain && kind == CHAIN_HOOK)
                    || (kind == RULE_CHAIN
                        && FORWARD_CHAINS.iter().any(|c| c.to_bytes_with_nul() == value))
            })
        }
        _ => true,
    }
}

/// By its name: whose it is, the pass that follows sees.
fn is_vxlan_of_ours(index: u32) -> bool {
    let devices = Family::ALL.into_iter().map(DeviceName::Vxlan);
    devices.into_iter().any(|device| if_nametoindex(device.as_str()) == Ok(index))
}

fn join(protocol: isize, groups: &[u32]) -> io::Result<TokioSocket> {
    let mut socket = TokioSocket::new(protocol)?;
    socket.socket_mut().bind_auto()?;
    for group in groups {
        socket.socket_mut().add_membership(*group)?;
    }
    Ok(socket)
}
