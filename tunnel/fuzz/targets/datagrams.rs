//! Any bytes from the network and from the TUN device, among genuine ones, damaged or not, in any
//! order: no panic, and no more packets than were sent.

#![no_main]

use std::net::SocketAddr;
use std::time::Duration;

use gambeson_tunnel::internals::pair;
use gambeson_tunnel::{Batch, Datagram, Device, Origin, Outbox};
use libfuzzer_sys::fuzz_target;

/// A device and where it is.
struct End {
    device: Device,
    address: SocketAddr,
    /// What it has sent.
    sent: Vec<Vec<u8>>,
    /// How many packets it has given.
    opened: usize,
}

impl End {
    fn keep(&mut self, outbox: &Outbox) {
        self.sent.extend(outbox.datagrams().map(|(bytes, _)| bytes.to_vec()));
    }

    fn receive(&mut self, bytes: &mut [u8], from: SocketAddr) {
        let mut outbox = Outbox::new();
        let mut packets = Vec::new();
        let mut handshakes = Vec::new();
        let datagram = Datagram { bytes, origin: &Origin { from, to: None, ecn: 0 } };
        self.device.open([datagram], &mut packets, &mut outbox, |message| {
            handshakes.push(message);
        });
        self.opened += packets.len();
        for message in handshakes {
            self.device.answer(message, &mut outbox);
        }
        self.keep(&outbox);
    }

    fn send(&mut self, packet: &[u8]) {
        let (mut batch, mut outbox) = (Batch::new(), Outbox::new());
        batch.push(packet);
        self.device.seal(&batch, &mut outbox);
        self.keep(&outbox);
    }
}

/// A packet to the other end.
fn packet(to: usize, len: usize) -> Vec<u8> {
    let mut packet = vec![0; len.max(20)];
    packet[0] = 0x45;
    let total = packet.len() as u16;
    packet[2..4].copy_from_slice(&total.to_be_bytes());
    packet[12..16].copy_from_slice(&[10, 0, 0, 1 - to as u8]);
    packet[16..20].copy_from_slice(&[10, 0, 0, to as u8]);
    packet
}

fuzz_target!(|input: &[u8]| {
    let mut number = 0..;
    let mut ends = pair(1420).map(|device| {
        let address = SocketAddr::from(([192, 0, 2, number.next().unwrap_or(0)], 9));
        End { device, address, sent: Vec::new(), opened: 0 }
    });
    let (mut rest, mut given, mut uptime) = (input, 0, Duration::ZERO);
    while let Some(([what, a, b, c], after)) = rest.split_first_chunk::<4>() {
        rest = after;
        let (from, to) = (usize::from(what & 1), usize::from(1 - (what & 1)));
        let address = ends[from].address;
        match (what >> 1) % 6 {
            0 => {
                ends[from].send(&packet(to, usize::from(*a) * 8));
                given += 1;
            }
            // The newest datagram, or an older one, whole or damaged.
            step @ (1 | 2) => {
                let back = if step == 1 { 0 } else { usize::from(*a) };
                let sent = &ends[from].sent;
                let Some(number) = sent.len().checked_sub(back + 1) else { continue };
                let mut bytes = sent[number].clone();
                if step == 2 && !bytes.is_empty() {
                    let at = usize::from(*b) * 7 % bytes.len();
                    bytes[at] ^= c;
                }
                ends[to].receive(&mut bytes, address);
            }
            3 => {
                let mut bytes = rest[..usize::from(*a).min(rest.len())].to_vec();
                ends[to].receive(&mut bytes, address);
            }
            4 => {
                ends[from].send(&rest[..usize::from(*a).min(rest.len())]);
                // It may be one for the other end.
                given += 1;
            }
            _ => {
                uptime += Duration::from_millis(u64::from(*a) * 250);
                for end in &mut ends {
                    let mut outbox = Outbox::new();
                    end.device.tick(uptime, &mut outbox);
                    end.keep(&outbox);
                }
            }
        }
    }
    assert!(ends[0].opened + ends[1].opened <= given);
});
