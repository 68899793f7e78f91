//! Messages of the netlink subsystem nftables, for the few questions that the program `nft`,
//! which takes some ten milliseconds and which a host may lack, need not be asked.

use std::io;

use super::netlink::split_message;

/// Subsystem nftables, of linux/netfilter/nfnetlink.h, as it stands in a message's type.
pub(super) const NFTABLES: u8 = 10;
/// `NFPROTO_INET` of linux/netfilter.h.
pub(crate) const INET: u8 = 1;
const NETLINK_HEADER_BYTES: usize = 16;
/// A netlink header and the `nfgenmsg` that follows it.
pub(super) const HEADER_BYTES: usize = NETLINK_HEADER_BYTES + 4;
/// Type of a message that carries an errno.
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;

/// A request to the subsystem, with attributes that are texts.
pub(crate) fn request(message: u8, family: u8, attributes: &[(u16, &str)]) -> Vec<u8> {
    let mut bytes = vec![0; NETLINK_HEADER_BYTES];
    bytes.extend([family, 0, 0, 0]);
    for (kind, text) in attributes {
        // With the zero that ends it; the next attribute is aligned to four bytes.
        let length = 4 + text.len() + 1;
        let next = bytes.len() + length.next_multiple_of(4);
        bytes.extend((length as u16).to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(text.bytes());
        bytes.resize(next, 0);
    }
    let length = bytes.len() as u32;
    bytes[..4].copy_from_slice(&length.to_ne_bytes());
    bytes[4..6].copy_from_slice(&message_type(message).to_ne_bytes());
    bytes[6..8].copy_from_slice(&NLM_F_REQUEST.to_ne_bytes());
    bytes
}

/// What the kernel refused the question with.
pub(crate) fn errno(reply: &[u8]) -> Option<io::Error> {
    let (message, _) = split_message(reply)?;
    let code = i32::from_ne_bytes(*message.get(NETLINK_HEADER_BYTES..)?.first_chunk()?);
    let is_error = *message.get(4..6)? == NLMSG_ERROR.to_ne_bytes() && code < 0;
    is_error.then(|| io::Error::from_raw_os_error(code.saturating_neg()))
}

/// Whether a reply is this message of the subsystem.
pub(crate) fn is(reply: &[u8], message: u8) -> bool {
    split_message(reply)
        .is_some_and(|(reply, _)| reply[4..6] == message_type(message).to_ne_bytes())
}

fn message_type(message: u8) -> u16 {
    u16::from(NFTABLES) << 8 | u16::from(message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apply::netlink::attributes;

    #[test]
    fn a_request_is_whole_and_its_attributes_are_read_back() {
        for texts in [&[][..], &[(1, "gambeson"), (3, "guard_out")], &[(1, ""), (3, "abc")]] {
            let bytes = request(4, INET, texts);
            let (message, rest) = split_message(&bytes).unwrap();
            assert_eq!((message.len(), rest), (bytes.len(), &[][..]));
            assert!(is(&bytes, 4) && !is(&bytes, 3));
            assert_eq!(bytes.len() % 4, 0);
            let read: Vec<_> = attributes(&message[HEADER_BYTES..]).collect();
            let zero = |text: &str| [text.as_bytes(), b"\0"].concat();
            let expected: Vec<_> = texts.iter().map(|(kind, text)| (*kind, zero(text))).collect();
            let read: Vec<_> =
                read.into_iter().map(|(kind, value)| (kind, value.to_vec())).collect();
            assert_eq!(read, expected);
        }
    }

    #[test]
    fn no_reply_panics() {
        let refused =
            [&20_u32.to_ne_bytes()[..], &2_u16.to_ne_bytes(), &[0; 10], &(-2_i32).to_ne_bytes()]
                .concat();
        assert_eq!(errno(&refused).unwrap().kind(), io::ErrorKind::NotFound);
        for cut in 0..refused.len() {
            assert!(errno(&refused[..cut]).is_none());
            assert!(!is(&refused[..cut], 3));
        }
    }
}
