//! The network device behind a TUN queue: name, MTU, alias, up or down.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

use nix::errno::Errno;
use nix::net::if_::{if_indextoname, if_nametoindex};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, sendto,
    socket,
};

const HEADER: usize = 16;
const IFINFO: usize = 16;

/// A network device, by its index: it may be renamed while we run.
pub(crate) struct Link {
    index: u32,
    control: OwnedFd,
}

/// What we follow of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LinkState {
    pub(crate) up: bool,
    /// Bytes.
    pub(crate) mtu: usize,
}

impl Link {
    pub(super) fn exists(name: &str) -> bool {
        if_nametoindex(name).is_ok()
    }

    pub(super) fn open(name: &str) -> io::Result<Self> {
        let control = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
            .or_else(|_| {
                socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
            })?;
        Ok(Self { index: if_nametoindex(name)?, control })
    }

    pub(super) fn set_mtu(&self, mtu: u32) -> io::Result<()> {
        let mut request = self.request()?;
        request.ifr_ifru.ifru_mtu = i32::try_from(mtu).map_err(|_| Errno::EINVAL)?;
        self.ioctl(libc::SIOCSIFMTU, &mut request)
    }

    /// Whether the device is up, and its MTU, now.
    pub(crate) fn state(&self) -> io::Result<LinkState> {
        let mut request = self.request()?;
        self.ioctl(libc::SIOCGIFFLAGS, &mut request)?;
        // SAFETY: SIOCGIFFLAGS has filled in the flags.
        let flags = i32::from(unsafe { request.ifr_ifru.ifru_flags });
        self.ioctl(libc::SIOCGIFMTU, &mut request)?;
        // SAFETY: SIOCGIFMTU has filled in the MTU.
        let mtu = unsafe { request.ifr_ifru.ifru_mtu };
        Ok(LinkState { up: flags & libc::IFF_UP != 0, mtu: usize::try_from(mtu).unwrap_or(0) })
    }

    pub(super) fn set_alias(&self, alias: &str) -> io::Result<()> {
        self.set_attribute(libc::IFLA_IFALIAS, alias.as_bytes())
    }

    pub(super) fn rename(&self, name: &str) -> io::Result<()> {
        let mut value = name.as_bytes().to_vec();
        value.push(0);
        self.set_attribute(libc::IFLA_IFNAME, &value)
    }

    /// How many packets may wait for us to read them (`txqueuelen`).
    pub(super) fn set_queue_length(&self, packets: u32) -> io::Result<()> {
        self.set_attribute(libc::IFLA_TXQLEN, &packets.to_ne_bytes())
    }

    fn request(&self) -> io::Result<libc::ifreq> {
        let name = if_indextoname(self.index)?;
        request(name.to_str().map_err(|_| Errno::EINVAL)?)
    }

    fn ioctl(&self, code: libc::c_ulong, request: &mut libc::ifreq) -> io::Result<()> {
        // SAFETY: the codes used here read and write an ifreq, which outlives the call.
        let result = unsafe { libc::ioctl(self.control.as_raw_fd(), code, &raw mut *request) };
        Errno::result(result)?;
        Ok(())
    }

    /// One RTM_SETLINK with one attribute, acknowledged.
    fn set_attribute(&self, kind: u16, value: &[u8]) -> io::Result<()> {
        let fd = netlink(0)?;
        sendto(
            fd.as_raw_fd(),
            &self.message(kind, value)?,
            &NetlinkAddr::new(0, 0),
            MsgFlags::empty(),
        )?;
        let mut reply = [0u8; 1024];
        let len = recv(fd.as_raw_fd(), &mut reply, MsgFlags::empty())?;
        let code = reply[..len].get(HEADER..HEADER + 4).and_then(|bytes| bytes.try_into().ok());
        match code.map(i32::from_ne_bytes) {
            Some(0) => Ok(()),
            Some(code) => Err(io::Error::from_raw_os_error(-code)),
            None => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    fn message(&self, kind: u16, value: &[u8]) -> io::Result<Vec<u8>> {
        let too_long = |_| io::Error::from(Errno::EMSGSIZE);
        let attribute = u16::try_from(value.len() + 4).map_err(too_long)?;
        let total = HEADER + IFINFO + usize::from(attribute).next_multiple_of(4);
        let flags = u16::try_from(libc::NLM_F_REQUEST | libc::NLM_F_ACK).unwrap_or_default();
        let mut message = Vec::with_capacity(total);
        // struct nlmsghdr
        message.extend(u32::try_from(total).map_err(too_long)?.to_ne_bytes());
        message.extend(libc::RTM_SETLINK.to_ne_bytes());
        message.extend(flags.to_ne_bytes());
        message.extend([0; 8]);
        // struct ifinfomsg
        message.extend([0; 4]);
        message.extend(self.index.to_ne_bytes());
        message.extend([0; 8]);
        // struct rtattr
        message.extend(attribute.to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend(value);
        message.resize(total, 0);
        Ok(message)
    }
}

/// A socket that becomes readable when any link changes. What it says does not matter.
pub(crate) fn watch_links() -> io::Result<OwnedFd> {
    netlink(libc::RTMGRP_LINK as u32)
}

/// Reads what a [`watch_links`] socket has.
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

/// An interface request for this name, otherwise zero.
pub(super) fn request(name: &str) -> io::Result<libc::ifreq> {
    if name.len() >= libc::IFNAMSIZ {
        return Err(Errno::EINVAL.into());
    }
    // SAFETY: an ifreq is plain data, for which zero is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    Ok(request)
}

pub(super) fn name_of(request: &libc::ifreq) -> String {
    let bytes: Vec<u8> = request.ifr_name.iter().map(|c| c.cast_unsigned()).collect();
    CStr::from_bytes_until_nul(&bytes)
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}
