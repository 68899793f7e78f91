//! Medians, as tables for a page.

use std::fmt;

use comfy_table::{Table, presets::ASCII_MARKDOWN};

use super::chart::{Bar, bars};
use super::load::{Load, Pings};
use super::{Floor, Sample, TCP, UDP, UNASSISTED};
use crate::{Implementation, median};

/// What was measured.
#[derive(Debug, Clone)]
pub struct Report {
    /// The first is the plain wire.
    names: Vec<String>,
    /// By name, then by round.
    samples: Vec<Vec<Sample>>,
    floors: Vec<Floor>,
}

impl Report {
    pub(super) fn new(implementations: &[Implementation]) -> Self {
        let tunnels = implementations.iter().map(|of| of.name.clone());
        let names: Vec<_> = std::iter::once("plain wire".to_owned()).chain(tunnels).collect();
        Self { samples: vec![Vec::new(); names.len()], names, floors: Vec::new() }
    }

    pub(super) fn floor(&mut self, floor: Floor) {
        self.floors.push(floor);
    }

    pub(super) fn sample(&mut self, of: usize, sample: Sample) {
        self.samples[of].push(sample);
    }

    /// The median over the rounds.
    fn median(&self, of: usize, value: impl Fn(&Sample) -> f64) -> f64 {
        median(self.samples[of].iter().map(value))
    }

    /// Processor time per GB that no tunnel can be below, s: that of the plain wire for such a
    /// load, and of sealing and opening.
    fn least(&self, load: impl Fn(&Sample) -> Load) -> f64 {
        self.median(0, |sample| load(sample).cost)
            + median(self.floors.iter().map(|floor| floor.seal + floor.open))
    }

    fn throughput(&self) -> Table {
        let mut table =
            table("TCP Gb/s (CPU s per GB, times the floor)", &TCP.map(|(name, _)| name));
        let costs = |n: usize| move |sample: &Sample| sample.tcp[n];
        let floor = (0..TCP.len()).map(|n| format!("({:.2}, 1.0)", self.least(costs(n))));
        for (of, name) in self.names.iter().enumerate() {
            let cells = (0..TCP.len()).map(|n| {
                let gigabits = self.median(of, |sample| sample.tcp[n].gigabits);
                let cost = self.median(of, |sample| sample.tcp[n].cost);
                match of {
                    0 => format!("{gigabits:.2} ({cost:.2})"),
                    _ => format!("{gigabits:.2} ({cost:.2}, {:.1})", cost / self.least(costs(n))),
                }
            });
            table.add_row(std::iter::once(name.clone()).chain(cells));
            if of == 0 {
                let name = "floor: wire, seal, open".to_owned();
                table.add_row(std::iter::once(name).chain(floor.clone()));
            }
        }
        table
    }

    fn packets(&self) -> Table {
        let mut table = table(
            "",
            &["UDP 1372 B, Gb/s", "UDP 64 B, 1000/s", "ping us", "beside 1 TCP stream", "MiB"],
        );
        for (of, name) in self.names.iter().enumerate() {
            let pings = |pings: fn(&Sample) -> Pings| {
                let median = self.median(of, |sample| pings(sample).median);
                let slowest = self.median(of, |sample| pings(sample).slowest);
                format!("{median:.0} (99 of 100: {slowest:.0})")
            };
            table.add_row([
                name.clone(),
                format!("{:.2}", self.median(of, |sample| sample.udp[0].gigabits)),
                format!("{:.0}", self.median(of, |sample| sample.udp[1].kilopackets)),
                pings(|sample| sample.idle),
                pings(|sample| sample.loaded),
                format!("{:.0}", self.median(of, |sample| sample.memory)),
            ]);
        }
        table
    }

    fn unassisted(&self) -> Table {
        let heading = "wire without tx-udp-segmentation: Gb/s (CPU s per GB)";
        let mut table = table(heading, &["TCP 1 stream", "TCP 4 streams", "UDP 1372 B"]);
        for (of, name) in self.names.iter().enumerate() {
            let cells = (0..UNASSISTED.len()).map(|n| {
                let gigabits = self.median(of, |sample| sample.unassisted[n].gigabits);
                format!(
                    "{gigabits:.2} ({:.2})",
                    self.median(of, |sample| sample.unassisted[n].cost)
                )
            });
            table.add_row(std::iter::once(name.clone()).chain(cells));
        }
        table
    }

    /// The tunnels' throughput as a picture (SVG).
    pub fn chart(&self) -> String {
        let tunnels = || self.names.iter().enumerate().skip(1);
        let group = |value: &dyn Fn(&Sample) -> f64| -> Vec<Bar> {
            let bar = |(of, name): (usize, &String)| Bar {
                name: name.clone(),
                value: self.median(of, value),
            };
            tunnels().map(bar).collect()
        };
        bars(&[
            (format!("TCP, {}, Gb/s", TCP[0].0), group(&|sample| sample.tcp[0].gigabits)),
            (format!("TCP, {}, Gb/s", TCP[1].0), group(&|sample| sample.tcp[1].gigabits)),
            (format!("UDP, {}, Gb/s", UDP[0].0), group(&|sample| sample.udp[0].gigabits)),
            (format!("UDP, {}, 1000/s", UDP[1].0), group(&|sample| sample.udp[1].kilopackets)),
        ])
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of = |part: fn(&Floor) -> f64| median(self.floors.iter().map(part));
        let (seal, open) = (of(|floor| floor.seal), of(|floor| floor.open));
        writeln!(f, "{}\n", self.throughput())?;
        writeln!(f, "{}\n", self.packets())?;
        writeln!(f, "{}\n", self.unassisted())?;
        writeln!(
            f,
            "One core seals a GB of 1440 B packets in {seal:.2} s and opens it in {open:.2} s."
        )
    }
}

fn table(corner: &str, columns: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(ASCII_MARKDOWN);
    table.set_header(std::iter::once(corner).chain(columns.iter().copied()));
    table
}
