//! Where things are in the headers of TCP and UDP.

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
