//! The TUN device: made, read and written.

mod link;

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, IoSliceMut, Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;

use crate::batch::{Batch, MAX_PACKET};
use crate::error::TunnelError;
use crate::offload::{Coalescer, HEADER_LEN, Header, MAX_PACKETS, Merged, Offload};
pub(crate) use link::Link;

/// Stop reading at this many packets or bytes, so that a batch stays in the cache and
/// its first packet does not wait for long.
const BATCH_PACKETS: usize = 128;
const BATCH_BYTES: usize = 256 << 10;

/// How many packets wait in the device while we are not running. The kernel's 500 are gone
/// after half a second without the processor at 1,000 packets/s.
const QUEUE_PACKETS: u32 = 4096;

/// A TUN device that this process made. It goes away with the process.
pub(crate) struct Tun {
    link: Link,
    queues: Vec<Queue>,
}

/// A queue of a TUN device. The packets of a flow come by one queue: that which the flow's other
/// direction was last written to (`tun_flow_update`, drivers/net/tun.c), or by a hash.
pub(crate) struct Queue {
    file: File,
    /// What the kernel has agreed to.
    offload: Offload,
    /// Whether it takes what it has agreed to.
    merges: AtomicBool,
}

/// What a read or a write says about the device.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Alive {
    Yes,
    /// It was deleted.
    Gone,
}

impl Tun {
    /// Makes the device `name` with an MTU in bytes and, if given, an alias.
    ///
    /// With an alias, the device is made under another name first and renamed last, so that
    /// it never has this name without the alias. `offload` asks for super-packets.
    pub(crate) fn create(
        name: &str,
        mtu: u32,
        alias: Option<&str>,
        queues: usize,
        offload: bool,
    ) -> Result<Self, TunnelError> {
        if !is_device_name(name) {
            return Err(TunnelError::InvalidName { name: name.to_owned() });
        }
        if Link::exists(name) {
            return Err(TunnelError::NameTaken { name: name.to_owned() });
        }
        let file = open()?;
        let first_name = if alias.is_some() { "gbn-tun%d" } else { name };
        let several = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
        // Exclusive: never attach to a device that somebody else made.
        let made = attach(&file, first_name, several | libc::IFF_TUN_EXCL)
            .map_err(|source| creation_error(name, source))?;
        let mut files = vec![file];
        for _ in 1..queues {
            let file = open()?;
            attach(&file, &made, several)
                .map_err(|source| failed("add a queue to", name, source))?;
            files.push(file);
        }
        let link = Link::open(&made).map_err(|source| failed("find the index", name, source))?;
        link.set_mtu(mtu).map_err(|source| failed("set the MTU", name, source))?;
        link.set_queue_length(QUEUE_PACKETS)
            .map_err(|source| failed("set the queue length", name, source))?;
        if let Some(alias) = alias {
            link.set_alias(alias).map_err(|source| failed("set the alias", name, source))?;
            link.rename(name).map_err(|source| creation_error(name, source))?;
        }
        let offload = if offload { agree(&files[0]) } else { Offload::Nothing };
        tracing::info!(?offload, queues, "TUN device made");
        let queue = |file| Queue { file, offload, merges: AtomicBool::new(true) };
        Ok(Self { link, queues: files.into_iter().map(queue).collect() })
    }

    pub(crate) fn link(&self) -> &Link {
        &self.link
    }

    pub(crate) fn queues(&self) -> &[Queue] {
        &self.queues
    }
}

impl Queue {
    /// Adds packets to `batch` until there are none or the batch is full.
    pub(crate) fn read(&self, batch: &mut Batch) -> Alive {
        let mut header = [0; HEADER_LEN];
        while batch.len() < BATCH_PACKETS && batch.used() < BATCH_BYTES {
            let mut parts =
                [IoSliceMut::new(&mut header), IoSliceMut::new(batch.space(MAX_PACKET))];
            match (&self.file).read_vectored(&mut parts) {
                Ok(0) => return Alive::Yes,
                Ok(len) => match Header::read(&header) {
                    Some(header) => batch.commit(len.saturating_sub(HEADER_LEN), header),
                    None => tracing::debug!(?header, "a packet of a kind that was not asked for"),
                },
                Err(error) => match error.raw_os_error().map(Errno::from_raw) {
                    Some(Errno::EBADFD) => return Alive::Gone,
                    Some(Errno::EINTR) => {}
                    _ => return Alive::Yes,
                },
            }
        }
        Alive::Yes
    }

    /// Writes packets, neighbours of a flow as one. What the device does not take (it is down, or
    /// the packet is not IP) is dropped.
    pub(crate) fn write(&self, packets: &[&[u8]], coalescer: &mut Coalescer) {
        let merges = self.merges.load(Ordering::Relaxed);
        coalescer.group(packets, if merges { self.offload } else { Offload::Nothing });
        for group in coalescer.groups() {
            let members = || coalescer.members(group).filter_map(|n| packets.get(n).copied());
            let merged = group.merged(packets);
            if merged.is_some_and(|merged| self.write_merged(&merged, members())) {
                continue;
            }
            for packet in members() {
                let header = Header::default().write();
                if let Err(error) = self.write_parts(&[&header, packet].map(IoSlice::new)) {
                    tracing::trace!(%error, len = packet.len(), "the TUN device refused a packet");
                }
            }
        }
    }

    /// Writes packets as one. `false` if they are to be written one by one.
    fn write_merged<'p>(&self, merged: &Merged, members: impl Iterator<Item = &'p [u8]>) -> bool {
        let header = merged.header.write();
        let mut parts = [IoSlice::new(&[]); MAX_PACKETS + 2];
        let payloads = members.filter_map(|packet| merged.payload(packet));
        let all = [&header, merged.bytes()].into_iter().chain(payloads);
        let mut count = 0;
        for (part, bytes) in parts.iter_mut().zip(all) {
            *part = IoSlice::new(bytes);
            count += 1;
        }
        match self.write_parts(&parts[..count]) {
            // Some kernels refuse what they have agreed to.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                if self.merges.swap(false, Ordering::Relaxed) {
                    tracing::info!(%error, "the TUN device takes no super-packets");
                }
                false
            }
            Err(error) => {
                tracing::trace!(%error, "the TUN device refused a super-packet");
                true
            }
            Ok(()) => true,
        }
    }

    fn write_parts(&self, parts: &[IoSlice<'_>]) -> io::Result<()> {
        (&self.file).write_vectored(parts).map(drop)
    }
}

impl AsFd for Queue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// As `dev_valid_name` of the kernel, and no `%`, which would be a template.
fn is_device_name(name: &str) -> bool {
    (1..libc::IFNAMSIZ).contains(&name.len())
        && name != "."
        && name != ".."
        && !name.bytes().any(|b| matches!(b, b'/' | b':' | b'%' | 0) || b.is_ascii_whitespace())
}

fn open() -> Result<File, TunnelError> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC);
    options.open("/dev/net/tun").map_err(|source| match source.kind() {
        io::ErrorKind::PermissionDenied => TunnelError::NoPermission {
            operation: "open /dev/net/tun",
            capability: "CAP_NET_ADMIN, or the device in the container's device cgroup,",
            source,
        },
        _ => TunnelError::NoTun { source },
    })
}

/// Makes the device of a fresh `/dev/net/tun`, or a queue of it. Returns the name it got.
fn attach(file: &File, name: &str, flags: libc::c_int) -> io::Result<String> {
    let mut request = link::request(name)?;
    let flags = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR | flags;
    // The flag word is unsigned in the kernel; EXCL is its highest bit.
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes an ifreq, which outlives the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    Errno::result(result)?;
    Ok(link::name_of(&request))
}

/// Asks for super-packets, both ways. Returns what the kernel agrees to.
fn agree(file: &File) -> Offload {
    let tcp = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
    let udp = libc::TUN_F_USO4 | libc::TUN_F_USO6;
    let asks = |offload: libc::c_uint| {
        // SAFETY: TUNSETOFFLOAD takes a number and no memory.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, offload) };
        result == 0
    };
    if asks(tcp | udp) {
        Offload::TcpAndUdp
    } else if asks(tcp) {
        Offload::Tcp
    } else {
        Offload::Nothing
    }
}

fn creation_error(name: &str, source: io::Error) -> TunnelError {
    match source.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EBUSY | Errno::EEXIST) => TunnelError::NameTaken { name: name.to_owned() },
        Some(Errno::EPERM) => TunnelError::NoPermission {
            operation: "make a TUN device",
            capability: "CAP_NET_ADMIN",
            source,
        },
        _ => failed("make or name", name, source),
    }
}

fn failed(operation: &'static str, name: &str, source: io::Error) -> TunnelError {
    TunnelError::Tun { operation, name: name.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::is_device_name;

    #[test]
    fn device_names_are_the_kernels() {
        assert!(is_device_name("gambeson0"));
        assert!(is_device_name("abcdefghijklmno"));
        for bad in ["", ".", "..", "a/b", "a b", "a:b", "tun%d", "abcdefghijklmnop", "a\n", "a\0"] {
            assert!(!is_device_name(bad), "{bad:?}");
        }
    }
}
