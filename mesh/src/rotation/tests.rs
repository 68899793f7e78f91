//! Rotations in a simulated cluster, in which packets flow all the time.

use std::time::Duration;

use gambeson_keys::SecretId;
use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestRng};

use super::{Step, Wait};
use crate::observed::Preshared;

mod world;

use world::{Odds, World};

/// A rotation with healthy peers.
const SOON: Duration = Duration::from_secs(15);

fn calm(generations: &[u64]) -> World {
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    World::new(generations, Odds::default(), rng)
}

#[test]
fn a_key_is_replaced_as_soon_as_the_old_one_is_quiet() {
    let mut world = calm(&[6, 3, 0]);
    world.request(0, "now");
    let took = world.run_until(SOON, |world| world.has_settled(0, 7));
    assert!(took >= super::DRAIN, "{took:?}");
    // The same request asks for nothing more.
    world.run(Duration::from_secs(30));
    assert!(world.has_settled(0, 7));
    world.request(0, "again");
    world.run_until(SOON, |world| world.has_settled(0, 8));
}

#[test]
fn all_nodes_may_rotate_at_once() {
    let mut world = calm(&[0, 1, 2, 3]);
    for round in 1..4 {
        for node in 0..4 {
            world.request(node, &format!("round {round}"));
        }
        world.run_until(SOON, |world| {
            (0..4).all(|node| world.has_settled(node, node as u64 + round))
        });
    }
}

#[test]
fn a_peer_that_is_cut_from_the_api_server_is_waited_for() {
    for sends in [true, false] {
        let mut world = calm(&[0, 0, 0]);
        world.machines[2].api = false;
        for machine in &mut world.machines {
            machine.sends = sends;
        }
        world.request(0, "now");
        world.run(Duration::from_secs(120));
        let progress = world.machines[0].rotation().unwrap().progress().unwrap().clone();
        assert_eq!((progress.step, progress.blocked), (Step::Move, true), "{progress:?}");
        assert_eq!((progress.moved, progress.peers), (1, 2));
        assert_eq!(
            progress.waiting.into_iter().collect::<Vec<_>>(),
            [("node-3".into(), Wait::Handshake)]
        );
        world.machines[2].api = true;
        world.run_until(SOON, |world| world.has_settled(0, 1));
    }
}

/// The time in which nobody was asked tells nothing.
#[test]
fn a_quiet_peer_is_not_taken_for_away_after_an_outage() {
    let mut world = calm(&[0, 0]);
    for machine in &mut world.machines {
        machine.sends = false;
    }
    world.machines[1].api = false;
    world.request(0, "now");
    world.run(Duration::from_millis(200));
    // Its own Node as the watch tells it says nothing new for a minute.
    world.odds.late = 1;
    world.run(Duration::from_secs(60));
    assert_eq!(world.machines[0].rotation().unwrap().progress().unwrap().step, Step::Say);
    world.odds.late = 0;
    world.run(Duration::from_secs(30));
    assert!(world.machines[0].rotation().unwrap().progress().unwrap().blocked);
    world.machines[1].api = true;
    world.run_until(SOON, |world| world.has_settled(0, 1));
}

#[test]
fn a_peer_whose_agent_is_gone_is_waited_for() {
    for sends in [true, false] {
        let mut world = calm(&[0, 0]);
        for machine in &mut world.machines {
            machine.sends = sends;
        }
        world.odds.restart = u32::MAX;
        world.machines[1].crash();
        world.request(0, "now");
        world.run(Duration::from_secs(60));
        assert!(world.machines[0].rotation().unwrap().progress().unwrap().blocked);
        world.odds.restart = 0;
        world.run_until(SOON, |world| world.has_settled(0, 1));
    }
}

#[test]
fn a_peer_that_is_away_is_not_waited_for() {
    let mut world = calm(&[0, 0, 0]);
    world.machines[2].api = false;
    world.cut.extend([(0, 2), (1, 2)]);
    world.request(0, "now");
    let took = world.run_until(super::AWAY + SOON, |world| world.has_settled(0, 1));
    assert!(took >= super::AWAY, "{took:?}");
    // It comes back, and hears of the new key from the API server.
    world.machines[2].api = true;
    world.run(Duration::from_secs(2));
    world.cut.clear();
    world.run(Duration::from_secs(10));
}

#[test]
fn a_revoked_key_goes_at_once() {
    let mut world = calm(&[0, 0]);
    world.machines[1].api = false;
    // What is under way may be lost.
    world.strict = false;
    world.request(0, "revoke 1");
    world.run_until(Duration::from_secs(2), |world| world.has_settled(0, 1));
    world.machines[1].api = true;
    world.run(Duration::from_secs(2));
    world.strict = true;
    world.run(Duration::from_secs(10));
}

/// A key that a stolen disk had beside the one that was being replaced goes as well.
#[test]
fn a_revocation_ends_a_rotation_and_begins_another() {
    let mut world = calm(&[0, 0]);
    world.request(0, "now");
    world.run(Duration::from_secs(1));
    world.strict = false;
    world.request(0, "revoke");
    world.run_until(Duration::from_secs(4), |world| world.has_settled(0, 2));
    world.strict = true;
    world.request(0, "after");
    world.run_until(SOON, |world| world.has_settled(0, 3));
}

/// The file with the secret reaches the nodes at any time, and twice.
#[test]
fn another_secret_takes_other_keys_and_loses_nothing() {
    let mut world = calm(&[0, 0, 0]);
    for (round, secret) in (1..).zip([[1; 8], [2; 8], [3; 8]].map(SecretId::from_bytes)) {
        for node in [2, 0, 1] {
            world.machines[node].secret = Some(secret);
            world.run(Duration::from_millis(800 * node as u64));
        }
        world.run_until(SOON, |world| (0..3).all(|node| world.has_settled(node, round)));
        for machine in &world.machines {
            let devices =
                machine.observed.links.values().filter_map(|link| link.wireguard.as_ref());
            let peers = devices.flat_map(|device| device.peers.values());
            assert!(peers.map(|peer| peer.preshared).all(|it| it == Preshared::Of(secret)));
        }
    }
}

#[test]
fn a_schedule_spreads_the_nodes_over_its_last_tenth() {
    let every = Duration::from_secs(90 * 86_400);
    let at: Vec<_> = (0..=255).map(|n| super::due_at(every, &crate::fixtures::key(n))).collect();
    assert!(at.iter().all(|at| *at <= every && *at > every / 10 * 9));
    assert!(at.iter().min().unwrap() < &(every / 100 * 98), "{at:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Agents crash at every step, events are late, handshakes get lost, API servers go away:
    /// packets arrive all the while, and in the end every node has one key, the newest.
    #[test]
    fn no_packet_is_lost_whatever_happens_to_agents(
        seed in any::<[u8; 32]>(),
        generations in proptest::collection::vec(0_u64..4, 2..=4),
        (crash, late, lost) in (10_u32..400, 1_u32..6, 1_u32..6),
        sends in any::<bool>(),
    ) {
        let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &seed);
        let odds = Odds { crash, late: late + 1, lost: lost + 1, restart: 10 };
        let mut world = World::new(&generations, odds, rng);
        for machine in &mut world.machines {
            machine.sends = sends;
        }
        for round in 0..150 {
            if world.chance(20) {
                let node = round % generations.len();
                world.request(node, &format!("{round}"));
            }
            if world.chance(30) {
                let node = (round / 2) % generations.len();
                world.machines[node].secret = Some(SecretId::from_bytes([7; 8]));
            }
            if world.chance(25) {
                let node = (round / 3) % generations.len();
                world.machines[node].api = !world.machines[node].api;
            }
            world.tick();
        }
        world.odds = Odds::default();
        let secret = world.machines.iter().find_map(|machine| machine.secret);
        for machine in &mut world.machines {
            machine.api = true;
            machine.secret = secret;
        }
        let settled = |world: &World| (0..world.machines.len()).all(|node| {
            let machine = &world.machines[node];
            let newest = machine.own.keys.keys().last().unwrap().number();
            let said = &world.api[&machine.own.name].annotations;
            machine.own.keys.len() == 1
                && said.get("config/rotate").map(String::as_str) == machine.answered.as_deref()
                && world.has_settled(node, newest)
        });
        // One rotation may wait for another before it.
        world.run_until(4 * SOON, settled);
    }
}
