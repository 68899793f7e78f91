//! `super-packet -> packets`, in order, as the kernel's `tcp_gso_segment` and
//! `__udp_gso_segment` do (net/ipv4/tcp_offload.c, udp_offload.c).

use super::checksum::Sum;
use super::header::{Header, Protocol};
use super::packet::{
    CWR, DATA_OFFSET, FIN, FLAGS, PSH, SEQUENCE, TCP, TCP_CHECKSUM, TCP_LEN, UDP, UDP_CHECKSUM,
    UDP_LEN, UDP_LENGTH, put, word,
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
                How::Cut(Segments { family, is_tcp, transport, payload, size })
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
    /// Makes the headers those of the packet of this number.
    fn number(&self, headers: &mut [u8], number: usize, is_last: bool, payload: &[u8]) {
        let len = headers.len() + payload.len();
        // A super-packet has no more packets, nor bytes, than a 16-bit length has.
        let (number, short) = (number as u32, |len: usize| (len as u16).to_be_bytes());
        match self.family {
            Family::V4 => {
                put(headers, 2, &short(len));
                let identification = half(headers, 4).unwrap_or(0).wrapping_add(number as u16);
                put(headers, 4, &identification.to_be_bytes());
                put(headers, 10, &[0; 2]);
                Sum::of(headers.get(..self.transport).unwrap_or_default()).store(headers, 10);
            }
            Family::V6 => put(headers, 4, &short(len - self.family.header_len())),
        }
        let covered = len - self.transport;
        let (protocol, at) = match self.is_tcp {
            true => (TCP, TCP_CHECKSUM),
            false => (UDP, UDP_CHECKSUM),
        };
        let sum = Sum::pseudo_header(self.family, headers, protocol, covered) + Sum::of(payload);
        let transport = headers.get_mut(self.transport..).unwrap_or_default();
        if self.is_tcp {
            let sequence = word(transport, SEQUENCE).unwrap_or(0);
            let sequence = sequence.wrapping_add(number.wrapping_mul(self.size as u32));
            put(transport, SEQUENCE, &sequence.to_be_bytes());
            if let Some(flags) = transport.get_mut(FLAGS) {
                *flags &= if is_last { !0 } else { !(FIN | PSH) };
                *flags &= if number == 0 { !0 } else { !CWR };
            }
        } else {
            put(transport, UDP_LENGTH, &short(covered));
        }
        put(transport, at, &[0; 2]);
        // Headers are of an even length, so that the payload's words are in place.
        (sum + Sum::of(transport)).store(transport, at);
        if !self.is_tcp && half(transport, at) == Some(0) {
            put(transport, at, &[0xff; 2]);
        }
    }
}
