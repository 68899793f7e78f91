use std::time::{Duration, SystemTime};

use super::pair::{MTU, Node, connected, net, packet, pair, passes, run};
use crate::device::{AllowedIpChange, Datagram, Origin, PeerUpdate};
use crate::noise::{DATA_HEADER, OVERHEAD};
use crate::{Batch, Outbox};

#[test]
fn the_first_packet_waits_for_the_handshake_and_arrives() {
    let (a, b) = pair();
    let packet = packet(a.inside, b.inside, 77);
    let sent = a.seal(&packet);
    assert_eq!(sent.len(), 1);
    assert_eq!(sent[0].bytes.len(), 148);
    assert_eq!(run(&a, &b, sent), vec![packet]);
    assert!(passes(&b, &a));
    assert!(passes(&a, &b));
}

#[test]
fn many_packets_that_wait_arrive_in_order() {
    let (a, b) = pair();
    let packets: Vec<_> = (100..150).map(|len| packet(a.inside, b.inside, len)).collect();
    let mut sent = Vec::new();
    for packet in &packets {
        sent.extend(a.seal(packet));
    }
    assert_eq!(sent.len(), 1, "one initiation for all");
    assert_eq!(run(&a, &b, sent), packets);
}

#[test]
fn both_sides_starting_at_once_end_up_with_a_session() {
    let (a, b) = pair();
    let from_a = a.seal(&packet(a.inside, b.inside, 100));
    let from_b = b.seal(&packet(b.inside, a.inside, 200));
    let mut arrived = run(&a, &b, from_a);
    arrived.extend(run(&b, &a, from_b));
    arrived.sort_by_key(Vec::len);
    assert_eq!(arrived.iter().map(Vec::len).collect::<Vec<_>>(), [100, 200]);
    assert!(passes(&a, &b) && passes(&b, &a));
}

#[test]
fn plaintext_is_padded_to_16_bytes_but_not_past_the_mtu() {
    let (a, b) = connected();
    for (len, padded) in [(20, 32), (32, 32), (1409, MTU), (MTU, MTU), (MTU + 80, MTU + 80)] {
        let packet = packet(a.inside, b.inside, len);
        let sent = a.seal(&packet);
        assert_eq!(sent[0].bytes.len(), padded + OVERHEAD, "{len}");
        assert_eq!(run(&a, &b, sent), vec![packet]);
    }
}

#[test]
fn padding_is_zero_whatever_was_in_the_buffer_before() {
    let (a, b) = connected();
    let (mut batch, mut outbox) = (Batch::new(), Outbox::new());
    for len in [400, 20] {
        batch.clear();
        outbox.clear();
        batch.push(&packet(a.inside, b.inside, len));
        a.device.seal(&batch, &mut outbox);
    }
    let mut bytes = outbox.datagrams().next().unwrap().0.to_vec();
    let origin = Origin { from: a.address, to: None, ecn: 0 };
    let datagram = Datagram { bytes: &mut bytes, origin: &origin };
    assert_eq!(b.open_datagrams([datagram]).0.len(), 1);
    assert_eq!(bytes[DATA_HEADER + 20..][..12], [0; 12]);
}

#[test]
fn congestion_is_told_from_outside_to_inside_and_back() {
    let (a, b) = connected();
    for (ecn, outside, told) in [(1, 1, 3), (2, 2, 3), (0, 0, 0), (3, 3, 3)] {
        let mut packet = packet(a.inside, b.inside, 100);
        packet[1] = 0xb8 | ecn;
        let (mut batch, mut outbox) = (Batch::new(), Outbox::new());
        batch.push(&packet);
        a.device.seal(&batch, &mut outbox);
        let (bytes, to) = outbox.datagrams().next().unwrap();
        assert_eq!(to.tos, outside);
        // It meets a queue on the way.
        let bytes = &mut bytes.to_vec();
        let origin = Origin { from: a.address, to: None, ecn: 3 };
        let (packets, _) = b.open_datagrams([Datagram { bytes, origin: &origin }]);
        assert_eq!(packets[0][1], 0xb8 | told);
    }
}

#[test]
fn ipv6_passes_inside() {
    let (mut a, mut b) = pair();
    a.inside = "fd00::1".parse().unwrap();
    b.inside = "fd00::2".parse().unwrap();
    a.add(&b);
    b.add(&a);
    assert!(passes(&a, &b) && passes(&b, &a));
}

#[test]
fn a_replayed_datagram_is_refused() {
    let (a, b) = connected();
    let sent = a.seal(&packet(a.inside, b.inside, 100));
    assert_eq!(b.open_from(&sent[0].bytes, a.address).0.len(), 1);
    let before = b.peer(&a);
    assert_eq!(b.open_from(&sent[0].bytes, "203.0.113.9:9".parse().unwrap()), (vec![], vec![]));
    assert_eq!(b.peer(&a).received, before.received);
    assert_eq!(b.peer(&a).endpoint, Some(a.address), "a replay does not move the peer");
}

#[test]
fn each_of_a_batch_is_judged_by_itself() {
    let (a, b) = connected();
    let (mut batch, mut outbox) = (Batch::new(), Outbox::new());
    let packets: Vec<_> = (0..5).map(|n| packet(a.inside, b.inside, 900 + 50 * n)).collect();
    packets.iter().for_each(|packet| batch.push(packet));
    batch.push(&packet(b.inside, b.inside, 1000));
    a.device.seal(&batch, &mut outbox);
    let sealed: Vec<_> = outbox.datagrams().map(|(bytes, _)| bytes.to_vec()).collect();
    let origin = Origin { from: a.address, to: None, ecn: 0 };
    // One twice, side by side and apart; one damaged; one of a foreign source.
    let mut received = [0, 0, 1, 2, 1, 5, 3, 4].map(|n| sealed[n].clone());
    received[3][40] ^= 1;
    let datagrams = received.iter_mut().map(|bytes| Datagram { bytes, origin: &origin });
    let (opened, _) = b.open_datagrams(datagrams);
    assert_eq!(opened, [0, 1, 3, 4].map(|n| packets[n].clone()));
}

#[test]
fn a_replayed_initiation_is_refused() {
    let (a, b) = pair();
    let initiation = a.seal(&packet(a.inside, b.inside, 100)).remove(0);
    assert_eq!(b.open_from(&initiation.bytes, a.address).1.len(), 1);
    let elsewhere = "203.0.113.9:9".parse().unwrap();
    assert_eq!(b.open_from(&initiation.bytes, elsewhere), (vec![], vec![]));
    assert_eq!(b.peer(&a).endpoint, Some(a.address));
}

#[test]
fn a_packet_from_a_source_that_the_peer_does_not_own_is_dropped() {
    let (a, b) = connected();
    let forged = packet("10.0.0.77".parse().unwrap(), b.inside, 100);
    assert_eq!(run(&a, &b, a.seal(&forged)), Vec::<Vec<u8>>::new());
}

#[test]
fn a_shorter_prefix_does_not_speak_for_the_owner_of_a_longer_one() {
    let (a, b) = connected();
    let c = Node::new(3);
    b.apply_peer(PeerUpdate {
        allowed_ips: vec![AllowedIpChange::Add(net("10.0.0.0/8"))],
        ..PeerUpdate::new(a.public())
    });
    assert!(passes(&a, &b));
    let as_c = packet(c.inside, b.inside, 100);
    assert_eq!(run(&a, &b, a.seal(&as_c)).len(), 1, "nobody else owns it yet");
    b.add(&c);
    assert_eq!(run(&a, &b, a.seal(&as_c)), Vec::<Vec<u8>>::new());
}

#[test]
fn an_endpoint_follows_authentic_datagrams_only() {
    let (a, mut b) = connected();
    let moved = "198.51.100.7:7".parse().unwrap();
    let mut sent = b.seal(&packet(b.inside, a.inside, 100));
    sent[0].bytes[40] ^= 1;
    a.open_from(&sent[0].bytes, moved);
    assert_eq!(a.peer(&b).endpoint, Some(b.address));
    sent[0].bytes[40] ^= 1;
    a.open_from(&sent[0].bytes, moved);
    assert_eq!(a.peer(&b).endpoint, Some(moved));
    b.address = moved;
    assert!(passes(&a, &b) && passes(&b, &a));
}

#[test]
fn counters_and_handshake_time_tell_the_truth() {
    let before = SystemTime::now();
    let (a, b) = connected();
    let (at_a, at_b) = (a.peer(&b), b.peer(&a));
    // Initiation, keepalive, data of 100 bytes padded to 112; response.
    assert_eq!(at_a.sent, 148 + 32 + 112 + 32);
    assert_eq!(at_a.received, 92);
    assert_eq!((at_b.received, at_b.sent), (at_a.sent, at_a.received));
    for status in [at_a, at_b] {
        let handshake = status.last_handshake.unwrap();
        assert!(before <= handshake && handshake <= SystemTime::now());
    }
}

#[test]
fn a_peer_without_an_endpoint_waits_to_be_spoken_to() {
    let (a, b) = (Node::new(1), Node::new(2));
    a.add(&b);
    b.apply_peer(PeerUpdate {
        allowed_ips: vec![AllowedIpChange::Add(a.inside.into())],
        ..PeerUpdate::new(a.public())
    });
    assert_eq!(b.seal(&packet(b.inside, a.inside, 100)), vec![]);
    assert!(passes(&a, &b) && passes(&b, &a));
}

#[test]
fn going_down_drops_sessions_and_packets() {
    let (a, b) = connected();
    a.device.set_up(false, &mut Outbox::new());
    assert_eq!(a.seal(&packet(a.inside, b.inside, 100)), vec![]);
    let sent = b.seal(&packet(b.inside, a.inside, 100));
    assert_eq!(a.open_from(&sent[0].bytes, b.address), (vec![], vec![]));
    a.device.set_up(true, &mut Outbox::new());
    let sent = a.seal(&packet(a.inside, b.inside, 100));
    assert_eq!(sent[0].bytes.len(), 148, "a new handshake");
    assert_eq!(run(&a, &b, sent).len(), 1);
}

#[test]
fn ten_thousand_idle_peers_cost_next_to_nothing() {
    let a = Node::new(1);
    let peers = (0..10_000u32).map(|n| {
        let mut key = [9; 32];
        key[..4].copy_from_slice(&n.to_be_bytes());
        PeerUpdate {
            endpoint: Some("192.0.2.9:9".parse().unwrap()),
            allowed_ips: vec![AllowedIpChange::Add(net(&format!(
                "10.{}.{}.0/24",
                n / 250,
                n % 250
            )))],
            ..PeerUpdate::new(key)
        }
    });
    a.apply(crate::DeviceUpdate { peers: peers.collect(), ..Default::default() });
    assert_eq!(a.peers().len(), 10_000);
    let start = std::time::Instant::now();
    for tick in 0..100 {
        assert_eq!(a.tick(Duration::from_millis(250 * tick)), vec![]);
    }
    // A hundred ticks are 25 s: allow them 1% of a core.
    assert!(start.elapsed() < Duration::from_millis(250), "{:?}", start.elapsed());
}
