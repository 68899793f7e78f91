//! What the tunnel reads of IP headers, and the one thing that it writes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Range;

/// Explicit congestion notification (RFC 3168): the two bits of a packet that met a queue.
pub(crate) const CE: u8 = 3;

/// The version of the Internet protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Family {
    V4,
    V6,
}

impl Family {
    /// Of a packet whose header is all there.
    pub(crate) fn of(packet: &[u8]) -> Option<Self> {
        match packet.first()? >> 4 {
            4 if packet.len() >= 20 => Some(Self::V4),
            6 if packet.len() >= 40 => Some(Self::V6),
            _ => None,
        }
    }

    /// Of a header without options or extensions, bytes.
    pub(crate) fn header_len(self) -> usize {
        match self {
            Self::V4 => 20,
            Self::V6 => 40,
        }
    }

    /// Where both addresses are.
    pub(crate) fn addresses(self) -> Range<usize> {
        match self {
            Self::V4 => 12..20,
            Self::V6 => 8..40,
        }
    }
}

/// The destination address of an IP packet.
pub(crate) fn destination(packet: &[u8]) -> Option<IpAddr> {
    address(packet, 16, 24)
}

/// The source address of an IP packet.
pub(crate) fn source(packet: &[u8]) -> Option<IpAddr> {
    address(packet, 12, 8)
}

fn address(packet: &[u8], v4: usize, v6: usize) -> Option<IpAddr> {
    match Family::of(packet)? {
        Family::V4 => {
            packet.get(v4..)?.first_chunk::<4>().map(|octets| Ipv4Addr::from(*octets).into())
        }
        Family::V6 => {
            packet.get(v6..)?.first_chunk::<16>().map(|octets| Ipv6Addr::from(*octets).into())
        }
    }
}

/// The length that an IP packet says it has, if it is all there.
pub(crate) fn len(packet: &[u8]) -> Option<usize> {
    let len = match Family::of(packet)? {
        Family::V4 => usize::from(half(packet, 2)?),
        Family::V6 => usize::from(half(packet, 4)?) + 40,
    };
    (len <= packet.len()).then_some(len)
}

/// A 16-bit field.
pub(crate) fn half(packet: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*packet.get(at..)?.first_chunk()?))
}

/// The two bits of explicit congestion notification; 0 if the sender does not take part.
pub(crate) fn ecn(packet: &[u8]) -> u8 {
    match Family::of(packet) {
        Some(Family::V4) => packet[1] & CE,
        Some(Family::V6) => packet[1] >> 4 & CE,
        None => 0,
    }
}

/// Tells the receiver of a packet that the datagram around it met a queue, if the sender
/// takes part (RFC 6040, 4.2).
pub(crate) fn set_congested(packet: &mut [u8]) {
    match (Family::of(packet), ecn(packet)) {
        (None, _) | (_, 0 | CE) => {}
        (Some(Family::V4), ecn) => {
            packet[1] |= CE;
            // The checksum follows from the difference (RFC 1624, 3).
            let sum = u16::from_be_bytes([packet[10], packet[11]]);
            let (sum, carry) = (!sum).overflowing_add(u16::from(CE - ecn));
            packet[10..12].copy_from_slice(&(!(sum + u16::from(carry))).to_be_bytes());
        }
        (Some(Family::V6), _) => packet[1] |= CE << 4,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The Internet checksum of a header whose own is in place: 0 (RFC 1071).
    fn sum(header: &[u8]) -> u16 {
        let words = header.chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(word[1]));
        let mut sum: u32 = words.sum();
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !u16::try_from(sum).unwrap()
    }

    proptest! {
        #[test]
        fn congestion_is_told_to_those_who_take_part(
            mut header in prop::collection::vec(any::<u8>(), 20),
            ecn_before in 0..=CE,
        ) {
            header[0] = 0x45;
            header[1] = header[1] & !CE | ecn_before;
            header[10..12].fill(0);
            let checksum = sum(&header);
            header[10..12].copy_from_slice(&checksum.to_be_bytes());
            let dscp = header[1] & !CE;
            set_congested(&mut header);
            prop_assert_eq!(ecn(&header), if ecn_before == 0 { 0 } else { CE });
            prop_assert_eq!(header[1] & !CE, dscp);
            prop_assert_eq!(sum(&header), 0);
        }
    }

    #[test]
    fn ipv6_has_it_in_the_traffic_class() {
        let mut packet = [0; 40];
        packet[0] = 0x6f;
        packet[1] = 0xdf;
        assert_eq!(ecn(&packet), 1);
        set_congested(&mut packet);
        assert_eq!(packet[..2], [0x6f, 0xff]);
        packet[1] = 0xcf;
        set_congested(&mut packet);
        assert_eq!(packet[1], 0xcf);
        set_congested(&mut packet[..39]);
    }
}
