//! Receiving datagrams many at a time.

use std::io;
use std::mem::{size_of, zeroed};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsRawFd as _, BorrowedFd};

use nix::errno::Errno;

use super::message::{CONTROL, Control};
use crate::batch::MAX_PACKET;
use crate::device::{Datagram, Origin};
use crate::endpoint::Source;
use crate::ip;

/// How many buffers one receive fills, each with what the kernel has merged: enough to amortise
/// the call, and little enough that neither the cache nor other flows suffer.
const RECEIVE: usize = 8;
/// Bytes from one receive buffer to the next: a few cache lines over 64 KiB, so that the
/// buffers do not compete for the same lines of the cache.
const STRIDE: usize = (64 << 10) + 192;

/// Receives datagrams many at a time into buffers of its own.
pub(crate) struct Receiver {
    buffers: Vec<u8>,
    names: Vec<libc::sockaddr_storage>,
    controls: Vec<Control>,
    headers: Vec<libc::mmsghdr>,
    iovs: Vec<libc::iovec>,
    received: Vec<Received>,
}

impl Receiver {
    pub(crate) fn new() -> Self {
        // SAFETY: these are plain data, for which zero is a value.
        let (header, iov, name): (libc::mmsghdr, libc::iovec, libc::sockaddr_storage) =
            unsafe { (zeroed(), zeroed(), zeroed()) };
        Self {
            buffers: vec![0; RECEIVE * STRIDE],
            names: vec![name; RECEIVE],
            controls: vec![Control([0; CONTROL]); RECEIVE],
            headers: vec![header; RECEIVE],
            iovs: vec![iov; RECEIVE],
            received: Vec::with_capacity(RECEIVE),
        }
    }

    /// Receives what there is on one of the sockets, up to a full set of buffers, without
    /// waiting.
    pub(crate) fn receive(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        self.received.clear();
        self.prepare();
        // SAFETY: each header points to a name, a buffer and a control buffer that live in
        // `self`, of the lengths given, and no two headers share one.
        let count = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                self.headers.as_mut_ptr(),
                RECEIVE as libc::c_uint,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
            )
        };
        match Errno::result(count) {
            Ok(count) => {
                let filled = self.headers.iter().zip(&self.names);
                let filled = filled.take(usize::try_from(count).unwrap_or(0));
                self.received.extend(filled.map(|(header, name)| Received::of(header, name)));
                Ok(())
            }
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// The datagrams of the last receive.
    pub(crate) fn datagrams(&mut self) -> impl Iterator<Item = Datagram<'_>> {
        self.buffers.chunks_mut(STRIDE).zip(&self.received).flat_map(|(buffer, received)| {
            // An empty datagram counts as none, and so does one from nowhere.
            let bytes = buffer.get_mut(..received.len).unwrap_or_default();
            bytes.chunks_mut(received.segment.max(1)).filter_map(|bytes| {
                received.origin.as_ref().map(|origin| Datagram { bytes, origin })
            })
        })
    }

    fn prepare(&mut self) {
        for i in 0..RECEIVE {
            self.iovs[i] = libc::iovec {
                iov_base: self.buffers[i * STRIDE..].as_mut_ptr().cast(),
                iov_len: MAX_PACKET,
            };
            let header = &mut self.headers[i].msg_hdr;
            header.msg_name = (&raw mut self.names[i]).cast();
            header.msg_namelen = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
            header.msg_iov = &raw mut self.iovs[i];
            header.msg_iovlen = 1;
            header.msg_control = self.controls[i].0.as_mut_ptr().cast();
            header.msg_controllen = CONTROL;
            header.msg_flags = 0;
        }
    }
}

/// An Internet address that the kernel has written.
fn socket_address(name: &libc::sockaddr_storage) -> Option<SocketAddr> {
    match i32::from(name.ss_family) {
        libc::AF_INET => {
            // SAFETY: the storage is larger than, and as aligned as, any address, and its
            // family says which one it holds.
            let name = unsafe { &*(&raw const *name).cast::<libc::sockaddr_in>() };
            let ip = Ipv4Addr::from(u32::from_be(name.sin_addr.s_addr));
            Some((ip, u16::from_be(name.sin_port)).into())
        }
        libc::AF_INET6 => {
            // SAFETY: as above.
            let name = unsafe { &*(&raw const *name).cast::<libc::sockaddr_in6>() };
            let ip = Ipv6Addr::from(name.sin6_addr.s6_addr);
            Some(SocketAddrV6::new(ip, u16::from_be(name.sin6_port), 0, name.sin6_scope_id).into())
        }
        _ => None,
    }
}

/// What a buffer has been filled with: neighbours that the kernel has merged.
struct Received {
    len: usize,
    /// The length of each but the last.
    segment: usize,
    origin: Option<Origin>,
}

impl Received {
    fn of(header: &libc::mmsghdr, name: &libc::sockaddr_storage) -> Self {
        let len = usize::try_from(header.msg_len).unwrap_or(0).min(STRIDE);
        let Info { to, ecn, segment } = Info::of(&header.msg_hdr);
        let origin = socket_address(name).map(|from| Origin { from, to, ecn });
        Self { len, segment: segment.unwrap_or(len), origin }
    }
}

/// What the kernel says of a receive.
#[derive(Debug, Default, Clone, Copy)]
struct Info {
    /// The address of ours that was sent to.
    to: Option<Source>,
    /// The bits of explicit congestion notification, of each merged datagram the same.
    ecn: u8,
    /// The length of each merged datagram but the last.
    segment: Option<usize>,
}

impl Info {
    fn of(message: &libc::msghdr) -> Self {
        let mut info = Self::default();
        // SAFETY: the header points to control data that the kernel has written, of the
        // length that it has set, so that the walk stays inside.
        let mut header = unsafe { libc::CMSG_FIRSTHDR(message) };
        // SAFETY: the walk gives null or a header in the control data.
        while let Some(control) = unsafe { header.as_ref() } {
            // SAFETY: as above.
            let data = unsafe { libc::CMSG_DATA(header) };
            info.take(control, data);
            // SAFETY: as above.
            header = unsafe { libc::CMSG_NXTHDR(message, header) };
        }
        info
    }

    /// `data` is what follows `control`.
    fn take(&mut self, control: &libc::cmsghdr, data: *const u8) {
        match (control.cmsg_level, control.cmsg_type) {
            (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                // SAFETY: a message of this type holds this value.
                let info = unsafe { data.cast::<libc::in_pktinfo>().read_unaligned() };
                let ip = Ipv4Addr::from(u32::from_be(info.ipi_spec_dst.s_addr));
                self.to = Some(Source::new(ip.into(), info.ipi_ifindex.cast_unsigned()));
            }
            (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                // SAFETY: as above.
                let info = unsafe { data.cast::<libc::in6_pktinfo>().read_unaligned() };
                let ip = Ipv6Addr::from(info.ipi6_addr.s6_addr);
                self.to = Some(Source::new(ip.into(), info.ipi6_ifindex));
            }
            (libc::IPPROTO_IP, libc::IP_TOS) => {
                // SAFETY: as above.
                self.ecn = ip::CE & unsafe { data.read() };
            }
            (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => {
                // SAFETY: as above.
                let class = unsafe { data.cast::<libc::c_int>().read_unaligned() };
                self.ecn = ip::CE & class.to_le_bytes()[0];
            }
            (libc::SOL_UDP, libc::UDP_GRO) => {
                // SAFETY: as above.
                let segment = unsafe { data.cast::<libc::c_int>().read_unaligned() };
                self.segment = usize::try_from(segment).ok().filter(|segment| *segment > 0);
            }
            _ => {}
        }
    }
}
