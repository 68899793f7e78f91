//! A device under attack, or beside a slow neighbour, and what becomes of an unrelated flow.

use std::thread;
use std::time::Duration;

use comfy_table::{Table, presets::ASCII_MARKDOWN};

use crate::flow::{Flow, Outcome};
use crate::stranger::{Flood, Stranger};
use crate::world::{PEER, SUBJECT, World};
use crate::{Error, Implementation, median};

/// Packets per second of the flow that is measured.
const RATE: u32 = 1000;
/// How long each measurement takes.
const TIME: Duration = Duration::from_secs(6);

/// What happens while the flow goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Condition {
    Quiet,
    Handshakes,
    Garbage,
    SlowNeighbour,
}

const CONDITIONS: [(Condition, &str); 4] = [
    (Condition::Quiet, "nothing else"),
    (Condition::Handshakes, "40,000 handshakes/s with cookies"),
    (Condition::Garbage, "200,000 datagrams/s of garbage"),
    (Condition::SlowNeighbour, "a neighbour behind 10 Mbit/s, flooded"),
];

/// Measures each under each condition, in turn, so many times, and gives the medians.
///
/// # Errors
/// What does not work, with the command.
pub fn attack(implementations: &[Implementation], rounds: usize) -> Result<Table, Error> {
    let mut table = Table::new();
    table.load_style(ASCII_MARKDOWN);
    table.set_header(["", "beside 1,000 packets/s", "lost %", "median ms", "99 of 100 ms"]);
    for (condition, description) in CONDITIONS {
        let mut outcomes = vec![Vec::new(); implementations.len()];
        for round in 1..=rounds {
            for (implementation, outcomes) in implementations.iter().zip(&mut outcomes) {
                eprintln!("{description}: {}, round {round}", implementation.name);
                outcomes.push(measure(implementation, condition)?);
            }
        }
        for (implementation, outcomes) in implementations.iter().zip(&outcomes) {
            let ms = |time: fn(&Outcome) -> Duration| {
                median(outcomes.iter().map(|outcome| time(outcome).as_secs_f64() * 1e3))
            };
            table.add_row([
                implementation.name.clone(),
                description.to_owned(),
                format!("{:.1}", median(outcomes.iter().map(|outcome| outcome.lost))),
                format!("{:.2}", ms(|outcome| outcome.median)),
                format!("{:.2}", ms(|outcome| outcome.slowest)),
            ]);
        }
    }
    Ok(table)
}

fn measure(implementation: &Implementation, condition: Condition) -> Result<Outcome, Error> {
    let world = World::new(implementation)?;
    if condition == Condition::SlowNeighbour {
        world.slow_down()?;
    }
    let (from, to) = (SUBJECT.socket(&SUBJECT.inside())?, PEER.socket(&PEER.inside())?);
    let flow = Flow::start(from, to, RATE)?;
    match condition {
        Condition::Quiet => thread::sleep(TIME),
        Condition::Handshakes => drop(stranger(&world)?.flood(Flood::Handshakes, 40_000, TIME)?),
        Condition::Garbage => drop(stranger(&world)?.flood(Flood::Garbage, 200_000, TIME)?),
        Condition::SlowNeighbour => world.flood_neighbour(TIME.as_secs())?,
    }
    Ok(flow.finish()?)
}

fn stranger(world: &World) -> Result<Stranger, Error> {
    Ok(Stranger::new(world.attacker()?, SUBJECT.public_key())?)
}
