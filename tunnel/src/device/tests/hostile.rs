use std::net::SocketAddr;
use std::time::Duration;

use proptest::prelude::*;

use super::pair::{Node, connected, packet, pair, passes, run};
use crate::batch::MAX_PACKET;
use crate::device::{AllowedIpChange, PeerUpdate};

/// The points of low order that a peer may claim as its key.
const LOW_ORDER: [[u8; 32]; 2] = [[0; 32], {
    let mut one = [0; 32];
    one[0] = 1;
    one
}];

#[test]
fn a_peer_with_a_key_of_low_order_is_listed_and_never_spoken_to() {
    let (a, b) = connected();
    for key in LOW_ORDER {
        let sent = a.apply_peer(PeerUpdate {
            endpoint: Some(b.address),
            persistent_keepalive: Some(1),
            allowed_ips: vec![AllowedIpChange::Add("10.0.9.0/24".parse().unwrap())],
            ..PeerUpdate::new(key)
        });
        assert_eq!(sent, vec![]);
        assert_eq!(a.seal(&packet(a.inside, "10.0.9.1".parse().unwrap(), 100)), vec![]);
        assert_eq!(a.tick(Duration::from_secs(5)), vec![]);
    }
    assert_eq!(a.peers().len(), 3);
    assert!(passes(&a, &b));
}

#[test]
fn under_load_a_cookie_is_asked_for_and_honoured() {
    let (a, b) = pair();
    let strangers: Vec<_> = (10..14).map(Node::new).collect();
    let mut cookies = 0;
    for round in 0..200 {
        let stranger = &strangers[round % strangers.len()];
        stranger.add(&b);
        let (_, answers) = b.open_from(&stranger.rehandshake()[0].bytes, stranger.address);
        cookies += answers.iter().filter(|answer| answer.bytes.len() == 64).count();
    }
    assert_eq!(cookies, 0, "a few handshakes are no load");
    for _ in 0..500 {
        let sent = strangers[0].rehandshake();
        let (_, answers) = b.open_from(&sent[0].bytes, strangers[0].address);
        cookies += answers.iter().filter(|answer| answer.bytes.len() == 64).count();
    }
    assert!(cookies > 200, "{cookies}");
    // A peer is told the same, and its next attempt carries the cookie.
    let initiation = a.seal(&packet(a.inside, b.inside, 100));
    assert_eq!(run(&a, &b, initiation), Vec::<Vec<u8>>::new());
    assert_eq!(run(&a, &b, a.rehandshake()).len(), 1);
    assert!(passes(&b, &a));
    // The load is over with the second.
    b.tick(Duration::from_millis(1100));
    let (_, answers) = b.open_from(&strangers[0].rehandshake()[0].bytes, strangers[0].address);
    assert_eq!(answers, vec![], "a stranger gets no answer, and no cookie");
}

#[test]
fn handshakes_with_cookies_are_limited_by_address() {
    let b = Node::new(2);
    let peers: Vec<_> = (10..40).map(Node::new).collect();
    for peer in &peers {
        peer.add(&b);
        b.add(peer);
    }
    // All from one host.
    let from = |n: usize| SocketAddr::new(peers[0].address.ip(), 1000 + n as u16);
    let stranger = Node::new(99);
    stranger.add(&b);
    for _ in 0..500 {
        let initiation = stranger.rehandshake().remove(0);
        b.open_from(&initiation.bytes, "198.51.100.1:1".parse().unwrap());
    }
    let mut answered = 0;
    for (n, peer) in peers.iter().enumerate() {
        let (_, cookie) = b.open_from(&peer.rehandshake()[0].bytes, from(n));
        assert_eq!(cookie[0].bytes.len(), 64);
        peer.open_from(&cookie[0].bytes, b.address);
        answered += b.open_from(&peer.rehandshake()[0].bytes, from(n)).1.len();
    }
    assert_eq!(answered, 5, "the burst of an address");
}

#[test]
fn an_authentic_peer_gets_so_many_handshakes() {
    let (a, b) = connected();
    let answers = |_: usize| b.open_from(&a.rehandshake()[0].bytes, a.address).1.len();
    assert!((0..300).map(answers).sum::<usize>() <= 13);
    b.tick(Duration::from_secs(1));
    assert_eq!((0..300).map(answers).sum::<usize>(), 13);
    assert!(passes(&b, &a), "the session goes on");
}

#[test]
fn spoofed_answers_do_not_stop_a_handshake() {
    let (a, b) = pair();
    let initiation = a.seal(&packet(a.inside, b.inside, 100));
    let (_, mut answers) = b.open_from(&initiation[0].bytes, a.address);
    let genuine = answers.remove(0);
    // The second MAC counts only under load.
    for at in 0..genuine.bytes.len() - 16 {
        let mut spoofed = genuine.bytes.clone();
        spoofed[at] ^= 0x40;
        assert_eq!(a.open_from(&spoofed, b.address), (vec![], vec![]));
    }
    let (_, sent) = a.open_from(&genuine.bytes, b.address);
    assert!(!sent.is_empty());
    assert_eq!(run(&a, &b, sent).len(), 1);
}

#[test]
fn counters_at_the_end_of_the_space_are_refused() {
    let (a, b) = connected();
    let sent = a.seal(&packet(a.inside, b.inside, 100)).remove(0);
    for counter in [u64::MAX, u64::MAX - (1 << 13), 1 << 63] {
        let mut forged = sent.bytes.clone();
        forged[8..16].copy_from_slice(&counter.to_le_bytes());
        assert_eq!(b.open_from(&forged, a.address), (vec![], vec![]));
    }
    assert_eq!(b.open_from(&sent.bytes, a.address).0.len(), 1);
}

#[test]
fn packets_of_every_size_pass_or_are_dropped_whole() {
    let (a, b) = connected();
    for len in [20, 21, 1419, 1420, 1500, 9000, 65_000, MAX_PACKET] {
        let packet = packet(a.inside, b.inside, len);
        assert_eq!(run(&a, &b, a.seal(&packet)), vec![packet], "{len}");
    }
    for bytes in [&[][..], &[0x45], &[0x45; 19], &[0x60; 39], &[0x00; 64], &[0xff; 64]] {
        assert_eq!(a.seal(bytes), vec![]);
    }
    assert!(passes(&a, &b));
}

#[test]
fn an_inner_length_that_lies_is_dropped_or_cut() {
    let (a, b) = connected();
    let mut longer = packet(a.inside, b.inside, 100);
    longer[2..4].copy_from_slice(&2000u16.to_be_bytes());
    assert_eq!(run(&a, &b, a.seal(&longer)), Vec::<Vec<u8>>::new());
    let mut shorter = packet(a.inside, b.inside, 100);
    shorter[2..4].copy_from_slice(&60u16.to_be_bytes());
    assert_eq!(run(&a, &b, a.seal(&shorter)), vec![shorter[..60].to_vec()]);
    for tiny in [0u16, 1, 19] {
        let mut packet = packet(a.inside, b.inside, 100);
        packet[2..4].copy_from_slice(&tiny.to_be_bytes());
        assert_eq!(run(&a, &b, a.seal(&packet)), Vec::<Vec<u8>>::new(), "{tiny}");
    }
    assert!(passes(&a, &b));
}

/// A datagram of each kind, genuine at the time it was made.
fn genuine(a: &Node, b: &Node) -> Vec<Vec<u8>> {
    let initiation = a.rehandshake().remove(0).bytes;
    let (_, answers) = b.open_from(&initiation, a.address);
    let data = a.seal(&packet(a.inside, b.inside, 200)).remove(0).bytes;
    let mut cookie = vec![0; 64];
    cookie[0] = 3;
    cookie[4..8].copy_from_slice(&initiation[4..8]);
    vec![initiation, answers[0].bytes.clone(), data, cookie]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn nothing_that_arrives_makes_a_device_panic(
        noise in prop::collection::vec(any::<u8>(), 0..300),
        kind in 0u8..5,
        cut in 0usize..240,
        grow in 0usize..70_000,
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
    ) {
        let (a, b) = connected();
        let mut datagrams = vec![noise.clone(), vec![], vec![kind; grow]];
        let mut typed = noise;
        typed.splice(0..typed.len().min(4), [kind, 0, 0, 0]);
        datagrams.push(typed);
        for bytes in genuine(&a, &b) {
            datagrams.push(bytes[..cut.min(bytes.len())].to_vec());
            let mut grown = bytes.clone();
            grown.resize((bytes.len() + grow).min(MAX_PACKET), kind);
            datagrams.push(grown);
            let mut flipped = bytes;
            for (index, bit) in &flips {
                let at = index.index(flipped.len());
                flipped[at] ^= bit;
            }
            datagrams.push(flipped);
        }
        for datagram in &datagrams {
            a.open_from(datagram, b.address);
            b.open_from(datagram, a.address);
        }
        run(&a, &b, a.rehandshake());
        prop_assert!(passes(&a, &b) && passes(&b, &a));
    }

    #[test]
    fn nothing_from_the_tun_device_makes_a_device_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..2000),
        version in prop::sample::select(vec![0x40u8, 0x45, 0x60]),
    ) {
        let (a, b) = connected();
        let mut typed = bytes.clone();
        if let Some(first) = typed.first_mut() {
            *first = version;
        }
        if typed.len() >= 20 {
            typed[16..20].copy_from_slice(&[10, 0, 0, 2]);
        }
        for bytes in [bytes, typed] {
            run(&a, &b, a.seal(&bytes));
        }
        prop_assert!(passes(&a, &b));
    }
}
