//! A flood at a node's tunnel, beside what its pods say to each other: no packet of theirs is
//! lost.

use std::net::{SocketAddr, UdpSocket};
use std::thread::sleep;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};
use gambeson_lab::{Lab, Options};

use crate::common::agent::userspace;
use crate::common::lab::lab_up;
use crate::rotation::{all_pairs, assert_perfect};

/// How often the attacker sends a part of its flood.
const PART: Duration = Duration::from_millis(10);
const TIME: Duration = Duration::from_secs(5);

/// Somebody on the underlay who is nobody's peer.
struct Stranger {
    socket: UdpSocket,
    noise: Tunn,
}

impl Stranger {
    /// On the last node, whose pods take no part, and who is no peer by this key.
    fn at(lab: &Lab) -> Self {
        let nodes = lab.nodes();
        let annotation = "gambeson.io/public-key";
        let node = lab.api().unwrap().node("node-1").unwrap();
        let key = node["metadata"]["annotations"][annotation].as_str().unwrap().to_owned();
        let key: [u8; 32] = STANDARD.decode(key).unwrap().try_into().unwrap();
        let target = SocketAddr::new(nodes[0].addresses()[0], 51820);
        let attacker = nodes.last().unwrap();
        let socket = attacker.netns().run(|| {
            let socket = UdpSocket::bind(SocketAddr::new(attacker.addresses()[0], 0))?;
            socket.connect(target)?;
            socket.set_read_timeout(Some(Duration::from_millis(100)))?;
            std::io::Result::Ok(socket)
        });
        let private = StaticSecret::from([9; 32]);
        let noise = Tunn::new(private, PublicKey::from(key), None, None, 1, None);
        Self { socket: socket.unwrap().unwrap(), noise }
    }

    fn initiation(&mut self) -> Vec<u8> {
        let mut buffer = [0; 200];
        match self.noise.format_handshake_initiation(&mut buffer, true) {
            TunnResult::WriteToNetwork(bytes) => bytes.to_vec(),
            other => panic!("{other:?}"),
        }
    }

    /// An initiation with the cookie that the node hands out under load.
    fn initiation_with_cookie(&mut self) -> Vec<u8> {
        let first = self.initiation();
        for _ in 0..2000 {
            self.socket.send(&first).unwrap();
        }
        let mut cookie = [0; 200];
        let len = self.socket.recv(&mut cookie).expect("a cookie");
        self.noise.decapsulate(None, &cookie[..len], &mut [0; 200]);
        let second = self.initiation();
        assert_ne!(second[132..], [0; 16], "it carries no cookie");
        second
    }

    /// Sends so many datagrams a second, each made by `next`, and says how many those were.
    fn flood(&self, per_second: u64, mut next: impl FnMut(u64) -> Vec<u8>) -> u64 {
        let part = per_second * u64::try_from(PART.as_millis()).unwrap() / 1000;
        let (start, mut sent) = (Instant::now(), 0);
        while start.elapsed() < TIME {
            for _ in 0..part {
                // What the machine does not carry is lost on the attacker's side.
                let _ = self.socket.send(&next(sent));
                sent += 1;
            }
            let due = PART * u32::try_from(sent / part).unwrap();
            sleep(due.saturating_sub(start.elapsed()));
        }
        sent
    }
}

#[test]
fn a_flood_of_handshakes_with_cookies_costs_no_packet() {
    let lab = lab_up(Options { nodes: 3, ..userspace() });
    let mut stranger = Stranger::at(&lab);
    let initiation = stranger.initiation_with_cookie();
    let traffic = all_pairs(&lab, 500);
    let sent = stranger.flood(40_000, |_| initiation.clone());
    eprintln!("{} initiations a second", sent / TIME.as_secs());
    assert_perfect(&lab, traffic);
}

#[test]
fn a_flood_of_garbage_costs_no_packet() {
    let lab = lab_up(Options { nodes: 3, ..userspace() });
    let stranger = Stranger::at(&lab);
    let traffic = all_pairs(&lab, 500);
    let sent = stranger.flood(200_000, |n| {
        // Data messages of sessions that nobody has.
        let mut datagram = vec![0x5a; 148];
        datagram[..4].copy_from_slice(&[4, 0, 0, 0]);
        datagram[4..12].copy_from_slice(&n.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
        datagram
    });
    eprintln!("{} datagrams a second", sent / TIME.as_secs());
    assert_perfect(&lab, traffic);
}
