//! `packets -> super-packets`, by the kernel's rules for received packets (GRO:
//! `inet_gro_receive`, `tcp_gro_receive`, `udp_gro_receive`): neighbours of a flow become one if
//! cutting it gives them back.
//!
//! Checksums of TCP and UDP are not looked at: the tag of the message has authenticated the
//! packet. The kernel is given the pseudo-header's sum instead.

use super::Offload;
use super::checksum::Sum;
use super::header::{Checksum, Cut, Header, Protocol};
use super::packet::{
    ACK, ACKNOWLEDGEMENT, DATA_OFFSET, ECE, FLAGS, PSH, SEQUENCE, TCP, TCP_CHECKSUM, TCP_LEN, UDP,
    UDP_CHECKSUM, UDP_LEN, UDP_LENGTH, WINDOW, put, word,
};
use crate::ip::{Family, half};

/// Bytes of a super-packet, as in an IP header.
const MAX_BYTES: usize = 65_535;
/// Packets of a super-packet: more UDP ones the kernel did not cut until 6.9.
pub(crate) const MAX_PACKETS: usize = 64;
/// How many flows are looked through for a packet's.
const FLOWS: usize = 32;
/// More than any headers of a super-packet, bytes.
const HEADERS: usize = 100;

/// Groups the packets of a batch, and keeps its memory from batch to batch.
#[derive(Debug, Default)]
pub(crate) struct Coalescer {
    groups: Vec<Group>,
    /// By packet: the next one of its group.
    next: Vec<Option<usize>>,
}

/// Packets that become one, and those that stay as they are: a group of one.
#[derive(Debug)]
pub(crate) struct Group {
    first: usize,
    last: usize,
    count: usize,
    /// Of the whole, bytes.
    len: usize,
    /// The sequence number of the next packet; `None` if none may follow.
    open: Option<u32>,
    shape: Option<Shape>,
}

/// A packet of TCP or UDP that can be merged with its neighbours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shape {
    family: Family,
    is_tcp: bool,
    /// Of both headers together, bytes.
    headers: usize,
    /// Of the payload, bytes.
    payload: usize,
}

/// The headers of a super-packet, with the one for the TUN device.
pub(crate) struct Merged {
    pub(crate) header: Header,
    bytes: [u8; HEADERS],
    len: usize,
}

impl Coalescer {
    /// Groups packets. The order of a flow's packets stays.
    pub(crate) fn group(&mut self, packets: &[&[u8]], offload: Offload) {
        self.groups.clear();
        self.next.clear();
        self.next.resize(packets.len(), None);
        for (number, packet) in packets.iter().enumerate() {
            self.add(number, packet, packets, offload);
        }
    }

    fn add(&mut self, number: usize, packet: &[u8], packets: &[&[u8]], offload: Offload) {
        let shape = Shape::of(packet, offload);
        let is_neighbour = |group: &&mut Group| is_same_flow(packets[group.first], packet);
        let flow = match is_flow(packet) {
            true => self.groups.iter_mut().rev().take(FLOWS).find(is_neighbour),
            // A fragment, say, may be of any flow.
            false => {
                self.groups.iter_mut().for_each(|group| group.open = None);
                None
            }
        };
        if let (Some(group), Some(shape)) = (flow, shape)
            && group.takes(packets[group.first], packet, shape)
        {
            self.next[group.last] = Some(number);
            return group.push(number, packet, shape);
        }
        // The flow goes on in a new group: the one before takes no more, since it is not found.
        let open = shape.and_then(|shape| shape.next_sequence(packet));
        self.groups.push(Group {
            first: number,
            last: number,
            count: 1,
            len: packet.len(),
            open,
            shape,
        });
    }

    /// The numbers of a group's packets.
    pub(crate) fn members(&self, group: &Group) -> impl Iterator<Item = usize> {
        std::iter::successors(Some(group.first), |number| self.next.get(*number).copied()?)
    }

    /// The groups of the last batch.
    pub(crate) fn groups(&self) -> &[Group] {
        &self.groups
    }
}

impl Group {
    /// The super-packet's headers, from those of the first member, of the batch that was grouped;
    /// `None` for a group of one. What follows are the payloads of all.
    pub(crate) fn merged(&self, packets: &[&[u8]]) -> Option<Merged> {
        let (first, last) = (packets.get(self.first)?, packets.get(self.last)?);
        let shape = self.shape.filter(|_| self.count > 1)?;
        let mut merged = Merged { header: shape.header(), bytes: [0; HEADERS], len: shape.headers };
        let headers = merged.bytes.get_mut(..shape.headers)?;
        headers.copy_from_slice(first.get(..shape.headers)?);
        shape.lengthen(headers, self.len, shape.is_pushed(last));
        Some(merged)
    }

    fn takes(&self, first: &[u8], packet: &[u8], shape: Shape) -> bool {
        let (Some(own), Some(open)) = (self.shape, self.open) else { return false };
        shape.family == own.family
            && shape.is_tcp == own.is_tcp
            && shape.headers == own.headers
            && shape.payload <= own.payload
            && self.count < MAX_PACKETS
            && self.len + shape.payload <= MAX_BYTES
            && own.is_alike(first, packet, self.count)
            && (!own.is_tcp || word(packet, own.transport() + SEQUENCE) == Some(open))
    }

    fn push(&mut self, number: usize, packet: &[u8], shape: Shape) {
        self.last = number;
        self.count += 1;
        self.len += shape.payload;
        let is_last = self.shape.is_none_or(|own| shape.payload < own.payload);
        self.open = shape.next_sequence(packet).filter(|_| !is_last);
    }
}

impl Merged {
    /// What of a member follows the headers.
    pub(crate) fn payload<'p>(&self, packet: &'p [u8]) -> Option<&'p [u8]> {
        packet.get(self.len..)
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}

impl Shape {
    /// `None` for what is not merged: fragments, options and extensions of IP, empty packets,
    /// TCP packets that say more than data and acknowledgement, UDP packets without a checksum.
    fn of(packet: &[u8], offload: Offload) -> Option<Self> {
        let family = Family::of(packet)?;
        let protocol = match family {
            Family::V4 => {
                let is_plain = packet[0] == 0x45
                    && half(packet, 2) == u16::try_from(packet.len()).ok()
                    // Neither more fragments nor an offset.
                    && half(packet, 6)? & 0x3fff == 0
                    && Sum::of(packet.get(..20)?).fold() == 0xffff;
                is_plain.then_some(packet[9])?
            }
            Family::V6 => {
                let is_plain = half(packet, 4) == u16::try_from(packet.len() - 40).ok();
                is_plain.then_some(packet[6])?
            }
        };
        let transport = family.header_len();
        let (is_tcp, len) = match (protocol, offload) {
            (TCP, Offload::Tcp | Offload::TcpAndUdp) => {
                let len = usize::from(packet.get(transport + DATA_OFFSET)? >> 4) * 4;
                let flags = packet.get(transport + FLAGS)? & !(PSH | ECE);
                (len >= TCP_LEN && flags == ACK).then_some((true, len))?
            }
            (UDP, Offload::TcpAndUdp) => {
                let is_whole = half(packet, transport + UDP_LENGTH)
                    == u16::try_from(packet.len() - transport).ok();
                let has_checksum = half(packet, transport + UDP_CHECKSUM)? != 0;
                (is_whole && has_checksum).then_some((false, UDP_LEN))?
            }
            _ => return None,
        };
        let headers = transport + len;
        let payload = packet.len().checked_sub(headers).filter(|payload| *payload > 0)?;
        Some(Self { family, is_tcp, headers, payload })
    }

    /// Where the transport header begins.
    fn transport(&self) -> usize {
        self.family.header_len()
    }

    /// Whether a packet has the headers of the first of a group, as the one of this number, but
    /// for what is a packet's own.
    fn is_alike(&self, first: &[u8], packet: &[u8], number: usize) -> bool {
        let same = |from: usize, to: usize| first.get(from..to) == packet.get(from..to);
        let at = self.transport();
        let is_alike = match self.family {
            Family::V4 => {
                let is_whole_anyway = half(packet, 6).is_some_and(|flags| flags & 0x4000 != 0);
                let identification = half(first, 4).map(|id| id.wrapping_add(number as u16));
                // Without fragments an identification says nothing (RFC 6864, 4).
                same(0, 2) && same(6, 10) && (is_whole_anyway || half(packet, 4) == identification)
            }
            Family::V6 => same(0, 4) && same(6, 8),
        };
        let is_alike_in_tcp = || {
            let flags = |packet: &[u8]| packet.get(at + FLAGS).map(|flags| flags & !PSH);
            same(at + ACKNOWLEDGEMENT, at + FLAGS)
                && flags(first) == flags(packet)
                && same(at + WINDOW, at + TCP_CHECKSUM)
                && same(at + TCP_CHECKSUM + 2, self.headers)
        };
        is_alike && (!self.is_tcp || is_alike_in_tcp())
    }

    /// What follows a packet, if anything may: PSH ends a super-packet.
    fn next_sequence(&self, packet: &[u8]) -> Option<u32> {
        if self.is_pushed(packet) {
            return None;
        }
        if !self.is_tcp {
            return Some(0);
        }
        let sequence = word(packet, self.transport() + SEQUENCE)?;
        Some(sequence.wrapping_add(u32::try_from(self.payload).ok()?))
    }

    fn is_pushed(&self, packet: &[u8]) -> bool {
        let flags = packet.get(self.transport() + FLAGS);
        self.is_tcp && flags.is_some_and(|flags| flags & PSH != 0)
    }

    /// What tells the kernel how to cut a super-packet of such packets.
    fn header(&self) -> Header {
        let protocol = match (self.is_tcp, self.family) {
            (true, Family::V4) => Protocol::TcpV4,
            (true, Family::V6) => Protocol::TcpV6,
            (false, _) => Protocol::Udp,
        };
        // All of them are parts of a packet of at most 64 KiB.
        let short = |value: usize| u16::try_from(value).unwrap_or(u16::MAX);
        let offset = if self.is_tcp { TCP_CHECKSUM } else { UDP_CHECKSUM };
        Header {
            cut: Some(Cut { protocol, size: short(self.payload), headers: short(self.headers) }),
            checksum: Some(Checksum { start: short(self.transport()), offset: short(offset) }),
        }
    }

    /// Makes headers those of a super-packet of `len` bytes, its checksum that of the
    /// pseudo-header.
    fn lengthen(&self, headers: &mut [u8], len: usize, is_pushed: bool) {
        let short = |len: usize| u16::try_from(len).unwrap_or(u16::MAX).to_be_bytes();
        let (at, covered) = (self.transport(), len - self.transport());
        match self.family {
            Family::V4 => {
                put(headers, 2, &short(len));
                put(headers, 10, &[0; 2]);
                Sum::of(headers.get(..at).unwrap_or_default()).store(headers, 10);
            }
            Family::V6 => put(headers, 4, &short(covered)),
        }
        let (protocol, checksum) = match self.is_tcp {
            true => (TCP, TCP_CHECKSUM),
            false => (UDP, UDP_CHECKSUM),
        };
        if self.is_tcp {
            if let Some(flags) = headers.get_mut(at + FLAGS).filter(|_| is_pushed) {
                *flags |= PSH;
            }
        } else {
            put(headers, at + UDP_LENGTH, &short(covered));
        }
        let sum = Sum::pseudo_header(self.family, headers, protocol, covered).fold();
        put(headers, at + checksum, &sum.to_ne_bytes());
    }
}

/// Whether a packet can be told to be of a flow: it has ports right behind a plain header.
fn is_flow(packet: &[u8]) -> bool {
    match Family::of(packet) {
        Some(Family::V4) => {
            packet[0] == 0x45
                && matches!(packet[9], TCP | UDP)
                && half(packet, 6).is_some_and(|fragment| fragment & 0x3fff == 0)
                && packet.len() >= 24
        }
        Some(Family::V6) => matches!(packet[6], TCP | UDP) && packet.len() >= 44,
        None => false,
    }
}

/// Whether two packets, of which the second is of a flow, are of the same one.
fn is_same_flow(one: &[u8], other: &[u8]) -> bool {
    let (Some(family), true) = (Family::of(one), is_flow(one)) else { return false };
    let (protocol, ports) = match family {
        Family::V4 => (9, 20..24),
        Family::V6 => (6, 40..44),
    };
    Family::of(other) == Some(family)
        && one.get(protocol) == other.get(protocol)
        && one.get(family.addresses()) == other.get(family.addresses())
        && one.get(ports.clone()) == other.get(ports)
}
