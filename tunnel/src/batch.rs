//! Packets and datagrams side by side in one reused buffer.

use std::ops::Range;

use crate::device::PeerId;
use crate::endpoint::Endpoint;
use crate::offload::{Header, Split};

/// The largest packet that a TUN device hands over, and the largest payload of a datagram.
pub(crate) const MAX_PACKET: usize = 65_535;

/// Differentiated services AF41 (`HANDSHAKE_DSCP`, drivers/net/wireguard/messages.h).
const HANDSHAKE_TOS: u8 = 0x88;

/// Plaintext packets, and super-packets, of one read of the TUN device.
///
/// The buffer keeps its size from batch to batch, so that a packet costs no allocation.
#[derive(Debug, Default)]
pub struct Batch {
    bytes: Vec<u8>,
    packets: Vec<(Range<usize>, Header)>,
    used: usize,
}

impl Batch {
    /// An empty batch.
    pub fn new() -> Self {
        Self::default()
    }

    /// Forgets the packets and keeps the memory.
    pub fn clear(&mut self) {
        self.packets.clear();
        self.used = 0;
    }

    /// How many packets there are.
    pub fn len(&self) -> usize {
        self.packets.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.packets.is_empty()
    }

    /// How many bytes of the buffer the packets take.
    pub(crate) fn used(&self) -> usize {
        self.used
    }

    /// Adds a copy of `packet`.
    pub fn push(&mut self, packet: &[u8]) {
        self.space(packet.len())[..packet.len()].copy_from_slice(packet);
        self.commit(packet.len(), Header::default());
    }

    /// Room for a packet of up to `len` bytes, which [`Batch::commit`] then adds.
    pub(crate) fn space(&mut self, len: usize) -> &mut [u8] {
        let end = self.used + len;
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        &mut self.bytes[self.used..end]
    }

    /// Adds the packet in the first `len` bytes of the last [`Batch::space`].
    pub(crate) fn commit(&mut self, len: usize, header: Header) {
        self.packets.push((self.used..self.used + len, header));
        self.used += len;
    }

    /// The packets, as they are to be cut. What is not as its header says is left out.
    pub(crate) fn packets(&self) -> impl Iterator<Item = Split<'_>> {
        let split = |(range, header): &(Range<usize>, Header)| {
            Split::of(header, self.bytes.get(range.clone())?)
        };
        self.packets.iter().filter_map(split)
    }
}

/// Sealed datagrams with where each one goes, back to back in one buffer, so that equal
/// neighbours can leave in a single send.
#[derive(Debug, Default)]
pub struct Outbox {
    bytes: Vec<u8>,
    datagrams: Vec<(Range<usize>, Destination)>,
    used: usize,
}

/// Where a datagram goes, and the peer it is for (none for a cookie).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Destination {
    /// Address, port and source.
    pub endpoint: Endpoint,
    /// Whose datagram it is.
    pub(crate) peer: Option<PeerId>,
    /// Type of service, or traffic class.
    pub(crate) tos: u8,
}

impl Destination {
    /// Of a packet with these bits of explicit congestion notification, which the datagram
    /// takes over (RFC 6040, 4.1).
    pub(crate) fn of_packet(endpoint: Endpoint, peer: PeerId, ecn: u8) -> Self {
        Self { endpoint, peer: Some(peer), tos: ecn }
    }

    /// Of a message that carries no packet. Handshakes have this class in the kernel, too.
    pub(crate) fn of_handshake(endpoint: Endpoint, peer: Option<PeerId>) -> Self {
        Self { endpoint, peer, tos: HANDSHAKE_TOS }
    }
}

impl Outbox {
    /// An empty outbox.
    pub fn new() -> Self {
        Self::default()
    }

    /// Forgets the datagrams and keeps the memory.
    pub fn clear(&mut self) {
        self.datagrams.clear();
        self.used = 0;
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.datagrams.is_empty()
    }

    /// How many bytes the datagrams take.
    pub(crate) fn used(&self) -> usize {
        self.used
    }

    /// Room for a datagram of up to `len` bytes, which [`Outbox::commit`] then adds.
    pub(crate) fn space(&mut self, len: usize) -> &mut [u8] {
        let end = self.used + len;
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        &mut self.bytes[self.used..end]
    }

    /// Adds the datagram in the first `len` bytes of the last [`Outbox::space`].
    pub(crate) fn commit(&mut self, len: usize, to: Destination) {
        self.datagrams.push((self.used..self.used + len, to));
        self.used += len;
    }

    /// The datagrams, in the order they were sealed.
    pub fn datagrams(&self) -> impl Iterator<Item = (&[u8], &Destination)> {
        self.datagrams.iter().map(|(range, to)| (&self.bytes[range.clone()], to))
    }

    /// The datagrams in runs that the kernel can send as one: to one destination, of one
    /// length but for a last shorter one, at most `limit` of them.
    pub(crate) fn runs(&self, limit: usize) -> impl Iterator<Item = Run<'_>> {
        let mut rest = self.datagrams.as_slice();
        std::iter::from_fn(move || {
            let len = run_length(rest, limit);
            let (run, after) = rest.split_at_checked(len)?;
            rest = after;
            let ((first, to), (last, _)) = (run.first()?, run.last()?);
            Some(Run { bytes: &self.bytes[first.start..last.end], segment: first.len(), to })
        })
    }
}

/// Datagrams to one destination, back to back.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Run<'a> {
    pub(crate) bytes: &'a [u8],
    /// The length of each but the last, bytes.
    pub(crate) segment: usize,
    pub(crate) to: &'a Destination,
}

impl<'a> Run<'a> {
    pub(crate) fn is_one(&self) -> bool {
        self.bytes.len() <= self.segment
    }

    pub(crate) fn datagrams(&self) -> impl Iterator<Item = &'a [u8]> {
        self.bytes.chunks(self.segment.max(1))
    }
}

/// What one UDP send takes at most, bytes.
const MAX_RUN: usize = 65_507;

fn run_length(datagrams: &[(Range<usize>, Destination)], limit: usize) -> usize {
    let Some((first, to)) = datagrams.first() else { return 0 };
    let mut count = 1;
    let mut bytes = first.len();
    for (range, destination) in &datagrams[1..] {
        let fits = bytes + range.len() <= MAX_RUN && count < limit;
        if !fits || destination != to || range.len() > first.len() {
            break;
        }
        count += 1;
        bytes += range.len();
        if range.len() < first.len() {
            break;
        }
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_of_one_length_and_one_destination() {
        let to = |port| Endpoint::new(([192, 0, 2, 1], port).into());
        let mut outbox = Outbox::new();
        let sizes = [(100, 1), (100, 1), (60, 1), (100, 1), (100, 2), (200, 2), (200, 2)];
        for (n, (len, port)) in (1..).zip(sizes) {
            outbox.space(len)[..len].fill(n);
            outbox.commit(len, Destination::of_handshake(to(port), None));
        }
        let runs = |limit| {
            outbox.runs(limit).map(|run| run.datagrams().map(<[u8]>::len).collect()).collect()
        };
        let whole: Vec<Vec<usize>> = runs(64);
        assert_eq!(whole, [vec![100, 100, 60], vec![100], vec![100], vec![200, 200]]);
        let pairs: Vec<Vec<usize>> = runs(2);
        assert_eq!(pairs[..2], [vec![100, 100], vec![60]]);
        assert_eq!(outbox.runs(1).count(), sizes.len());
        let bytes: Vec<u8> = outbox.runs(64).flat_map(|run| run.bytes.to_vec()).collect();
        assert_eq!(bytes, outbox.datagrams().flat_map(|(b, _)| b.to_vec()).collect::<Vec<_>>());
    }

    #[test]
    fn a_run_fits_one_send() {
        let mut outbox = Outbox::new();
        for _ in 0..100 {
            outbox.space(9000);
            let to = Endpoint::new(([192, 0, 2, 1], 1).into());
            outbox.commit(9000, Destination::of_handshake(to, None));
        }
        assert!(outbox.runs(64).all(|run| run.bytes.len() <= 65_507));
        assert_eq!(outbox.runs(64).next().map(|run| run.datagrams().count()), Some(7));
    }
}
