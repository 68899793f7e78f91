//! The network device behind a TUN queue: name, MTU, alias, up or down.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

use nix::errno::Errno;
use nix::net::if_::{if_indextoname, if_nametoindex};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use crate::netlink::set_link;

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
        set_link(self.index, libc::IFLA_IFALIAS, alias.as_bytes())
    }

    pub(super) fn rename(&self, name: &str) -> io::Result<()> {
        let mut value = name.as_bytes().to_vec();
        value.push(0);
        set_link(self.index, libc::IFLA_IFNAME, &value)
    }

    /// How many packets may wait for us to read them (`txqueuelen`).
    pub(super) fn set_queue_length(&self, packets: u32) -> io::Result<()> {
        set_link(self.index, libc::IFLA_TXQLEN, &packets.to_ne_bytes())
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
