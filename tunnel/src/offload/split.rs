//! `super-packet -> packets`, in order, as the kernel's `tcp_gso_segment` and
//! `__udp_gso_segment` do (net/ipv4/tcp_offload.c, udp_offload.c).

use std::ops::Range;

use super::checksum::Sum;
use super::header::{Header, Protocol};
use super::packet::{
    CWR, DATA_OFFSET, FIN, PSH, SEQUENCE, TCP, TCP_CHECKSUM, TCP_LEN, UDP, UDP_CHECKSUM, UDP_LEN,
    UDP_LENGTH, put, word,
};
use crate::ip::{Family, half};

/// A packet of the TUN device, and what it is cut into.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Split<'a> {
    packet: &'a [u8],
    how: How,
}

#[derive(Debug, Clone, Copy)]
enum How {
    /// It stays one.
    Whole,
    /// It stays one, and its checksum is to be completed: where what it covers begins, and
    /// where it is.
    Complete { start: usize, at: usize },
    /// It becomes several.
    Cut(Segments),
}

#[derive(Debug, Clone, Copy)]
struct Segments {
    family: Family,
    is_tcp: bool,
    /// Where the transport header begins.
    transport: usize,
    /// Where the payload begins.
    payload: usize,
    /// Payload of each but the last, bytes.
    size: usize,
    /// Of the IPv4 header: the sum of what all packets have in common.
    ip: Sum,
    /// The same of the transport header with its pseudo-header.
    common: Sum,
}

impl<'a> Split<'a> {
    /// `None` if the packet is not what the header says.
    pub(crate) fn of(header: &Header, packet: &'a [u8]) -> Option<Self> {
        let how = match (header.cut, header.checksum) {
            (None, None) => How::Whole,
            (None, Some(checksum)) => {
                let start = usize::from(checksum.start);
                let at = start + usize::from(checksum.offset);
                half(packet, at)?;
                How::Complete { start, at }
            }
            (Some(cut), Some(checksum)) => {
                let (family, is_tcp) = match cut.protocol {
                    Protocol::TcpV4 => (Family::V4, true),
                    Protocol::TcpV6 => (Family::V6, true),
                    Protocol::Udp => (Family::of(packet)?, false),
                };
                if Family::of(packet)? != family {
                    return None;
                }
                let transport = usize::from(checksum.start);
                // What the kernel says of the headers' length is that of its first buffer.
                let len = match is_tcp {
                    true => usize::from(packet.get(transport + DATA_OFFSET)? >> 4) * 4,
                    false => UDP_LEN,
                };
                let (payload, size) = (transport + len, usize::from(cut.size));
                let is_sound = transport >= family.header_len()
                    && (!is_tcp || len >= TCP_LEN)
                    && payload < packet.len()
                    && size > 0;
                if !is_sound {
                    return None;
                }
                let ip = common(packet, 0, [0..2, 6..10, 12..transport]);
                let (protocol, fields) = match is_tcp {
                    true => (TCP, common(packet, transport, [0..4, 8..12, 14..16, 18..len])),
                    false => (UDP, common(packet, transport, [0..2, 2..4])),
                };
                let common = Sum::pseudo_header(family, packet, protocol, 0) + fields;
                How::Cut(Segments { family, is_tcp, transport, payload, size, ip, common })
            }
            (Some(_), None) => return None,
        };
        Some(Self { packet, how })
    }

    /// The packet as it is, with the headers of the first.
    pub(crate) fn bytes(&self) -> &'a [u8] {
        self.packet
    }

    /// How many packets there are.
    pub(crate) fn count(&self) -> usize {
        match &self.how {
            How::Whole | How::Complete { .. } => 1,
            How::Cut(how) => (self.packet.len() - how.payload).div_ceil(how.size),
        }
    }

    /// The length of the packet of this number, bytes.
    pub(crate) fn len(&self, number: usize) -> usize {
        match &self.how {
            How::Whole | How::Complete { .. } => self.packet.len(),
            How::Cut(how) => how.payload + self.payload(how, number).len(),
        }
    }

    fn payload(&self, how: &Segments, number: usize) -> &'a [u8] {
        let rest = self.packet.get(how.payload + number * how.size..).unwrap_or_default();
        rest.get(..how.size).unwrap_or(rest)
    }

    /// Writes the packet of this number to `out`, which is as long.
    pub(crate) fn write(&self, number: usize, out: &mut [u8]) {
        match &self.how {
            How::Whole => out.copy_from_slice(self.packet),
            How::Complete { start, at } => {
                out.copy_from_slice(self.packet);
                // The field holds the pseudo-header's sum, which is summed along.
                Sum::of(out.get(*start..).unwrap_or_default()).store(out, *at);
                // In UDP, 0 says that there is none (RFC 768).
                if half(out, *at) == Some(0) {
                    put(out, *at, &[0xff; 2]);
                }
            }
            How::Cut(how) => {
                let payload = self.payload(how, number);
                let (headers, body) = out.split_at_mut(how.payload);
                headers.copy_from_slice(&self.packet[..how.payload]);
                body.copy_from_slice(payload);
                how.number(headers, number, number + 1 == self.count(), payload);
            }
        }
    }
}

impl Segments {
    /// Makes the headers those of the packet of this number. What is written is not read again: it
    /// could be only once the packet is in the cache.
    fn number(&self, headers: &mut [u8], number: usize, is_last: bool, payload: &[u8]) {
        let len = headers.len() + payload.len();
        // A super-packet has no more packets, nor bytes, than a 16-bit length has.
        let (number, short) = (number as u32, |len: usize| len as u16);
        match self.family {
            Family::V4 => {
                let identification = half(headers, 4).unwrap_or(0).wrapping_add(number as u16);
                put(headers, 2, &short(len).to_be_bytes());
                put(headers, 4, &identification.to_be_bytes());
                let sum = Sum::of_field(short(len)) + Sum::of_field(identification);
                (self.ip + sum).store(headers, 10);
            }
            Family::V6 => put(headers, 4, &short(len - self.family.header_len()).to_be_bytes()),
        }
        let covered = short(len - self.transport);
        let sum = self.common + Sum::of_field(covered) + Sum::of(payload);
        let transport = headers.get_mut(self.transport..).unwrap_or_default();
        if self.is_tcp {
            let sequence = word(transport, SEQUENCE).unwrap_or(0);
            let sequence = sequence.wrapping_add(number.wrapping_mul(self.size as u32));
            let mut flags = half(transport, DATA_OFFSET).unwrap_or(0);
            flags &= if is_last { !0 } else { !u16::from(FIN | PSH) };
            flags &= if number == 0 { !0 } else { !u16::from(CWR) };
            put(transport, SEQUENCE, &sequence.to_be_bytes());
            put(transport, DATA_OFFSET, &flags.to_be_bytes());
            let sequence = Sum::of_field((sequence >> 16) as u16) + Sum::of_field(sequence as u16);
            (sum + sequence + Sum::of_field(flags)).store(transport, TCP_CHECKSUM);
        } else {
            put(transport, UDP_LENGTH, &covered.to_be_bytes());
            let checksum = !(sum + Sum::of_field(covered)).fold();
            // In UDP, 0 says that there is none (RFC 768).
            let checksum = if checksum == 0 { 0xffff } else { checksum };
            put(transport, UDP_CHECKSUM, &checksum.to_ne_bytes());
        }
    }
}

/// The sum of fields of a header, which begins at `at`.
fn common<const N: usize>(packet: &[u8], at: usize, fields: [Range<usize>; N]) -> Sum {
    let header = packet.get(at..).unwrap_or_default();
    let sum = |field: Range<usize>| Sum::of(header.get(field).unwrap_or_default());
    fields.into_iter().fold(Sum::default(), |all, field| all + sum(field))
}
