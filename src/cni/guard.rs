//! Whether the guard of this boot is in the kernel: the one condition for a pod to get a
//! network. Asked of nf_tables itself, since a host may have no program `nft`.

use std::io;
use std::thread::sleep;
use std::time::{Duration, Instant};

use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};

use super::CniError;
use crate::apply::GUARD_CHAIN;
use crate::apply::nfnetlink::{INET, errno, is, request};

/// A guard that somebody took away is back within a second.
const PATIENCE: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(50);
/// The guard's table.
const TABLE: &str = "gambeson";

/// `NFT_MSG_NEWCHAIN` and `NFT_MSG_GETCHAIN` of linux/netfilter/nf_tables.h.
const NEW_CHAIN: u8 = 3;
const GET_CHAIN: u8 = 4;
/// `NFTA_CHAIN_TABLE` and `NFTA_CHAIN_NAME`.
const CHAIN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;

/// Waits a little for it.
pub(super) fn require() -> Result<(), CniError> {
    let end = Instant::now() + PATIENCE;
    loop {
        match chain_is_there() {
            Ok(true) => return Ok(()),
            Ok(false) if Instant::now() < end => sleep(PAUSE),
            Ok(false) => return Err(CniError::NoGuard),
            Err(source) => return Err(CniError::UnknownGuard(source)),
        }
    }
}

fn chain_is_there() -> io::Result<bool> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    socket
        .send(&request(GET_CHAIN, INET, &[(CHAIN_TABLE, TABLE), (CHAIN_NAME, GUARD_CHAIN)]), 0)?;
    let (reply, _) = socket.recv_from_full()?;
    match errno(&reply) {
        None if is(&reply, NEW_CHAIN) => Ok(true),
        None => Err(io::Error::new(io::ErrorKind::InvalidData, "no chain of the nftables ruleset")),
        Some(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Some(error) => Err(error),
    }
}
