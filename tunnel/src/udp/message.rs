//! Datagrams with control data: where they leave from, and how they are split.

use std::io;
use std::mem::{size_of, zeroed};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::RawFd;

use nix::errno::Errno;
use socket2::SockAddr;

use crate::batch::Destination;
use crate::endpoint::{Endpoint, Source};

/// Room for a packet information message of either family, a segment size and a class.
pub(super) const CONTROL: usize = 128;

/// Control messages need the alignment of their header.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
pub(super) struct Control(pub(super) [u8; CONTROL]);

/// Sends bytes as datagrams of `segment` bytes, the last one maybe shorter.
pub(super) fn send_message(
    fd: RawFd,
    bytes: &[u8],
    segment: usize,
    to: &Destination,
) -> io::Result<()> {
    let Endpoint { address: receiver, source } = to.endpoint;
    let address = SockAddr::from(receiver);
    let mut control = Control([0; CONTROL]);
    let mut iov = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: a msghdr is plain data, for which zero is a value.
    let mut message: libc::msghdr = unsafe { zeroed() };
    message.msg_name = address.as_ptr().cast_mut().cast();
    message.msg_namelen = address.len();
    message.msg_iov = &raw mut iov;
    message.msg_iovlen = 1;
    let mut used = 0;
    if let Some(source) = source {
        used += write_source(&mut control, source, receiver);
    }
    if to.tos != 0 {
        let (level, kind) = match receiver {
            SocketAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_TOS),
            SocketAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_TCLASS),
        };
        used += write_control(&mut control, used, level, kind, libc::c_int::from(to.tos));
    }
    if segment < bytes.len() {
        let segment = u16::try_from(segment).map_err(|_| Errno::EINVAL)?;
        used += write_control(&mut control, used, libc::SOL_UDP, libc::UDP_SEGMENT, segment);
    }
    if used > 0 {
        message.msg_control = control.0.as_mut_ptr().cast();
        message.msg_controllen = used;
    }
    let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
    loop {
        // SAFETY: name, iov and control point to live memory of the lengths given, which the
        // call only reads.
        let sent = unsafe { libc::sendmsg(fd, &raw const message, flags) };
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
                ipi6_ifindex: source.scope(),
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
