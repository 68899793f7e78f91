//! The Internet checksum (RFC 1071).

use super::packet::put;
use crate::ip::Family;

/// A sum of 16-bit words that is not folded yet, in the byte order of the host: the checksum
/// does not depend on it as long as what is read and written has the same (RFC 1071, 2).
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Sum(u64);

impl Sum {
    /// The words of `bytes`, which begin at an even place. A last odd byte is followed by a zero.
    pub(super) fn of(bytes: &[u8]) -> Self {
        let mut sum = 0u64;
        // Halves of words, so that carries have room; this is what vectorises.
        let (words, rest) = bytes.as_chunks::<8>();
        for word in words {
            sum += halved(u64::from_ne_bytes(*word));
        }
        // By itself, not in a buffer, which could be read only once the packet is in the cache.
        let (pairs, last) = rest.as_chunks::<2>();
        for pair in pairs {
            sum += u64::from(u16::from_ne_bytes(*pair));
        }
        Self(sum + last.first().map_or(0, |last| u64::from(u16::from_ne_bytes([*last, 0]))))
    }

    /// A 16-bit field.
    pub(super) fn of_field(value: u16) -> Self {
        Self(u64::from(value.to_be()))
    }

    /// The pseudo-header of a transport segment of `len` bytes (RFC 9293, 3.1; RFC 8200, 8.1).
    pub(super) fn pseudo_header(family: Family, packet: &[u8], protocol: u8, len: usize) -> Self {
        let addresses = packet.get(family.addresses()).unwrap_or_default();
        let len = u16::try_from(len).unwrap_or(u16::MAX);
        Self::of(addresses) + Self::of_field(protocol.into()) + Self::of_field(len)
    }

    pub(super) fn fold(self) -> u16 {
        let mut sum = halved(self.0);
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        // At most 16 bits are left.
        sum as u16
    }

    /// Writes the checksum at `at`.
    pub(super) fn store(self, packet: &mut [u8], at: usize) {
        put(packet, at, &(!self.fold()).to_ne_bytes());
    }
}

impl std::ops::Add for Sum {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self(halved(self.0) + halved(other.0))
    }
}

/// Folded to 33 bits, so that no number of additions overflows.
fn halved(sum: u64) -> u64 {
    (sum & 0xffff_ffff) + (sum >> 32)
}
