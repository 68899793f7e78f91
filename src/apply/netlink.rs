//! One route-netlink socket, one request at a time.
//!
//! Every reply is read to its end: a dump that the kernel marks as interrupted, or that
//! ends without its final message, is asked for again and never taken for the whole.

use std::io;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket};

/// More than the kernel puts into one datagram (32 KiB for dumps).
const BUFFER_BYTES: usize = 64 << 10;
/// How often an interrupted dump is repeated before it is reported.
const DUMP_ATTEMPTS: usize = 5;
/// Errno of a dump during which the objects changed.
const INTERRUPTED: i32 = nix::libc::EINTR;

/// A route-netlink socket in the network namespace of the thread that made it.
#[derive(Debug)]
pub(crate) struct Netlink {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

/// [`TokioSocket`] has no `Debug`.
struct Socket(TokioSocket);

impl std::fmt::Debug for Socket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Socket")
    }
}

impl Netlink {
    /// Opens the socket. Must be called within a tokio runtime.
    pub(crate) fn connect() -> io::Result<Self> {
        let mut socket = TokioSocket::new(NETLINK_ROUTE)?;
        socket.socket_mut().bind_auto()?;
        socket.socket_ref().connect(&SocketAddr::new(0, 0))?;
        // Lets the kernel filter dumps (Linux 4.20). Without it we filter the rest ourselves.
        if let Err(error) = socket.socket_ref().set_netlink_get_strict_chk(true) {
            tracing::debug!(%error, "netlink dumps are not filtered by this kernel");
        }
        Ok(Self { socket: Socket(socket), sequence: 0, buffer: Vec::with_capacity(BUFFER_BYTES) })
    }

    /// Sends a request that changes something and waits for the acknowledgement. `flags` are
    /// added to `NLM_F_REQUEST | NLM_F_ACK`.
    pub(crate) async fn change(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> io::Result<()> {
        self.request(message, NLM_F_ACK | flags).await.map(drop)
    }

    /// Asks for one object.
    pub(crate) async fn get(
        &mut self,
        message: RouteNetlinkMessage,
    ) -> io::Result<RouteNetlinkMessage> {
        let replies = self.request(message, NLM_F_ACK).await?;
        replies.into_iter().next().ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, "the kernel's answer could not be parsed")
        })
    }

    /// Asks for all objects that match, again when the kernel says that they changed meanwhile.
    pub(crate) async fn dump(
        &mut self,
        message: RouteNetlinkMessage,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        let mut attempt = 1;
        loop {
            match self.request(message.clone(), NLM_F_DUMP).await {
                Err(error) if is_transient(&error) && attempt < DUMP_ATTEMPTS => attempt += 1,
                result => return result,
            }
        }
    }

    async fn request(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.sequence = self.sequence.wrapping_add(1).max(1);
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | flags;
        request.header.sequence_number = self.sequence;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.0.send(&bytes).await?;
        self.replies().await
    }

    /// Reads until the acknowledgement, error or end of the dump with the current number.
    /// What belongs to an earlier, abandoned request is dropped.
    async fn replies(&mut self) -> io::Result<Vec<RouteNetlinkMessage>> {
        let mut found = Vec::new();
        let mut interrupted = false;
        loop {
            self.buffer.clear();
            self.socket.0.recv(&mut self.buffer).await?;
            let mut rest = self.buffer.as_slice();
            while let Some((message, tail)) = split_message(rest) {
                rest = tail;
                let reply = match NetlinkMessage::<RouteNetlinkMessage>::deserialize(message) {
                    Ok(reply) => reply,
                    Err(error) => {
                        tracing::debug!(%error, "netlink message that cannot be parsed");
                        continue;
                    }
                };
                if reply.header.sequence_number != self.sequence {
                    continue;
                }
                interrupted |= reply.header.flags & NLM_F_DUMP_INTR != 0;
                match reply.payload {
                    NetlinkPayload::InnerMessage(inner) => found.push(inner),
                    NetlinkPayload::Error(error) if error.code.is_some() => {
                        return Err(error.to_io());
                    }
                    NetlinkPayload::Done(done) if done.code < 0 => {
                        return Err(io::Error::from_raw_os_error(done.code.saturating_neg()));
                    }
                    NetlinkPayload::Error(_) | NetlinkPayload::Done(_) if interrupted => {
                        return Err(io::Error::from_raw_os_error(INTERRUPTED));
                    }
                    NetlinkPayload::Error(_) | NetlinkPayload::Done(_) => return Ok(found),
                    _ => {}
                }
            }
        }
    }
}

/// The first netlink message of `bytes` and what follows it, or `None` at the end.
pub(super) fn split_message(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let length = usize::try_from(u32::from_ne_bytes(*bytes.first_chunk()?)).ok()?;
    if length < 16 || length > bytes.len() {
        return None;
    }
    let aligned = length.next_multiple_of(4).min(bytes.len());
    Some((&bytes[..length], &bytes[aligned..]))
}

/// The attributes of a message body: their type and value. Ends at the first that is broken.
pub(super) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(*bytes.first_chunk()?));
        let kind = u16::from_ne_bytes(*bytes.get(2..)?.first_chunk()?);
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        // The upper bits say that it is nested or in network order.
        Some((kind & 0x3fff, value))
    })
}

fn is_transient(error: &io::Error) -> bool {
    use nix::libc::{EAGAIN, EBUSY, ENOBUFS};
    matches!(error.raw_os_error(), Some(INTERRUPTED | EAGAIN | EBUSY | ENOBUFS))
}
