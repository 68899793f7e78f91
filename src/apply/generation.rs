//! The generation number of a namespace's nftables ruleset.
//!
//! The kernel counts every transaction. While the number stays, nobody changed anything, and
//! the program `nft`, which takes some ten milliseconds, need not be asked.

use std::io;

use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket};

use super::netlink::{attributes, split_message};
use super::nfnetlink::{HEADER_BYTES, errno, is, request};

/// `NFT_MSG_NEWGEN` and `NFT_MSG_GETGEN` of linux/netfilter/nf_tables.h.
const NEW_GENERATION: u8 = 15;
const GET_GENERATION: u8 = 16;
/// `NFTA_GEN_ID`.
const GENERATION_ID: u16 = 1;
/// `NFPROTO_UNSPEC`: the number is of all families.
const UNSPECIFIED: u8 = 0;

/// Reads the number.
pub(super) async fn read() -> io::Result<u32> {
    let mut socket = TokioSocket::new(NETLINK_NETFILTER)?;
    socket.socket_mut().bind_auto()?;
    socket.socket_ref().connect(&SocketAddr::new(0, 0))?;
    let request = request(GET_GENERATION, UNSPECIFIED, &[]);
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

fn parse(reply: &[u8]) -> Option<u32> {
    let (message, _) = split_message(reply).filter(|_| is(reply, NEW_GENERATION))?;
    let (_, value) =
        attributes(message.get(HEADER_BYTES..)?).find(|(kind, _)| *kind == GENERATION_ID)?;
    Some(u32::from_be_bytes(value.try_into().ok()?))
}
