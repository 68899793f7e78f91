//! `implementations x conditions x rounds -> table`: a device under attack, or beside a slow
//! neighbour, and what becomes of an unrelated flow.

mod flow;
pub mod stranger;
mod world;

use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use comfy_table::{Table, presets::ASCII_MARKDOWN};

use flow::{Flow, Outcome};
use stranger::{Flood, Stranger};
use world::{PEER, SUBJECT, World};

/// What went wrong.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// Packets per second of the flow that is measured.
const RATE: u32 = 1000;
/// How long each measurement takes.
const TIME: Duration = Duration::from_secs(6);

/// A userspace WireGuard, which takes the device's name as its last argument and goes to the
/// background.
#[derive(Debug, Clone)]
pub struct Implementation {
    /// What it is called in the table.
    pub name: String,
    /// Its file.
    pub program: PathBuf,
    /// Before the device's name.
    pub arguments: Vec<String>,
}

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

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<_> = values.collect();
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
