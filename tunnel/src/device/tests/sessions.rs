//! Sessions over time: rekeying, ageing, giving up.

use std::time::Duration;

use super::pair::{Node, Sent, connected, packet, pair, passes, run};
use crate::Outbox;

/// Lets time go by for both, in ticks, and carries what they send. Returns the number of
/// initiations sent.
fn pass_time(a: &Node, b: &Node, from: u64, to: u64, mut each: impl FnMut(u64)) -> usize {
    let mut initiations = 0;
    for tick in from * 4..to * 4 {
        let now = Duration::from_millis(tick * 250);
        for (one, other) in [(a, b), (b, a)] {
            let sent = one.tick(now);
            initiations += count(&sent);
            run(one, other, sent);
        }
        if tick % 4 == 0 {
            each(tick / 4);
        }
    }
    initiations
}

fn count(sent: &[Sent]) -> usize {
    sent.iter().filter(|sent| sent.bytes[0] == 1).count()
}

/// Carries a packet and says how many initiations that took.
fn send(a: &Node, b: &Node) -> usize {
    let sent = a.seal(&packet(a.inside, b.inside, 100));
    let initiations = count(&sent);
    run(a, b, sent);
    initiations
}

#[test]
fn the_initiator_makes_a_new_session_after_120_s() {
    let (a, b) = connected();
    let initiations = pass_time(&a, &b, 0, 119, |_| assert!(passes(&a, &b) && passes(&b, &a)));
    assert_eq!(initiations, 0);
    let before = a.peer(&b).last_handshake;
    // The responder's packets alone do not.
    assert_eq!(pass_time(&a, &b, 119, 127, |_| assert_eq!(send(&b, &a), 0)), 0);
    let initiations = pass_time(&a, &b, 127, 200, |_| assert!(passes(&a, &b) && passes(&b, &a)));
    assert_eq!(initiations, 1);
    assert!(a.peer(&b).last_handshake > before);
}

#[test]
fn a_flow_both_ways_loses_nothing_over_three_new_sessions() {
    let (a, b) = connected();
    let initiations = pass_time(&a, &b, 0, 400, |_| {
        assert!((0..20).all(|_| passes(&a, &b) && passes(&b, &a)));
    });
    assert_eq!(initiations, 3);
}

#[test]
fn the_initiator_that_only_receives_makes_one_before_the_end() {
    let (a, b) = connected();
    let initiations = pass_time(&a, &b, 0, 200, |_| assert!(passes(&b, &a)));
    // Its empty messages, every 10 s, are sent as well: at 120 s at the earliest.
    assert!((1..=2).contains(&initiations), "{initiations}");
}

#[test]
fn a_sparse_flow_one_way_needs_no_more_handshakes_than_others() {
    let (a, b) = connected();
    let mut own = 0;
    let initiations = pass_time(&a, &b, 0, 180, |second| {
        if second % 20 == 0 {
            own += send(&a, &b);
        }
    });
    assert!(initiations + own <= 2, "{initiations} and {own}");
}

#[test]
fn a_session_is_not_used_past_its_age() {
    let (a, b) = connected();
    for (second, kind) in [(179, 4), (190, 1)] {
        let mut sent = a.tick(Duration::from_secs(second));
        sent.extend(a.seal(&packet(a.inside, b.inside, 100)));
        let kinds: Vec<_> = sent.iter().map(|sent| sent.bytes[0]).collect();
        assert!(kinds.contains(&kind), "{kinds:?} after {second} s");
        assert!(second == 179 || !kinds.contains(&4), "{kinds:?} after {second} s");
    }
}

#[test]
fn a_message_of_a_session_past_its_age_is_refused() {
    let (a, b) = connected();
    let late = a.seal(&packet(a.inside, b.inside, 100)).remove(0);
    b.tick(Duration::from_secs(181));
    assert_eq!(b.open_from(&late.bytes, a.address), (vec![], vec![]));
}

#[test]
fn giving_up_a_handshake_keeps_a_session_that_is_valid() {
    let (a, b) = connected();
    // B hears nothing from here on, but what B says still arrives.
    let mut attempts = Vec::new();
    for tick in 0..4 * 150 {
        if count(&a.tick(Duration::from_millis(tick * 250))) > 0 {
            attempts.push(tick / 4);
        }
        if tick < 4 * 14 {
            a.seal(&packet(a.inside, b.inside, 100));
        }
    }
    assert!((16..=19).contains(&attempts.len()), "{attempts:?}");
    assert!(attempts.last().is_some_and(|last| (98..=106).contains(last)), "{attempts:?}");
    let sent = b.seal(&packet(b.inside, a.inside, 100)).remove(0);
    assert_eq!(a.open_from(&sent.bytes, b.address).0.len(), 1);
}

#[test]
fn an_answer_540_s_after_the_last_session_counts() {
    let (a, b) = connected();
    assert!(passes(&b, &a));
    b.tick(Duration::from_secs(539));
    let mut initiation = a.tick(Duration::from_secs(539));
    initiation.extend(a.seal(&packet(a.inside, b.inside, 100)));
    assert_eq!(count(&initiation), 1);
    a.tick(Duration::from_millis(540_250));
    assert_eq!(run(&a, &b, initiation).len(), 1, "the packet that asked for it");
}

#[test]
fn a_handshake_goes_on_540_s_after_the_last_session() {
    let (a, b) = connected();
    // Nobody answers, and somebody keeps asking.
    let mut last = 0;
    for tick in 4 * 400..4 * 1200 {
        let mut sent = a.tick(Duration::from_millis(tick * 250));
        sent.extend(a.seal(&packet(a.inside, b.inside, 100)));
        if count(&sent) > 0 {
            let pause = (tick - std::mem::replace(&mut last, tick)) / 4;
            assert!(!(6..400).contains(&pause), "{pause} s without an attempt at {}", tick / 4);
        }
    }
    // And the answer to the last one counts.
    let initiation = a.rehandshake();
    run(&a, &b, initiation);
    assert!(passes(&a, &b));
}

#[test]
fn initiations_that_stay_unconfirmed_do_not_touch_the_session() {
    let (a, b) = connected();
    for n in 1..40 {
        let initiation = a.rehandshake().remove(0);
        // The response is lost.
        b.tick(Duration::from_secs(n));
        b.open_from(&initiation.bytes, a.address);
        let sent = b.seal(&packet(b.inside, a.inside, 100)).remove(0);
        assert_eq!(a.open_from(&sent.bytes, b.address).0.len(), 1, "{n}");
        let sent = a.seal(&packet(a.inside, b.inside, 100)).remove(0);
        assert_eq!(b.open_from(&sent.bytes, a.address).0.len(), 1, "{n}");
    }
}

#[test]
fn messages_under_way_arrive_when_both_ends_make_a_new_session_at_once() {
    let (a, b) = connected();
    let late_a = a.seal(&packet(a.inside, b.inside, 100)).remove(0);
    let late_b = b.seal(&packet(b.inside, a.inside, 100)).remove(0);
    let (from_a, from_b) = (a.rehandshake(), b.rehandshake());
    run(&a, &b, from_a);
    run(&b, &a, from_b);
    assert!(passes(&a, &b) && passes(&b, &a));
    assert_eq!(b.open_from(&late_a.bytes, a.address).0.len(), 1);
    assert_eq!(a.open_from(&late_b.bytes, b.address).0.len(), 1);
}

#[test]
fn the_newest_packets_wait_for_a_session_and_none_outlives_the_interface() {
    let (a, b) = pair();
    let packets: Vec<_> = (100..400).map(|len| packet(a.inside, b.inside, len)).collect();
    let sent: Vec<_> = packets.iter().flat_map(|packet| a.seal(packet)).collect();
    assert_eq!(run(&a, &b, sent), packets[300 - 128..]);
    let (a, b) = pair();
    a.seal(&packets[0]);
    a.device.set_up(false, &mut Outbox::new());
    a.device.set_up(true, &mut Outbox::new());
    assert_eq!(run(&a, &b, a.rehandshake()), Vec::<Vec<u8>>::new());
}

#[test]
fn indices_do_not_tell_which_sessions_are_one_peers() {
    let (a, _) = pair();
    let index = |sent: Vec<Sent>| u32::from_le_bytes(sent[0].bytes[4..8].try_into().unwrap());
    let indices: Vec<_> = (0..8).map(|_| index(a.rehandshake())).collect();
    let is_near = |pair: &[u32]| pair[0].abs_diff(pair[1]) < 1 << 16;
    assert!(!indices.windows(2).any(is_near), "{indices:x?}");
}

#[test]
fn messages_may_be_8_000_out_of_order() {
    let (a, b) = connected();
    let early = a.seal(&packet(a.inside, b.inside, 100)).remove(0);
    for _ in 0..8000 {
        assert!(passes(&a, &b));
    }
    assert_eq!(b.open_from(&early.bytes, a.address).0.len(), 1);
    assert_eq!(b.open_from(&early.bytes, a.address).0.len(), 0);
}

#[test]
fn a_handshake_without_an_answer_lets_go_of_the_source_address() {
    let (a, b) = connected();
    let source = || a.device.tables().peers().find_map(|peer| peer.lock().endpoint?.source);
    assert!(source().is_some());
    a.seal(&packet(a.inside, b.inside, 100));
    let sent = a.tick(Duration::from_secs(16));
    assert_eq!(count(&sent), 1);
    assert_eq!(source(), None);
}
