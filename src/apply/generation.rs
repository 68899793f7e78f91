//! The generation number of a namespace's nftables ruleset.
//!
//! The kernel counts every transaction. While the number stays, nobody changed anything, and
//! the program `nft`, which takes some ten milliseconds, need not be asked.

use std::io;

use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket};

use super::netlink::{attributes, split_message};

/// Subsystem nftables, of linux/netfilter/nfnetlink.h, as it stands in a message's type.
pub(super) const NFTABLES: u8 = 10;
/// `NFT_MSG_NEWGEN` and `NFT_MSG_GETGEN` of linux/netfilter/nf_tables.h.
const NEW_GENERATION: u8 = 15;
const GET_GENERATION: u8 = 16;
/// `NFTA_GEN_ID`.
const GENERATION_ID: u16 = 1;
const NETLINK_HEADER_BYTES: usize = 16;
/// A netlink header and the `nfgenmsg` that follows it.
pub(super) const HEADER_BYTES: usize = NETLINK_HEADER_BYTES + 4;
/// Type of a message that carries an errno.
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u8 = 1;

/// Reads the number.
pub(super) async fn read() -> io::Result<u32> {
    let mut socket = TokioSocket::new(NETLINK_NETFILTER)?;
    socket.socket_mut().bind_auto()?;
    socket.socket_ref().connect(&SocketAddr::new(0, 0))?;
    let mut request = [0_u8; HEADER_BYTES];
    request[..4].copy_from_slice(&(HEADER_BYTES as u32).to_ne_bytes());
    request[4..6].copy_from_slice(&message_type(GET_GENERATION).to_ne_bytes());
    request[6..8].copy_from_slice(&u16::from(NLM_F_REQUEST).to_ne_bytes());
    socket.send(&request).await?;
    let mut reply = Vec::with_capacity(1024);
    socket.recv(&mut reply).await?;
    if let Some(refused) = errno(&reply) {
        return Err(refused);
    }
    parse(&reply).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, "no generation of the nftables ruleset")
    })
}

/// What the kernel refused the question with.
fn errno(reply: &[u8]) -> Option<io::Error> {
    let (message, _) = split_message(reply)?;
    let code = i32::from_ne_bytes(*message.get(NETLINK_HEADER_BYTES..)?.first_chunk()?);
    let is_error = *message.get(4..6)? == NLMSG_ERROR.to_ne_bytes() && code < 0;
    is_error.then(|| io::Error::from_raw_os_error(code.saturating_neg()))
}

fn parse(reply: &[u8]) -> Option<u32> {
    let (message, _) = split_message(reply)?;
    if *message.get(4..6)? != message_type(NEW_GENERATION).to_ne_bytes() {
        return None;
    }
    let (_, value) =
        attributes(message.get(HEADER_BYTES..)?).find(|(kind, _)| *kind == GENERATION_ID)?;
    Some(u32::from_be_bytes(value.try_into().ok()?))
}

fn message_type(message: u8) -> u16 {
    u16::from(NFTABLES) << 8 | u16::from(message)
}
