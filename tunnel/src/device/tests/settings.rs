use std::time::{Duration, Instant};

use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::Zeroizing;

use super::pair::{MTU, Node, Sent, connected, net, packet, pair, passes, run};
use crate::Outbox;
use crate::device::{AllowedIpChange, Device, DeviceUpdate, PeerUpdate};

const PSK: [u8; 32] = [5; 32];

fn set_psk(node: &Node, other: &Node, key: [u8; 32]) -> Vec<Sent> {
    node.apply_peer(PeerUpdate {
        preshared_key: Some(Zeroizing::new(key)),
        ..PeerUpdate::new(other.public())
    })
}

fn set_keepalive(node: &Node, other: &Node, seconds: u16) -> Vec<Sent> {
    node.apply_peer(PeerUpdate {
        persistent_keepalive: Some(seconds),
        ..PeerUpdate::new(other.public())
    })
}

fn set_private_key(node: &Node, key: [u8; 32]) -> Vec<Sent> {
    node.apply(DeviceUpdate { private_key: Some(Zeroizing::new(key)), ..DeviceUpdate::default() })
}

/// Whether `a` sends data at once, without a handshake.
fn has_session(a: &Node, b: &Node) -> bool {
    a.seal(&packet(a.inside, b.inside, 100)).iter().any(|sent| sent.bytes[0] == 4)
}

#[test]
fn the_same_settings_again_disturb_nothing() {
    let (a, b) = connected();
    let all = DeviceUpdate {
        private_key: Some(Zeroizing::new(a.private)),
        peers: vec![PeerUpdate {
            preshared_key: Some(Zeroizing::new([0; 32])),
            endpoint: Some(b.address),
            persistent_keepalive: Some(0),
            allowed_ips: vec![AllowedIpChange::Clear, AllowedIpChange::Add(b.inside.into())],
            ..PeerUpdate::new(b.public())
        }],
        ..DeviceUpdate::default()
    };
    let before = a.peer(&b);
    assert_eq!(a.apply(all), vec![]);
    assert!(has_session(&a, &b));
    assert_eq!(a.peer(&b).last_handshake, before.last_handshake);
}

#[test]
fn a_changed_preshared_key_keeps_the_session_until_the_new_handshake() {
    let (a, b) = connected();
    let first = a.peer(&b).last_handshake;
    let initiation = set_psk(&a, &b, PSK);
    assert_eq!(initiation.len(), 1, "the handshake under the new key starts at once");
    // B does not have the key yet: its answer is of no use, and both go on as before.
    assert_eq!(run(&a, &b, initiation), Vec::<Vec<u8>>::new());
    assert_eq!(a.peer(&b).last_handshake, first);
    assert!(passes(&a, &b) && passes(&b, &a));
    // Now it has.
    let initiation = set_psk(&b, &a, PSK);
    run(&b, &a, initiation);
    assert!(a.peer(&b).last_handshake > first);
    assert!(passes(&a, &b) && passes(&b, &a));
}

#[test]
fn a_preshared_key_that_differs_keeps_peers_apart() {
    let (a, b) = pair();
    set_psk(&a, &b, PSK);
    assert!(!passes(&a, &b));
    set_psk(&b, &a, PSK);
    assert!(run(&a, &b, a.rehandshake()).len() <= 1);
    assert!(passes(&a, &b) && passes(&b, &a));
}

#[test]
fn an_old_initiation_stays_refused_after_the_preshared_key_changed() {
    let (a, b) = pair();
    let initiation = a.seal(&packet(a.inside, b.inside, 100)).remove(0);
    run(&a, &b, vec![initiation.clone()]);
    let elsewhere = "203.0.113.9:9".parse().unwrap();
    for key in [PSK, [6; 32], [0; 32]] {
        set_psk(&b, &a, key);
        assert_eq!(b.open_from(&initiation.bytes, elsewhere), (vec![], vec![]));
        assert_eq!(b.peer(&a).endpoint, Some(a.address));
    }
    // A newer one is taken, once.
    let initiation = a.rehandshake().remove(0);
    assert_eq!(b.open_from(&initiation.bytes, a.address).1.len(), 1);
    assert_eq!(b.open_from(&initiation.bytes, elsewhere), (vec![], vec![]));
}

#[test]
fn fifty_changes_of_the_preshared_key_lose_nothing() {
    let (a, b) = connected();
    for n in 1..=50u8 {
        let key = [n; 32];
        let (first, second) = if n % 2 == 0 { (&a, &b) } else { (&b, &a) };
        for (tick, sent) in [(0, set_psk(first, second, key)), (2, vec![]), (4, vec![])] {
            // The other end follows half a second later.
            let sent = if tick == 2 { set_psk(second, first, key) } else { sent };
            let from = if tick == 2 { (second, first) } else { (first, second) };
            run(from.0, from.1, sent);
            for node in [&a, &b] {
                let other = if node.address == a.address { &b } else { &a };
                let due = node.tick(Duration::from_millis(u64::from(n) * 1500 + tick * 250));
                run(node, other, due);
            }
            assert!(passes(&a, &b) && passes(&b, &a), "{n}, {tick}");
        }
    }
}

#[test]
fn a_session_from_before_a_preshared_key_ends_with_its_age() {
    let (a, b) = connected();
    // B does not follow.
    set_psk(&a, &b, PSK);
    a.seal(&packet(a.inside, b.inside, 100));
    // The attempts at another session end; then somebody asks again.
    for second in 1..250 {
        a.tick(Duration::from_secs(second));
    }
    let kinds: Vec<_> =
        a.seal(&packet(a.inside, b.inside, 100)).iter().map(|sent| sent.bytes[0]).collect();
    assert_eq!(kinds, [1], "not by the old session, and another is asked for");
}

#[test]
fn a_private_key_set_again_does_not_make_an_old_initiation_new() {
    let (a, b) = pair();
    let initiation = a.seal(&packet(a.inside, b.inside, 100)).remove(0);
    run(&a, &b, vec![initiation.clone()]);
    let elsewhere = "203.0.113.9:9".parse().unwrap();
    set_private_key(&b, [0; 32]);
    assert_eq!(b.open_from(&initiation.bytes, elsewhere), (vec![], vec![]));
    set_private_key(&b, b.private);
    assert_eq!(b.open_from(&initiation.bytes, elsewhere), (vec![], vec![]));
    assert_eq!(b.peer(&a).endpoint, Some(a.address));
}

#[test]
fn a_persistent_keepalive_starts_at_once_and_drops_no_session() {
    let (a, b) = connected();
    let greeting = set_keepalive(&a, &b, 25);
    assert_eq!(greeting.len(), 1);
    assert_eq!(greeting[0].bytes.len(), 32, "an empty message, not a handshake");
    run(&a, &b, greeting);
    assert_eq!(set_keepalive(&a, &b, 20), vec![], "a change of the interval is silent");
    assert!(has_session(&a, &b));
    run(&b, &a, b.tick(Duration::from_secs(11)));
    assert_eq!(a.tick(Duration::from_secs(19)), vec![]);
    let sent = a.tick(Duration::from_secs(20));
    assert_eq!(sent.len(), 1);
    assert_eq!(sent[0].bytes.len(), 32);
    assert_eq!(a.tick(Duration::from_secs(21)), vec![]);
}

#[test]
fn traffic_puts_a_persistent_keepalive_off() {
    let (a, b) = connected();
    let greeting = set_keepalive(&a, &b, 20);
    run(&a, &b, greeting);
    run(&b, &a, b.tick(Duration::from_secs(11)));
    a.tick(Duration::from_secs(15));
    assert!(passes(&a, &b));
    run(&b, &a, b.tick(Duration::from_secs(26)));
    assert_eq!(a.tick(Duration::from_secs(30)), vec![]);
    assert_eq!(a.tick(Duration::from_secs(35)).len(), 1);
}

#[test]
fn allowed_ips_move_between_peers_and_are_removed() {
    let (a, b) = connected();
    let c = Node::new(3);
    a.add(&c);
    let change = |node: &Node, change| {
        a.apply_peer(PeerUpdate { allowed_ips: vec![change], ..PeerUpdate::new(node.public()) })
    };
    change(&c, AllowedIpChange::Add(b.inside.into()));
    assert_eq!(a.peer(&b).allowed_ips, vec![]);
    assert_eq!(a.peer(&c).allowed_ips, vec![net("10.0.0.2/32"), net("10.0.0.3/32")]);
    let sent = a.seal(&packet(a.inside, b.inside, 100));
    assert_eq!(sent[0].to, c.address);
    change(&b, AllowedIpChange::Remove(b.inside.into()));
    assert_eq!(a.peer(&c).allowed_ips.len(), 2, "one cannot remove another's");
    change(&c, AllowedIpChange::Remove(b.inside.into()));
    assert_eq!(a.peer(&c).allowed_ips, vec![net("10.0.0.3/32")]);
    assert_eq!(a.seal(&packet(a.inside, b.inside, 100)), vec![]);
    change(&b, AllowedIpChange::Add(net("10.0.0.99/24")));
    assert_eq!(a.peer(&b).allowed_ips, vec![net("10.0.0.0/24")], "host bits are cut");
}

#[test]
fn a_removed_peer_is_gone_and_starts_anew() {
    let (a, b) = connected();
    let late = b.seal(&packet(b.inside, a.inside, 100)).remove(0);
    a.apply_peer(PeerUpdate { remove: true, ..PeerUpdate::new(b.public()) });
    assert_eq!(a.peers().len(), 0);
    assert_eq!(a.seal(&packet(a.inside, b.inside, 100)), vec![]);
    assert_eq!(a.open_from(&late.bytes, b.address), (vec![], vec![]));
    a.apply_peer(PeerUpdate { update_only: true, ..PeerUpdate::new(b.public()) });
    assert_eq!(a.peers().len(), 0);
    a.add(&b);
    assert_eq!(a.peer(&b).received, 0);
    assert!(!has_session(&a, &b));
    assert!(run(&a, &b, a.rehandshake()).len() <= 1);
    assert!(passes(&a, &b) && passes(&b, &a));
}

#[test]
fn replacing_peers_leaves_only_the_given_ones() {
    let (a, b) = connected();
    let c = Node::new(3);
    a.apply(DeviceUpdate {
        replace_peers: true,
        peers: vec![PeerUpdate::new(c.public())],
        ..DeviceUpdate::default()
    });
    assert_eq!(a.peers().len(), 1);
    assert_eq!(a.peers()[0].public_key, c.public());
    assert_eq!(a.seal(&packet(a.inside, b.inside, 100)), vec![]);
}

#[test]
fn a_peer_that_is_ourselves_is_ignored() {
    let a = Node::new(1);
    a.add(&Node::new(1));
    assert_eq!(a.peers().len(), 0);
    let b = Node::new(2);
    a.add(&b);
    set_private_key(&a, b.private);
    assert_eq!(a.peers().len(), 0, "taking a peer's key removes the peer");
}

#[test]
fn a_changed_private_key_makes_new_sessions() {
    let (mut a, b) = connected();
    a.private = [7; 32];
    let sent = set_private_key(&a, a.private);
    assert_eq!(sent.len(), 1);
    assert_eq!(sent[0].bytes.len(), 148);
    assert_eq!(run(&a, &b, sent), Vec::<Vec<u8>>::new(), "b does not know this key");
    b.add(&a);
    run(&a, &b, a.rehandshake());
    assert!(passes(&a, &b) && passes(&b, &a));
}

#[test]
fn without_a_private_key_nothing_flows_and_nothing_is_forgotten() {
    let (a, b) = connected();
    set_private_key(&a, [0; 32]);
    assert!(!a.device.has_private_key());
    assert_eq!(a.seal(&packet(a.inside, b.inside, 100)), vec![]);
    assert_eq!(a.peer(&b).allowed_ips.len(), 1);
    set_private_key(&a, a.private);
    run(&a, &b, a.rehandshake());
    assert!(passes(&a, &b) && passes(&b, &a));
}

#[test]
fn the_private_key_is_read_back_clamped() {
    let a = Node::new(1);
    let clamped = a.device.private_key();
    assert_eq!((clamped[0] & 7, clamped[31] >> 6), (0, 1));
    assert_eq!(PublicKey::from(&StaticSecret::from(*clamped)).as_bytes(), &a.public());
}

#[test]
fn peers_that_are_added_one_by_one_cost_the_same_each() {
    let time = |peers: u32| {
        let device = Device::new(MTU);
        let start = Instant::now();
        for n in 0..peers {
            let mut key = [9; 32];
            key[..4].copy_from_slice(&n.to_be_bytes());
            let prefix = net(&format!("10.{}.{}.0/24", n / 250, n % 250));
            let allowed_ips = vec![AllowedIpChange::Add(prefix)];
            let peer = PeerUpdate { allowed_ips, ..PeerUpdate::new(key) };
            let update = DeviceUpdate { peers: vec![peer], ..DeviceUpdate::default() };
            device.apply(&update, &mut Outbox::new());
        }
        start.elapsed()
    };
    let (some, many) = (time(2000), time(10_000));
    assert!(many < 12 * some, "{some:?} and {many:?}");
}

#[test]
fn debug_output_holds_no_secret() {
    let update = DeviceUpdate {
        private_key: Some(Zeroizing::new([0xa7; 32])),
        peers: vec![PeerUpdate {
            preshared_key: Some(Zeroizing::new([0xa7; 32])),
            ..PeerUpdate::new([1; 32])
        }],
        ..DeviceUpdate::default()
    };
    assert!(!format!("{update:?}").contains("167"));
}
