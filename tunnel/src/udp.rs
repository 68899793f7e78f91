//! The UDP sockets of a device: both families on one port, replies from the address that the
//! peer sent to.

use std::io;
use std::mem::{size_of, zeroed};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, RawFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::batch::{Destination, MAX_PACKET, Outbox};
use crate::device::{Datagram, Device};
use crate::endpoint::{Endpoint, Source};

/// How many datagrams one receive takes.
const RECEIVE: usize = 32;
/// Bytes from one receive buffer to the next: a few cache lines over 64 KiB, so that the
/// buffers do not compete for the same lines of the cache.
const STRIDE: usize = (64 << 10) + 192;
/// Socket buffers, bytes.
const BUFFER: usize = 7 << 20;
/// Attempts to find a random port that is free in both families.
const PORT_ATTEMPTS: u32 = 64;
/// Room for a packet information message of either family and a segment size.
const CONTROL: usize = 128;
/// At most this many datagrams in one send (the kernel's limit until 6.8).
const SEGMENTS: usize = 64;

/// The sockets. A family that the host does not have is absent.
pub(crate) struct Sockets {
    v4: Option<Socket>,
    v6: Option<Socket>,
    port: u16,
    /// Whether runs of datagrams leave in one send.
    segments: AtomicBool,
}

impl Sockets {
    /// Binds both families to `port`, or to one random port if it is 0.
    ///
    /// # Errors
    /// That of the bind, EADDRINUSE above all.
    pub(crate) fn bind(port: u16, fwmark: u32) -> io::Result<Self> {
        let mut attempts = 0;
        loop {
            attempts += 1;
            match Self::try_bind(port, fwmark) {
                Err(error) if port == 0 && attempts < PORT_ATTEMPTS && is_in_use(&error) => {}
                result => return result,
            }
        }
    }

    fn try_bind(port: u16, fwmark: u32) -> io::Result<Self> {
        let v4 = socket((Ipv4Addr::UNSPECIFIED, port).into(), fwmark)?;
        let port = bound_port(v4.as_ref()).unwrap_or(port);
        let v6 = socket((Ipv6Addr::UNSPECIFIED, port).into(), fwmark)?;
        let port = bound_port(v6.as_ref()).unwrap_or(port);
        if v4.is_none() && v6.is_none() {
            return Err(Errno::EAFNOSUPPORT.into());
        }
        let segments = v4.iter().chain(&v6).all(sends_segments);
        Ok(Self { v4, v6, port, segments: AtomicBool::new(segments) })
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Marks outgoing datagrams, 0 for none.
    pub(crate) fn set_fwmark(&self, fwmark: u32) -> io::Result<()> {
        self.each().try_for_each(|socket| socket.set_mark(fwmark))
    }

    /// What to poll.
    pub(crate) fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.each().map(|socket| socket.as_fd())
    }

    fn each(&self) -> impl Iterator<Item = &Socket> {
        self.v4.iter().chain(&self.v6)
    }

    /// Sends what is in the outbox. A datagram that cannot be sent is dropped, as the network
    /// would drop it.
    pub(crate) fn send(&self, outbox: &Outbox, device: &Device) {
        let limit = if self.segments.load(Ordering::Relaxed) { SEGMENTS } else { 1 };
        for run in outbox.runs(limit) {
            if !run.is_one() {
                let Err(error) = self.send_to(&run.to.endpoint, run.bytes, run.segment) else {
                    continue;
                };
                self.run_failed(&error);
            }
            for datagram in run.datagrams() {
                self.send_one(datagram, run.to, device);
            }
        }
    }

    /// A run may fail where its datagrams do not: they are too long for the path and have to
    /// be fragmented, or the device cannot do checksums (EIO), and then it never can.
    fn run_failed(&self, error: &io::Error) {
        if error.raw_os_error() == Some(libc::EIO) && self.segments.swap(false, Ordering::Relaxed) {
            tracing::info!(%error, "sending datagrams one by one");
        }
    }

    fn send_one(&self, bytes: &[u8], to: &Destination, device: &Device) {
        let Err(error) = self.send_to(&to.endpoint, bytes, bytes.len()) else { return };
        if let (Some(source), true) = (to.endpoint.source, is_lost_source(&error)) {
            if let Some(peer) = to.peer {
                device.forget_source(peer, source);
            }
            let endpoint = Endpoint { source: None, ..to.endpoint };
            if self.send_to(&endpoint, bytes, bytes.len()).is_ok() {
                return;
            }
        }
        tracing::debug!(to = %to.endpoint.address, %error, "datagram not sent");
    }

    fn send_to(&self, to: &Endpoint, bytes: &[u8], segment: usize) -> io::Result<()> {
        let socket = match to.address {
            SocketAddr::V4(_) => &self.v4,
            SocketAddr::V6(_) => &self.v6,
        };
        let Some(socket) = socket else { return Err(Errno::EAFNOSUPPORT.into()) };
        send_message(socket.as_raw_fd(), bytes, segment, to)
    }
}

/// A socket for this address' family, or `None` if the host does not have the family.
fn socket(address: SocketAddr, fwmark: u32) -> io::Result<Option<Socket>> {
    let domain = Domain::for_address(address);
    let socket = match Socket::new(domain, Type::DGRAM, Some(Protocol::UDP)) {
        Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => return Ok(None),
        result => result?,
    };
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
        set_flag(&socket, libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO)?;
    } else {
        set_flag(&socket, libc::IPPROTO_IP, libc::IP_PKTINFO)?;
    }
    if kernel_version() >= (5, 12, 0) {
        // Without it, datagrams come one by one.
        let _ = set_flag(&socket, libc::SOL_UDP, libc::UDP_GRO);
    }
    // Beyond the host's limit with CAP_NET_ADMIN, otherwise up to it.
    for (force, plain) in
        [(libc::SO_RCVBUFFORCE, libc::SO_RCVBUF), (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF)]
    {
        let size = libc::c_int::try_from(BUFFER).unwrap_or(libc::c_int::MAX);
        if set_option(&socket, libc::SOL_SOCKET, force, size).is_err() {
            let _ = set_option(&socket, libc::SOL_SOCKET, plain, size);
        }
    }
    if fwmark != 0 {
        socket.set_mark(fwmark)?;
    }
    match socket.bind(&address.into()) {
        // IPv6 is compiled in but switched off.
        Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => Ok(None),
        result => result.map(|()| Some(socket)),
    }
}

/// Whether the kernel splits one send into datagrams, and does it right.
fn sends_segments(socket: &Socket) -> bool {
    // These versions corrupt runs of equal datagrams.
    let broken = (7, 0, 0)..=(7, 1, 4);
    !broken.contains(&kernel_version())
        && set_option(socket, libc::SOL_UDP, libc::UDP_SEGMENT, 0).is_ok()
}

/// Major, minor and patch level; zeros if it cannot be told.
fn kernel_version() -> (u32, u32, u32) {
    static VERSION: OnceLock<(u32, u32, u32)> = OnceLock::new();
    *VERSION.get_or_init(|| {
        parse_version(&std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default())
    })
}

fn parse_version(release: &str) -> (u32, u32, u32) {
    let mut numbers =
        release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().unwrap_or(0));
    let mut next = || numbers.next().unwrap_or(0);
    (next(), next(), next())
}

fn bound_port(socket: Option<&Socket>) -> Option<u16> {
    socket?.local_addr().ok()?.as_socket().map(|address| address.port())
}

fn is_in_use(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EADDRINUSE)
}

/// Whether a send failed as it does when its source address is not ours any more.
fn is_lost_source(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error().map(Errno::from_raw),
        Some(
            Errno::EINVAL
                | Errno::EADDRNOTAVAIL
                | Errno::ENETUNREACH
                | Errno::EHOSTUNREACH
                | Errno::ENODEV
                | Errno::ENXIO
        )
    )
}

fn set_flag(socket: &Socket, level: libc::c_int, name: libc::c_int) -> io::Result<()> {
    set_option(socket, level, name, 1)
}

fn set_option(
    socket: &Socket,
    level: libc::c_int,
    name: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    // SAFETY: the value is a C int that outlives the call, and its length is given.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    Errno::result(result)?;
    Ok(())
}

/// Control messages need the alignment of their header.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct Control([u8; CONTROL]);

/// Sends bytes as datagrams of `segment` bytes, the last one maybe shorter.
fn send_message(fd: RawFd, bytes: &[u8], segment: usize, to: &Endpoint) -> io::Result<()> {
    let address = SockAddr::from(to.address);
    let mut control = Control([0; CONTROL]);
    let mut iov = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: a msghdr is plain data, for which zero is a value.
    let mut message: libc::msghdr = unsafe { zeroed() };
    message.msg_name = address.as_ptr().cast_mut().cast();
    message.msg_namelen = address.len();
    message.msg_iov = &raw mut iov;
    message.msg_iovlen = 1;
    let mut used = 0;
    if let Some(source) = to.source {
        used += write_source(&mut control, source, to.address);
    }
    if segment < bytes.len() {
        let segment = u16::try_from(segment).map_err(|_| Errno::EINVAL)?;
        used += write_control(&mut control, used, libc::SOL_UDP, libc::UDP_SEGMENT, segment);
    }
    if used > 0 {
        message.msg_control = control.0.as_mut_ptr().cast();
        message.msg_controllen = used;
    }
    loop {
        // SAFETY: name, iov and control point to live memory of the lengths given, which the
        // call only reads.
        let sent = unsafe { libc::sendmsg(fd, &raw const message, libc::MSG_NOSIGNAL) };
        match Errno::result(sent) {
            Err(Errno::EINTR) => {}
            result => return result.map(drop).map_err(Into::into),
        }
    }
}

/// Writes the source address as packet information. Returns the length of the control data.
fn write_source(control: &mut Control, source: Source, to: SocketAddr) -> usize {
    match (source.ip, to) {
        (IpAddr::V4(ip), SocketAddr::V4(_)) => {
            let info = libc::in_pktinfo {
                ipi_ifindex: 0,
                ipi_spec_dst: libc::in_addr { s_addr: u32::from(ip).to_be() },
                ipi_addr: libc::in_addr { s_addr: 0 },
            };
            write_control(control, 0, libc::IPPROTO_IP, libc::IP_PKTINFO, info)
        }
        (IpAddr::V6(ip), SocketAddr::V6(_)) => {
            let info = libc::in6_pktinfo {
                ipi6_addr: libc::in6_addr { s6_addr: ip.octets() },
                ipi6_ifindex: source.interface,
            };
            write_control(control, 0, libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, info)
        }
        _ => 0,
    }
}

/// Writes a control message at `at`, which is 0 or the end of another one. Returns its length
/// with padding.
fn write_control<T>(control: &mut Control, at: usize, level: i32, kind: i32, value: T) -> usize {
    let size = size_of::<T>() as libc::c_uint;
    // SAFETY: CMSG_LEN and CMSG_SPACE only compute.
    let (len, space) = unsafe { (libc::CMSG_LEN(size) as usize, libc::CMSG_SPACE(size) as usize) };
    let Some(room) = control.0.get_mut(at..at + space) else { return 0 };
    let header = libc::cmsghdr { cmsg_len: len, cmsg_level: level, cmsg_type: kind };
    let data = room[len - size_of::<T>()..].as_mut_ptr();
    // SAFETY: `room` holds the header, and the value after it; both are written unaligned.
    unsafe {
        room.as_mut_ptr().cast::<libc::cmsghdr>().write_unaligned(header);
        data.cast::<T>().write_unaligned(value);
    }
    space
}

/// Receives datagrams many at a time into buffers of its own.
pub(crate) struct Receiver {
    buffers: Vec<u8>,
    names: Vec<libc::sockaddr_storage>,
    controls: Vec<Control>,
    headers: Vec<libc::mmsghdr>,
    iovs: Vec<libc::iovec>,
    received: usize,
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
            received: 0,
        }
    }

    /// Receives what there is on one of the sockets, up to a full set of buffers, without
    /// waiting.
    pub(crate) fn receive(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        self.received = 0;
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
                self.received = usize::try_from(count).unwrap_or(0);
                Ok(())
            }
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// The datagrams of the last receive.
    pub(crate) fn datagrams(&self) -> impl Iterator<Item = Datagram<'_>> {
        (0..self.received).flat_map(|i| {
            let header = &self.headers[i];
            let len = usize::try_from(header.msg_len).unwrap_or(0).min(STRIDE);
            let info = Info::of(&header.msg_hdr);
            let from = socket_address(&self.names[i]);
            // The kernel has merged neighbours of one length; an empty one counts as none.
            let bytes = &self.buffers[i * STRIDE..i * STRIDE + len];
            bytes
                .chunks(info.segment.unwrap_or(len).max(1))
                .filter_map(move |bytes| Some(Datagram { bytes, from: from?, to: info.to }))
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

/// What the kernel says of a receive.
#[derive(Debug, Default, Clone, Copy)]
struct Info {
    /// The address of ours that was sent to.
    to: Option<Source>,
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
                self.to = Some(Source::new(ip.into(), 0));
            }
            (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                // SAFETY: as above.
                let info = unsafe { data.cast::<libc::in6_pktinfo>().read_unaligned() };
                let ip = Ipv6Addr::from(info.ipi6_addr.s6_addr);
                self.to = Some(Source::new(ip.into(), info.ipi6_ifindex));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_versions_are_read() {
        assert_eq!(parse_version("6.18.44-something-595\n"), (6, 18, 44));
        assert_eq!(parse_version("7.1-rc3"), (7, 1, 0));
        assert_eq!(parse_version(""), (0, 0, 0));
        assert!(kernel_version() > (4, 0, 0));
    }

    fn exchange(segment: usize, lengths: &[usize]) {
        let receiver = Sockets::bind(0, 0).unwrap();
        let sender = Sockets::bind(0, 0).unwrap();
        sender.segments.fetch_and(segment > 1, Ordering::Relaxed);
        let source = Source::new([127, 0, 0, 5].into(), 0);
        let address = SocketAddr::from(([127, 0, 0, 7], receiver.port()));
        let mut outbox = Outbox::new();
        for (n, len) in (1..).zip(lengths) {
            outbox.space(*len).fill(n);
            outbox.commit(*len, Endpoint { address, source: Some(source) }, None);
        }
        sender.send(&outbox, &Device::new(1420));
        let mut buffers = Receiver::new();
        let mut got = Vec::new();
        while got.len() < lengths.len() {
            let socket = receiver.descriptors().next().unwrap();
            crate::worker::wait(&[socket]).unwrap();
            buffers.receive(socket).unwrap();
            got.extend(buffers.datagrams().map(|datagram| {
                assert_eq!(datagram.to, Some(Source::new([127, 0, 0, 7].into(), 0)));
                assert_eq!(datagram.from, SocketAddr::from(([127, 0, 0, 5], sender.port())));
                datagram.bytes.to_vec()
            }));
        }
        let sent: Vec<_> = outbox.datagrams().map(|(bytes, _)| bytes.to_vec()).collect();
        assert_eq!(got, sent);
    }

    #[test]
    fn datagrams_arrive_as_they_were_sent_in_runs_or_one_by_one() {
        for segment in [1, SEGMENTS] {
            exchange(segment, &[100]);
            exchange(segment, &[1000; 200]);
            exchange(segment, &[500, 500, 500, 32, 500, 1400, 1400, 60_000, 60_000, 32]);
        }
    }
}
