//! Everything that an operator or a cluster does, in random order and for as long as is wanted:
//! rotations, upgrades, agents that are killed, outages of the API server. No packet is lost.
//!
//! `GAMBESON_SOAK_SECONDS` makes it longer, `GAMBESON_SOAK_RATE` sets the packets per second of
//! each of the flows, `GAMBESON_SOAK_SEED` repeats a run.

use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

use gambeson_lab::{Lab, Node, Options};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};

use crate::chaos::number;
use crate::common::agent::userspace;
use crate::common::lab::{GAMBESON, lab_up};
use crate::common::scenario::{PATIENCE, within};
use crate::leak::Watch;
use crate::rotation::{all_pairs, assert_perfect, assert_tidy, request, tcp::Streams};

const SECONDS: u64 = 60;
const RATE: u64 = 50;
/// Memory that a process may have more than at the start, in KiB: what an allocator keeps.
const GROWTH: u64 = 8 << 10;

/// One thing that happens.
#[derive(Debug, Clone, Copy)]
enum Happening {
    Rotation,
    RotationOfAll,
    KilledAgent,
    StoppedAgent,
    Upgrade,
    Outage,
}

const HAPPENINGS: [Happening; 10] = [
    Happening::Rotation,
    Happening::Rotation,
    Happening::Rotation,
    Happening::RotationOfAll,
    Happening::KilledAgent,
    Happening::KilledAgent,
    Happening::KilledAgent,
    Happening::StoppedAgent,
    Happening::Upgrade,
    Happening::Outage,
];

/// How often each was done.
#[derive(Debug, Default)]
struct Counts {
    rotations: u32,
    of_all: u32,
    kills: u32,
    upgrades: u32,
    outages: u32,
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rotations, of_all, kills, upgrades, outages } = self;
        write!(
            f,
            "{rotations} rotations, {of_all} of all nodes, {kills} agents ended, {upgrades} \
             upgrades of the tunnel, {outages} API outages"
        )
    }
}

struct Soak<'a> {
    lab: &'a Lab,
    program: PathBuf,
    rng: StdRng,
    counts: Counts,
}

impl Soak<'_> {
    fn some_node(&mut self) -> Node<'_> {
        *self.lab.nodes().choose(&mut self.rng).unwrap()
    }

    fn happen(&mut self, what: Happening) {
        let number = self.rng.random::<u32>().to_string();
        match what {
            Happening::Rotation => {
                self.counts.rotations += 1;
                let name = self.some_node().name();
                request(self.lab, &name, &number);
            }
            Happening::RotationOfAll => {
                self.counts.of_all += 1;
                self.lab.nodes().iter().for_each(|node| request(self.lab, &node.name(), &number));
            }
            Happening::KilledAgent => {
                self.counts.kills += 1;
                let pause = Duration::from_millis(self.rng.random_range(0..2000));
                let node = self.some_node();
                node.kill_agent().unwrap();
                sleep(pause);
                node.start_agent().unwrap();
            }
            Happening::StoppedAgent => {
                self.counts.kills += 1;
                self.some_node().restart_agent().unwrap();
            }
            Happening::Upgrade => {
                self.counts.upgrades += 1;
                install(&self.program);
                self.some_node().restart_agent().unwrap();
            }
            Happening::Outage => {
                self.counts.outages += 1;
                self.lab.kill_api().unwrap();
                sleep(Duration::from_millis(self.rng.random_range(0..4000)));
                self.lab.start_api().unwrap();
            }
        }
    }
}

/// Puts a new file in the program's place.
pub(crate) fn install(program: &PathBuf) {
    let newer = program.with_extension("newer");
    fs::copy(GAMBESON, &newer).unwrap();
    fs::rename(newer, program).unwrap();
}

/// Memory of the agents and of the tunnels, the largest of each, in KiB.
fn memory(lab: &Lab) -> [u64; 2] {
    let of = |pid: i32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let line = status.lines().find(|line| line.starts_with("VmRSS:"));
        line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok()).unwrap_or(0)
    };
    let nodes = lab.nodes();
    let agents = nodes.iter().filter_map(|node| node.agent()).map(|agent| of(agent.pid)).max();
    let tunnels = nodes.iter().flat_map(|node| node.tunnels()).map(|tunnel| of(tunnel.pid)).max();
    [agents.unwrap(), tunnels.unwrap()]
}

/// Waits until no node has anything left to do, which one may begin when another has ended.
fn settled(lab: &Lab) {
    let peers = lab.nodes().len() - 1;
    let is_settled = |node: &Node<'_>| {
        node.status().is_ok_and(|status| {
            status.rotation.is_none() && status.errors.is_empty() && status.peers.len() == peers
        })
    };
    let mut calm = 0;
    within(4 * PATIENCE, "everybody is done", || {
        sleep(Duration::from_millis(500));
        calm = if lab.nodes().iter().all(is_settled) { calm + 1 } else { 0 };
        (calm == 4).then_some(())
    });
}

#[test]
fn nothing_is_lost_whatever_an_operator_does() {
    let seed = number("GAMBESON_SOAK_SEED").unwrap_or_else(rand::random);
    let time = Duration::from_secs(number("GAMBESON_SOAK_SECONDS").unwrap_or(SECONDS));
    let rate = number("GAMBESON_SOAK_RATE").unwrap_or(RATE);
    eprintln!("GAMBESON_SOAK_SEED={seed}");
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let program = folder.path().join("gambeson");
    install(&program);
    let lab =
        lab_up(Options { nodes: 5, pods_per_node: 2, binary: program.clone(), ..userspace() });
    let watch = Watch::start(&lab);
    let traffic = all_pairs(&lab, rate.try_into().unwrap());
    let streams = Streams::start(&lab);
    sleep(Duration::from_secs(2));
    settled(&lab);
    let (before, start) = (memory(&lab), Instant::now());
    let rng = StdRng::seed_from_u64(seed);
    let mut soak = Soak { lab: &lab, program, rng, counts: Counts::default() };
    while start.elapsed() < time {
        let what = *HAPPENINGS.choose(&mut soak.rng).unwrap();
        eprintln!("{:7.1} s: {what:?}", start.elapsed().as_secs_f64());
        soak.happen(what);
        sleep(Duration::from_millis(soak.rng.random_range(0..3000)));
    }
    settled(&lab);
    let (after, streamed) = (memory(&lab), streams.finish());
    let (sent, _) = traffic.so_far();
    eprintln!(
        "{} in {:.0} s: {sent} packets sent, {streamed:?}; agents \
         {} KiB before and {} KiB after, tunnels {} and {}",
        soak.counts,
        start.elapsed().as_secs_f64(),
        before[0],
        after[0],
        before[1],
        after[1],
    );
    assert_perfect(&lab, traffic);
    assert_eq!((streamed.arrived, streamed.damaged), (streamed.sent, 0), "TCP segments were lost");
    watch.assert_silent();
    lab.nodes().into_iter().for_each(assert_tidy);
    for (before, after) in before.into_iter().zip(after) {
        assert!(after <= before + GROWTH, "{before} KiB became {after} KiB");
    }
}
