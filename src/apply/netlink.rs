//! One route-netlink socket, one request at a time.
//!
//! Every reply is read to its end: a dump that the kernel marks as interrupted, or that
//! ends without its final message, is asked for again and never taken for the whole.

use std::io;
use std::net::IpAddr;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
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

    async fn replies(&mut self) -> io::Result<Vec<RouteNetlinkMessage>> {
        let mut reply = Reply::to(self.sequence);
        loop {
            self.buffer.clear();
            self.socket.0.recv(&mut self.buffer).await?;
            if reply.feed(&self.buffer)? {
                return Ok(reply.objects);
            }
        }
    }
}

/// How route netlink names the family of an address.
pub(super) fn family_of(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

/// What the kernel answers to one request, as it comes in.
struct Reply {
    sequence: u32,
    objects: Vec<RouteNetlinkMessage>,
    interrupted: bool,
}

impl Reply {
    fn to(sequence: u32) -> Self {
        Self { sequence, objects: Vec::new(), interrupted: false }
    }

    /// Takes a datagram and says whether the answer is complete: at an acknowledgement or the
    /// end of a dump. What belongs to an earlier, abandoned request is dropped.
    fn feed(&mut self, mut datagram: &[u8]) -> io::Result<bool> {
        while let Some((message, rest)) = split_message(datagram) {
            datagram = rest;
            let message = match NetlinkMessage::<RouteNetlinkMessage>::deserialize(message) {
                Ok(message) => message,
                Err(error) => {
                    tracing::debug!(%error, "netlink message that cannot be parsed");
                    continue;
                }
            };
            if message.header.sequence_number == self.sequence && self.take(message)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn take(&mut self, message: NetlinkMessage<RouteNetlinkMessage>) -> io::Result<bool> {
        self.interrupted |= message.header.flags & NLM_F_DUMP_INTR != 0;
        match message.payload {
            NetlinkPayload::InnerMessage(object) => {
                self.objects.push(object);
                Ok(false)
            }
            NetlinkPayload::Error(error) if error.code.is_some() => Err(error.to_io()),
            NetlinkPayload::Done(done) if done.code < 0 => {
                Err(io::Error::from_raw_os_error(done.code.saturating_neg()))
            }
            NetlinkPayload::Error(_) | NetlinkPayload::Done(_) if self.interrupted => {
                Err(io::Error::from_raw_os_error(INTERRUPTED))
            }
            NetlinkPayload::Error(_) | NetlinkPayload::Done(_) => Ok(true),
            _ => Ok(false),
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

#[cfg(test)]
mod tests {
    use netlink_packet_core::{DoneMessage, ErrorMessage};
    use netlink_packet_route::link::LinkMessage;

    use super::*;

    const SEQUENCE: u32 = 7;

    fn bytes(
        payload: NetlinkPayload<RouteNetlinkMessage>,
        sequence: u32,
        extra_flags: u16,
    ) -> Vec<u8> {
        let mut message = NetlinkMessage::new(Default::default(), payload);
        message.header.sequence_number = sequence;
        message.finalize();
        message.header.flags |= extra_flags;
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        bytes
    }

    fn link(index: u32) -> NetlinkPayload<RouteNetlinkMessage> {
        let mut link = LinkMessage::default();
        link.header.index = index;
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link))
    }

    fn done(code: i32) -> NetlinkPayload<RouteNetlinkMessage> {
        let mut done = DoneMessage::default();
        done.code = code;
        NetlinkPayload::Done(done)
    }

    fn error(code: i32) -> NetlinkPayload<RouteNetlinkMessage> {
        let mut error = ErrorMessage::default();
        error.code = std::num::NonZeroI32::new(code);
        // The header of the request that is answered.
        error.header = vec![0; 16];
        NetlinkPayload::Error(error)
    }

    #[test]
    fn a_dump_is_complete_at_its_end_only() {
        let mut reply = Reply::to(SEQUENCE);
        let first = [bytes(link(1), SEQUENCE, 0), bytes(link(2), SEQUENCE, 0)].concat();
        assert!(!reply.feed(&first).unwrap());
        assert!(!reply.feed(&bytes(link(3), SEQUENCE, 0)).unwrap());
        assert!(reply.feed(&bytes(done(0), SEQUENCE, 0)).unwrap());
        assert_eq!(reply.objects.len(), 3);
    }

    #[test]
    fn a_dump_that_was_interrupted_is_not_taken() {
        for place in 0..2 {
            let mut reply = Reply::to(SEQUENCE);
            let flags = |at| if at == place { NLM_F_DUMP_INTR } else { 0 };
            assert!(!reply.feed(&bytes(link(1), SEQUENCE, flags(0))).unwrap());
            let error = reply.feed(&bytes(done(0), SEQUENCE, flags(1))).unwrap_err();
            assert!(is_transient(&error), "{error}");
        }
    }

    #[test]
    fn an_errno_is_an_error_in_either_form() {
        for payload in [error(-nix::libc::EPERM), done(-nix::libc::EPERM)] {
            let error = Reply::to(SEQUENCE).feed(&bytes(payload, SEQUENCE, 0)).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(nix::libc::EPERM));
        }
        assert!(Reply::to(SEQUENCE).feed(&bytes(error(0), SEQUENCE, 0)).unwrap());
    }

    #[test]
    fn answers_to_earlier_requests_and_garbage_are_dropped() {
        let mut reply = Reply::to(SEQUENCE);
        assert!(!reply.feed(&bytes(error(-1), SEQUENCE - 1, 0)).unwrap());
        let mut cut = bytes(link(1), SEQUENCE, 0);
        cut.truncate(cut.len() - 1);
        for garbage in [vec![], vec![1, 2, 3], vec![0xff; 64], vec![0; 64], cut] {
            assert!(!reply.feed(&garbage).unwrap());
        }
        assert!(reply.objects.is_empty());
    }

    #[test]
    fn attributes_end_at_the_first_that_is_broken() {
        let good = [8_u16.to_ne_bytes(), 1_u16.to_ne_bytes(), *b"ab", *b"c\0"].concat();
        let nested = (5_u16.to_ne_bytes(), 0x8002_u16.to_ne_bytes());
        let padded = [nested.0.as_slice(), nested.1.as_slice(), b"z\0\0\0"].concat();
        let broken = [200_u16.to_ne_bytes(), 3_u16.to_ne_bytes()].concat();
        let all = [good, padded, broken].concat();
        let found: Vec<_> = attributes(&all).collect();
        assert_eq!(found, [(1, b"abc\0".as_slice()), (2, b"z".as_slice())]);
        assert_eq!(attributes(&[3, 0, 1, 0]).count(), 0);
    }
}
