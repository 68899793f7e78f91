//! The harness: devices with an address each, and a network that is a function call.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::Zeroizing;

use crate::device::{
    AllowedIpChange, Datagram, Device, DeviceUpdate, Origin, PeerStatus, PeerUpdate,
};
use crate::{Batch, Outbox, Source};

pub(super) const MTU: usize = 1420;

/// A device at an underlay address.
pub(super) struct Node {
    pub(super) device: Device,
    pub(super) address: SocketAddr,
    pub(super) private: [u8; 32],
    /// The inside address that its peers allow it.
    pub(super) inside: IpAddr,
}

/// A datagram under way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Sent {
    pub(super) bytes: Vec<u8>,
    pub(super) to: SocketAddr,
}

impl Node {
    /// Number `n`: key, underlay address and inside address follow from it.
    pub(super) fn new(n: u8) -> Self {
        let node = Self {
            device: Device::new(MTU),
            address: format!("192.0.2.{n}:51820").parse().unwrap(),
            private: [n; 32],
            inside: format!("10.0.0.{n}").parse().unwrap(),
        };
        node.device.set_up(true, &mut Outbox::new());
        node.apply(DeviceUpdate {
            private_key: Some(Zeroizing::new(node.private)),
            ..DeviceUpdate::default()
        });
        node
    }

    pub(super) fn public(&self) -> [u8; 32] {
        *PublicKey::from(&StaticSecret::from(self.private)).as_bytes()
    }

    pub(super) fn apply(&self, update: DeviceUpdate) -> Vec<Sent> {
        let mut outbox = Outbox::new();
        self.device.apply(&update, &mut outbox);
        sent(&outbox)
    }

    pub(super) fn apply_peer(&self, peer: PeerUpdate) -> Vec<Sent> {
        self.apply(DeviceUpdate { peers: vec![peer], ..DeviceUpdate::default() })
    }

    /// Makes `other` a peer, with its address and inside address.
    pub(super) fn add(&self, other: &Node) -> Vec<Sent> {
        self.apply_peer(PeerUpdate {
            endpoint: Some(other.address),
            allowed_ips: vec![AllowedIpChange::Add(other.inside.into())],
            ..PeerUpdate::new(other.public())
        })
    }

    pub(super) fn seal(&self, packet: &[u8]) -> Vec<Sent> {
        let (mut batch, mut outbox) = (Batch::new(), Outbox::new());
        batch.push(packet);
        self.device.seal(&batch, &mut outbox);
        sent(&outbox)
    }

    /// Receives one datagram: the packets that come out, and the answers.
    pub(super) fn open_from(&self, bytes: &[u8], from: SocketAddr) -> (Vec<Vec<u8>>, Vec<Sent>) {
        let to = Some(Source::new(self.address.ip(), 1));
        let bytes = &mut bytes.to_vec();
        let origin = Origin { from, to, ecn: 0 };
        self.open_datagrams([Datagram { bytes, origin: &origin }])
    }

    pub(super) fn open_datagrams<'d>(
        &self,
        datagrams: impl IntoIterator<Item = Datagram<'d>>,
    ) -> (Vec<Vec<u8>>, Vec<Sent>) {
        let (mut packets, mut outbox) = (Vec::new(), Outbox::new());
        let mut handshakes = Vec::new();
        self.device.open(datagrams, &mut packets, &mut outbox, |message| handshakes.push(message));
        handshakes.into_iter().for_each(|message| self.device.answer(message, &mut outbox));
        (packets.into_iter().map(<[u8]>::to_vec).collect(), sent(&outbox))
    }

    pub(super) fn tick(&self, uptime: Duration) -> Vec<Sent> {
        let mut outbox = Outbox::new();
        self.device.tick(uptime, &mut outbox);
        sent(&outbox)
    }

    pub(super) fn peers(&self) -> Vec<PeerStatus> {
        let mut peers = Vec::new();
        self.device
            .visit_peers(|peer| {
                peers.push(PeerStatus {
                    preshared_key: peer.preshared_key.clone(),
                    allowed_ips: peer.allowed_ips.clone(),
                    ..*peer
                });
                Ok::<_, ()>(())
            })
            .unwrap();
        peers
    }

    pub(super) fn peer(&self, other: &Node) -> PeerStatus {
        let key = other.public();
        self.peers().into_iter().find(|peer| peer.public_key == key).unwrap()
    }

    /// Starts a handshake with the only peer.
    pub(super) fn rehandshake(&self) -> Vec<Sent> {
        let mut outbox = Outbox::new();
        let tables = self.device.tables();
        let peer = tables.peers().next().unwrap();
        peer.lock().rehandshake(peer, self.device.now(), &mut outbox);
        sent(&outbox)
    }
}

fn sent(outbox: &Outbox) -> Vec<Sent> {
    let each = outbox.datagrams();
    each.map(|(bytes, to)| Sent { bytes: bytes.to_vec(), to: to.endpoint.address }).collect()
}

/// Two nodes that know each other.
pub(super) fn pair() -> (Node, Node) {
    let (a, b) = (Node::new(1), Node::new(2));
    a.add(&b);
    b.add(&a);
    (a, b)
}

/// Two nodes with a session.
pub(super) fn connected() -> (Node, Node) {
    let (a, b) = pair();
    let packet = packet(a.inside, b.inside, 100);
    assert_eq!(run(&a, &b, a.seal(&packet)), vec![packet]);
    (a, b)
}

/// Carries datagrams from `a`, and what they lead to, until there are none. Returns the
/// packets that came out at either end.
pub(super) fn run(a: &Node, b: &Node, from_a: Vec<Sent>) -> Vec<Vec<u8>> {
    let mut out = Vec::new();
    let mut under_way: VecDeque<_> = from_a.into_iter().map(|sent| (a.address, sent)).collect();
    for _ in 0..1000 {
        let Some((from, sent)) = under_way.pop_front() else { return out };
        let to = if sent.to == a.address { a } else { b };
        if sent.to != to.address {
            continue;
        }
        let (packets, answers) = to.open_from(&sent.bytes, from);
        out.extend(packets);
        under_way.extend(answers.into_iter().map(|sent| (to.address, sent)));
    }
    panic!("the exchange does not end");
}

/// Sends a packet from `a` to `b` and says whether it arrived whole.
pub(super) fn passes(a: &Node, b: &Node) -> bool {
    let packet = packet(a.inside, b.inside, 333);
    run(a, b, a.seal(&packet)) == [packet]
}

/// An IP packet of `len` bytes in all.
pub(super) fn packet(from: IpAddr, to: IpAddr, len: usize) -> Vec<u8> {
    let mut packet = vec![0xaa; len];
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            packet[0] = 0x45;
            packet[2..4].copy_from_slice(&u16::try_from(len).unwrap().to_be_bytes());
            packet[12..16].copy_from_slice(&from.octets());
            packet[16..20].copy_from_slice(&to.octets());
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            packet[0] = 0x60;
            packet[4..6].copy_from_slice(&u16::try_from(len - 40).unwrap().to_be_bytes());
            packet[8..24].copy_from_slice(&from.octets());
            packet[24..40].copy_from_slice(&to.octets());
        }
        _ => panic!("two families"),
    }
    packet
}

pub(super) fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}
