//! Any header and any packets: what is cut has the bytes of the whole, and what is merged is cut
//! into what it was.

#![no_main]

use gambeson_tunnel::internals::{HEADER_LEN, Merger, split};
use libfuzzer_sys::fuzz_target;

/// More than any input is cut into.
const ROOM: usize = 1 << 20;

fuzz_target!(|input: &[u8]| {
    let mut out = vec![0; ROOM];
    if let Some((header, packet)) = input.split_first_chunk::<HEADER_LEN>() {
        let packet = &packet[..packet.len().min(1 << 16)];
        if let Some(lengths) = split(header, packet, &mut out) {
            assert!(lengths.iter().sum::<usize>() >= packet.len());
        }
    }
    let packets = packets(input);
    let packets: Vec<&[u8]> = packets.iter().map(Vec::as_slice).collect();
    let mut merger = Merger::default();
    let merged = merger.merge(&packets);
    assert_eq!(merged.iter().map(|merged| merged.count).sum::<usize>(), packets.len());
    for whole in merged.iter().filter(|merged| merged.count > 1) {
        let lengths = split(&whole.header, &whole.bytes, &mut out).expect("it can be cut");
        assert_eq!(lengths.len(), whole.count);
        let mut rest = &out[..];
        for len in lengths {
            let (packet, after) = rest.split_at(len);
            rest = after;
            assert!(packets.iter().any(|one| is_same(one, packet)), "{packet:?}");
        }
    }
});

/// The input as packets, each behind its length; of those of IPv4 most are sound.
fn packets(mut input: &[u8]) -> Vec<Vec<u8>> {
    let mut packets = Vec::new();
    while let Some((len, rest)) = input.split_first_chunk::<2>() {
        let len = usize::from(u16::from_le_bytes(*len)) % 2048;
        let (packet, rest) = rest.split_at(len.min(rest.len()));
        let mut packet = packet.to_vec();
        if len % 8 != 7 {
            mend(&mut packet);
        }
        packets.push(packet);
        input = rest;
    }
    packets
}

/// Makes lengths and the IPv4 header's checksum right.
fn mend(packet: &mut [u8]) {
    let len = packet.len() as u16;
    match packet.first() {
        Some(0x45) if len >= 28 => {
            packet[2..4].copy_from_slice(&len.to_be_bytes());
            packet[10..12].fill(0);
            let words = packet[..20].chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(w[1]));
            let sum: u32 = words.sum();
            let sum = (sum & 0xffff) + (sum >> 16);
            let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
            if packet[9] == 17 {
                packet[24..26].copy_from_slice(&(len - 20).to_be_bytes());
            }
        }
        Some(0x60) if len >= 48 => {
            packet[4..6].copy_from_slice(&(len - 40).to_be_bytes());
            if packet[6] == 17 {
                packet[44..46].copy_from_slice(&(len - 40).to_be_bytes());
            }
        }
        _ => {}
    }
}

/// Whether packets are the same but for the checksum of TCP or UDP, which is made anew, and for
/// what says nothing: the identification of an IPv4 packet that is not to be fragmented.
fn is_same(one: &[u8], other: &[u8]) -> bool {
    let (is_v4, is_tcp) = match one.first().map(|first| first >> 4) {
        Some(4) => (true, one.get(9) == Some(&6)),
        _ => (false, one.get(6) == Some(&6)),
    };
    let checksum = if is_v4 { 20 } else { 40 } + if is_tcp { 16 } else { 6 };
    let mut skipped = vec![checksum, checksum + 1];
    if is_v4 && one.get(6).is_some_and(|flags| flags & 0x40 != 0) {
        skipped.extend([4, 5, 10, 11]);
    }
    one.len() == other.len()
        && one.iter().zip(other).enumerate().all(|(n, (a, b))| a == b || skipped.contains(&n))
}
