//! The header that a TUN device puts before each packet: `struct virtio_net_hdr`
//! (include/uapi/linux/virtio_net.h), in the byte order of the host.

/// Of the header, bytes.
pub(crate) const HEADER_LEN: usize = 10;

/// The checksum is partial: the pseudo-header's alone (`VIRTIO_NET_HDR_F_NEEDS_CSUM`).
const NEEDS_CHECKSUM: u8 = 1;

const NONE: u8 = 0;
const TCP_V4: u8 = 1;
const TCP_V6: u8 = 4;
const UDP: u8 = 5;
/// Beside a type: the first packet has CWR set.
const ECN: u8 = 0x80;

/// How a packet is to be cut, and whether its checksum is missing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Header {
    /// What it is cut into.
    pub(crate) cut: Option<Cut>,
    /// Where the transport header begins, and where in it the checksum is, bytes; if the
    /// checksum is partial.
    pub(crate) checksum: Option<Checksum>,
}

/// A super-packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cut {
    pub(crate) protocol: Protocol,
    /// Payload of each packet but the last, bytes.
    pub(crate) size: u16,
    /// Length of the headers together, bytes. The kernel may say more.
    pub(crate) headers: u16,
}

/// Where a partial checksum is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Checksum {
    /// What it covers begins here, bytes from the start of the packet.
    pub(crate) start: u16,
    /// Its place, bytes from there.
    pub(crate) offset: u16,
}

/// What can be cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    TcpV4,
    TcpV6,
    Udp,
}

impl Header {
    /// Of a packet that the kernel has written; `None` if it is of a kind that was not asked for.
    pub(crate) fn read(bytes: &[u8; HEADER_LEN]) -> Option<Self> {
        let half = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        let protocol = match bytes[1] & !ECN {
            NONE => None,
            TCP_V4 => Some(Protocol::TcpV4),
            TCP_V6 => Some(Protocol::TcpV6),
            UDP => Some(Protocol::Udp),
            _ => return None,
        };
        let cut = protocol.map(|protocol| Cut { protocol, headers: half(2), size: half(4) });
        let is_partial = bytes[0] & NEEDS_CHECKSUM != 0;
        let checksum = is_partial.then(|| Checksum { start: half(6), offset: half(8) });
        Some(Self { cut, checksum })
    }

    /// For the kernel to read.
    pub(crate) fn write(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        if let Some(cut) = self.cut {
            bytes[1] = match cut.protocol {
                Protocol::TcpV4 => TCP_V4,
                Protocol::TcpV6 => TCP_V6,
                Protocol::Udp => UDP,
            };
            bytes[2..4].copy_from_slice(&cut.headers.to_ne_bytes());
            bytes[4..6].copy_from_slice(&cut.size.to_ne_bytes());
        }
        if let Some(checksum) = self.checksum {
            bytes[0] = NEEDS_CHECKSUM;
            bytes[6..8].copy_from_slice(&checksum.start.to_ne_bytes());
            bytes[8..10].copy_from_slice(&checksum.offset.to_ne_bytes());
        }
        bytes
    }
}
