//! The few netlink messages that the tunnel needs (rtnetlink(7)).

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd as _, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, sendto,
    socket,
};

/// struct nlmsghdr
const HEADER: usize = 16;
/// struct ifinfomsg
const LINK: usize = 16;
/// struct rtmsg
const ROUTE: usize = 12;

/// Sets one attribute of a link, and waits until the kernel says that it has.
pub(crate) fn set_link(index: u32, kind: u16, value: &[u8]) -> io::Result<()> {
    let mut link = [0; LINK];
    link[4..8].copy_from_slice(&index.to_ne_bytes());
    let request = message(libc::RTM_SETLINK, libc::NLM_F_ACK, &link, &[(kind, value)])?;
    let reply = ask(&netlink(0)?, &request)?;
    match error(&reply) {
        Some(0) => Ok(()),
        Some(code) => Err(io::Error::from_raw_os_error(-code)),
        None => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Asks which interface a datagram would leave by.
pub(crate) struct Routes(OwnedFd);

impl Routes {
    pub(crate) fn open() -> io::Result<Self> {
        netlink(0).map(Self)
    }

    /// The interface for datagrams from `from` to `to` with this mark; `None` if they cannot go.
    pub(crate) fn interface(&self, from: IpAddr, to: IpAddr, mark: u32) -> Option<u32> {
        let (from, to) = (octets(from), octets(to));
        let family = if to.len() == 4 { libc::AF_INET } else { libc::AF_INET6 };
        let mut route = [0; ROUTE];
        route[0] = u8::try_from(family).ok()?;
        route[1] = u8::try_from(to.len() * 8).ok()?;
        route[2] = u8::try_from(from.len() * 8).ok()?;
        let mark = mark.to_ne_bytes();
        let attributes = [
            (libc::RTA_DST, to.as_slice()),
            (libc::RTA_SRC, from.as_slice()),
            (libc::RTA_MARK, mark.as_slice()),
        ];
        let request = message(libc::RTM_GETROUTE, 0, &route, &attributes).ok()?;
        let reply = ask(&self.0, &request).ok()?;
        if reply.get(4..6)? != libc::RTM_NEWROUTE.to_ne_bytes() {
            return None;
        }
        let value = attribute(reply.get(HEADER + ROUTE..)?, libc::RTA_OIF)?;
        Some(u32::from_ne_bytes(value.try_into().ok()?))
    }
}

/// A socket that becomes readable when a link, an address, a route or a rule changes.
pub(crate) fn watch() -> io::Result<OwnedFd> {
    let groups = libc::RTMGRP_LINK
        | libc::RTMGRP_IPV4_IFADDR
        | libc::RTMGRP_IPV6_IFADDR
        | libc::RTMGRP_IPV4_ROUTE
        | libc::RTMGRP_IPV6_ROUTE
        | libc::RTMGRP_IPV4_RULE
        | 1 << (libc::RTNLGRP_IPV6_RULE - 1);
    netlink(groups.cast_unsigned())
}

/// Reads what a [`watch`] socket has. What it says does not matter.
pub(crate) fn drain(fd: &OwnedFd) {
    let mut buffer = [0u8; 8192];
    // ENOBUFS says that messages were lost; the next call goes on after it.
    while matches!(
        recv(fd.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT),
        Ok(1..) | Err(Errno::ENOBUFS | Errno::EINTR)
    ) {}
}

fn netlink(groups: u32) -> io::Result<OwnedFd> {
    let fd = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkRoute,
    )?;
    bind(fd.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
    Ok(fd)
}

/// One request and the kernel's answer, which is there when the request returns.
fn ask(fd: &OwnedFd, request: &[u8]) -> io::Result<Vec<u8>> {
    sendto(fd.as_raw_fd(), request, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    let mut reply = vec![0; 4096];
    let len = recv(fd.as_raw_fd(), &mut reply, MsgFlags::MSG_DONTWAIT)?;
    reply.truncate(len);
    Ok(reply)
}

fn message(
    kind: u16,
    flags: libc::c_int,
    body: &[u8],
    attributes: &[(u16, &[u8])],
) -> io::Result<Vec<u8>> {
    let too_long = |_| io::Error::from(Errno::EMSGSIZE);
    let flags = u16::try_from(libc::NLM_F_REQUEST | flags).map_err(too_long)?;
    let mut message = vec![0; 4];
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend([0; 8]);
    message.extend(body);
    for (kind, value) in attributes {
        let len = u16::try_from(value.len() + 4).map_err(too_long)?;
        message.extend(len.to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend(*value);
        message.resize(message.len().next_multiple_of(4), 0);
    }
    let len = u32::try_from(message.len()).map_err(too_long)?;
    message[..4].copy_from_slice(&len.to_ne_bytes());
    Ok(message)
}

/// The code of an NLMSG_ERROR, 0 for an acknowledgement.
fn error(reply: &[u8]) -> Option<i32> {
    let code = reply.get(HEADER..HEADER + 4)?;
    Some(i32::from_ne_bytes(code.try_into().ok()?))
}

/// The first attribute of this kind.
fn attribute(mut bytes: &[u8], kind: u16) -> Option<&[u8]> {
    loop {
        let len = usize::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
        if bytes.get(2..4)? == kind.to_ne_bytes() {
            return bytes.get(4..len);
        }
        // An attribute shorter than its header would never end.
        bytes = bytes.get(len.max(4).next_multiple_of(4)..)?;
    }
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_says_where_a_datagram_leaves() {
        let routes = Routes::open().unwrap();
        let home: IpAddr = [127, 0, 0, 1].into();
        assert_eq!(routes.interface(home, [127, 0, 0, 2].into(), 0), Some(1));
        let foreign = [192, 0, 2, 77].into();
        assert_eq!(routes.interface(foreign, [127, 0, 0, 2].into(), 0), None);
    }
}
