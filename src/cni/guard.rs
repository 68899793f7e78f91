//! Whether the guard of this boot is in the kernel: the one condition for a pod to get a
//! network. Asked of nf_tables itself, since a host may have no program `nft`.

use std::io;
use std::thread::sleep;
use std::time::{Duration, Instant};

use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};

use super::CniError;

/// A guard that somebody took away is back within a second.
const PATIENCE: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(50);
/// The table and its chain that drops what would leave in clear.
const TABLE: &str = "gambeson";
const CHAIN: &str = "guard_out";

/// `NFNL_SUBSYS_NFTABLES` and `NFT_MSG_GETCHAIN` of linux/netfilter/nf_tables.h.
const GET_CHAIN: u16 = 10 << 8 | 4;
/// `NFPROTO_INET`.
const INET: u8 = 1;
/// `NFTA_CHAIN_TABLE` and `NFTA_CHAIN_NAME`.
const CHAIN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const HEADER_BYTES: usize = 16;

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
    socket.send(&request(), 0)?;
    let (reply, _) = socket.recv_from_full()?;
    match errno(&reply) {
        None => Ok(true),
        Some(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Some(error) => Err(error),
    }
}

fn request() -> Vec<u8> {
    let mut payload = vec![INET, 0, 0, 0];
    for (kind, text) in [(CHAIN_TABLE, TABLE), (CHAIN_NAME, CHAIN)] {
        // With the zero that ends it; the next attribute is aligned to four bytes.
        let length = 4 + text.len() + 1;
        payload.extend((length as u16).to_ne_bytes());
        payload.extend(kind.to_ne_bytes());
        payload.extend(text.bytes());
        payload.resize(payload.len() + 1 + length.next_multiple_of(4) - length, 0);
    }
    let mut message = Vec::with_capacity(HEADER_BYTES + payload.len());
    message.extend(((HEADER_BYTES + payload.len()) as u32).to_ne_bytes());
    message.extend(GET_CHAIN.to_ne_bytes());
    message.extend(NLM_F_REQUEST.to_ne_bytes());
    message.extend([0; 8]);
    message.extend(payload);
    message
}

/// What the kernel refused the question with.
fn errno(reply: &[u8]) -> Option<io::Error> {
    let kind = u16::from_ne_bytes(*reply.get(4..)?.first_chunk()?);
    let code = i32::from_ne_bytes(*reply.get(HEADER_BYTES..)?.first_chunk()?);
    (kind == NLMSG_ERROR && code < 0).then(|| io::Error::from_raw_os_error(code.saturating_neg()))
}
