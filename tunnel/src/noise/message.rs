//! The four messages as bytes (WireGuard paper, 5.4).

pub(super) const INITIATION: u32 = 1;
pub(super) const RESPONSE: u32 = 2;
pub(super) const COOKIE: u32 = 3;
pub(super) const DATA: u32 = 4;

/// The length of an initiation, bytes: the longest handshake message.
pub(crate) const INITIATION_LEN: usize = 148;
pub(super) const RESPONSE_LEN: usize = 92;
/// The length of a cookie reply, bytes.
pub(crate) const COOKIE_LEN: usize = 64;
/// What comes before the ciphertext of a data message, bytes.
pub(crate) const DATA_HEADER: usize = 16;
/// The two MACs at the end of an initiation and of a response, bytes each.
pub(super) const MAC: usize = 16;

/// A datagram's type and our index in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Message {
    Initiation,
    Response { receiver: u32 },
    Cookie { receiver: u32 },
    Data { receiver: u32 },
}

impl Message {
    /// By type and length, with zeros in the reserved bytes.
    pub(crate) fn of(datagram: &[u8]) -> Option<Self> {
        match (word(datagram, 0)?, datagram.len()) {
            (DATA, super::OVERHEAD..) => Some(Self::Data { receiver: word(datagram, 4)? }),
            (INITIATION, INITIATION_LEN) => Some(Self::Initiation),
            (RESPONSE, RESPONSE_LEN) => Some(Self::Response { receiver: word(datagram, 8)? }),
            (COOKIE, COOKIE_LEN) => Some(Self::Cookie { receiver: word(datagram, 4)? }),
            _ => None,
        }
    }
}

/// A little-endian word.
pub(super) fn word(bytes: &[u8], at: usize) -> Option<u32> {
    array(bytes, at).map(u32::from_le_bytes)
}

pub(super) fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}
