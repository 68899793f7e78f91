//! Where things are in the headers of a packet.

use std::ops::Range;

pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;

/// Length of a TCP header without options, and of a UDP header, bytes.
pub(super) const TCP_LEN: usize = 20;
pub(super) const UDP_LEN: usize = 8;

/// Offsets in a TCP header.
pub(super) const SEQUENCE: usize = 4;
pub(super) const ACKNOWLEDGEMENT: usize = 8;
pub(super) const DATA_OFFSET: usize = 12;
pub(super) const FLAGS: usize = 13;
pub(super) const WINDOW: usize = 14;
pub(super) const TCP_CHECKSUM: usize = 16;
/// Offsets in a UDP header.
pub(super) const UDP_LENGTH: usize = 4;
pub(super) const UDP_CHECKSUM: usize = 6;

/// TCP flags.
pub(super) const FIN: u8 = 0x01;
pub(super) const PSH: u8 = 0x08;
pub(super) const ACK: u8 = 0x10;
pub(super) const ECE: u8 = 0x40;
pub(super) const CWR: u8 = 0x80;

/// The version of the Internet protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    V4,
    V6,
}

impl Family {
    /// Of a packet with a whole header.
    pub(super) fn of(packet: &[u8]) -> Option<Self> {
        match packet.first()? >> 4 {
            4 if packet.len() >= 20 => Some(Self::V4),
            6 if packet.len() >= 40 => Some(Self::V6),
            _ => None,
        }
    }

    /// Of a header without options or extensions, bytes.
    pub(super) fn header_len(self) -> usize {
        match self {
            Self::V4 => 20,
            Self::V6 => 40,
        }
    }

    /// Where both addresses are.
    pub(super) fn addresses(self) -> Range<usize> {
        match self {
            Self::V4 => 12..20,
            Self::V6 => 8..40,
        }
    }
}

/// A 16-bit field.
pub(super) fn half(packet: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*packet.get(at..)?.first_chunk()?))
}

/// A 32-bit field.
pub(super) fn word(packet: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(*packet.get(at..)?.first_chunk()?))
}

/// Writes a field; one that is not there is left out.
pub(super) fn put(packet: &mut [u8], at: usize, value: &[u8]) {
    if let Some(field) = packet.get_mut(at..at + value.len()) {
        field.copy_from_slice(value);
    }
}
