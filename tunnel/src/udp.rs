//! The UDP sockets of a device: both families on one port, replies from the address that the
//! peer sent to.

use std::io;
use std::mem::{size_of, zeroed};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, RawFd};

use nix::errno::Errno;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::batch::{MAX_PACKET, Outbox};
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
/// Room for one packet information message of either family.
const CONTROL: usize = 64;

/// The sockets. A family that the host does not have is absent.
pub(crate) struct Sockets {
    v4: Option<Socket>,
    v6: Option<Socket>,
    port: u16,
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
        Ok(Self { v4, v6, port })
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
        for (bytes, to) in outbox.datagrams() {
            let result = self.send_one(bytes, &to.endpoint);
            let Err(error) = result else { continue };
            if let (Some(source), true) = (to.endpoint.source, is_lost_source(&error)) {
                if let Some(peer) = to.peer {
                    device.forget_source(peer, source);
                }
                let endpoint = Endpoint { source: None, ..to.endpoint };
                if self.send_one(bytes, &endpoint).is_ok() {
                    continue;
                }
            }
            tracing::debug!(to = %to.endpoint.address, %error, "datagram not sent");
        }
    }

    fn send_one(&self, bytes: &[u8], to: &Endpoint) -> io::Result<()> {
        let socket = match to.address {
            SocketAddr::V4(_) => &self.v4,
            SocketAddr::V6(_) => &self.v6,
        };
        let Some(socket) = socket else { return Err(Errno::EAFNOSUPPORT.into()) };
        send_message(socket.as_raw_fd(), bytes, to)
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

fn send_message(fd: RawFd, bytes: &[u8], to: &Endpoint) -> io::Result<()> {
    let address = SockAddr::from(to.address);
    let mut control = Control([0; CONTROL]);
    let mut iov = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: a msghdr is plain data, for which zero is a value.
    let mut message: libc::msghdr = unsafe { zeroed() };
    message.msg_name = address.as_ptr().cast_mut().cast();
    message.msg_namelen = address.len();
    message.msg_iov = &raw mut iov;
    message.msg_iovlen = 1;
    if let Some(source) = to.source {
        message.msg_control = control.0.as_mut_ptr().cast();
        message.msg_controllen = CONTROL;
        message.msg_controllen = write_source(&message, source, to.address);
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
fn write_source(message: &libc::msghdr, source: Source, to: SocketAddr) -> usize {
    match (source.ip, to) {
        (IpAddr::V4(ip), SocketAddr::V4(_)) => {
            let info = libc::in_pktinfo {
                ipi_ifindex: 0,
                ipi_spec_dst: libc::in_addr { s_addr: u32::from(ip).to_be() },
                ipi_addr: libc::in_addr { s_addr: 0 },
            };
            write_control(message, libc::IPPROTO_IP, libc::IP_PKTINFO, info)
        }
        (IpAddr::V6(ip), SocketAddr::V6(_)) => {
            let info = libc::in6_pktinfo {
                ipi6_addr: libc::in6_addr { s6_addr: ip.octets() },
                ipi6_ifindex: source.interface,
            };
            write_control(message, libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, info)
        }
        _ => 0,
    }
}

fn write_control<T>(message: &libc::msghdr, level: i32, kind: i32, value: T) -> usize {
    let size = size_of::<T>() as libc::c_uint;
    // SAFETY: CMSG_LEN and CMSG_SPACE only compute.
    let (len, space) = unsafe { (libc::CMSG_LEN(size), libc::CMSG_SPACE(size)) };
    if message.msg_controllen < space as usize {
        return 0;
    }
    // SAFETY: the control buffer is at least one message of this size long and aligned for
    // its header; the value is written unaligned.
    unsafe {
        let header = libc::CMSG_FIRSTHDR(message);
        (*header).cmsg_level = level;
        (*header).cmsg_type = kind;
        (*header).cmsg_len = len as usize;
        libc::CMSG_DATA(header).cast::<T>().write_unaligned(value);
    }
    space as usize
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
        (0..self.received).filter_map(|i| {
            let header = &self.headers[i];
            let len = usize::try_from(header.msg_len).ok()?.min(STRIDE);
            Some(Datagram {
                bytes: &self.buffers[i * STRIDE..i * STRIDE + len],
                from: socket_address(&self.names[i])?,
                to: destination(&header.msg_hdr),
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

/// The address of ours that a datagram was sent to.
fn destination(message: &libc::msghdr) -> Option<Source> {
    // SAFETY: the header points to control data that the kernel has written, of the length
    // that it has set, so that the walk stays inside; values are read unaligned.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(message);
        while let Some(control) = header.as_ref() {
            let data = libc::CMSG_DATA(header);
            match (control.cmsg_level, control.cmsg_type) {
                (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                    let info = data.cast::<libc::in_pktinfo>().read_unaligned();
                    let ip = Ipv4Addr::from(u32::from_be(info.ipi_spec_dst.s_addr));
                    return Some(Source::new(ip.into(), 0));
                }
                (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                    let info = data.cast::<libc::in6_pktinfo>().read_unaligned();
                    let ip = Ipv6Addr::from(info.ipi6_addr.s6_addr);
                    return Some(Source::new(ip.into(), info.ipi6_ifindex));
                }
                _ => header = libc::CMSG_NXTHDR(message, header),
            }
        }
    }
    None
}
