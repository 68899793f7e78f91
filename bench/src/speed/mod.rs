//! Throughput, latency, processor time and memory of tunnels, beside the plain wire and the
//! floor.

mod chart;
mod floor;
mod link;
mod load;
mod report;

use std::time::Duration;

use crate::{Error, Implementation};
pub use floor::Floor;
use link::Link;
use load::{Load, Pings};
pub use report::Report;

/// What is measured of one tunnel in one round.
#[derive(Debug, Clone, Default)]
struct Sample {
    /// By [`TCP`].
    tcp: Vec<Load>,
    /// By [`UDP`].
    udp: Vec<Load>,
    idle: Pings,
    /// Beside one TCP stream.
    loaded: Pings,
    /// TCP streams and UDP payloads as above, where the wire does not split datagrams itself.
    unassisted: Vec<Load>,
    /// Resident, of one tunnel after the load, MiB.
    memory: f64,
}

/// What is asked of iperf3, for TCP.
const TCP: [(&str, &[&str]); 4] = [
    ("1 stream", &[]),
    ("4 streams", &["--parallel", "4"]),
    ("1 back", &["--reverse"]),
    ("both ways", &["--bidir"]),
];

/// And for UDP: the payload, bytes.
const UDP: [(&str, &[&str]); 2] = [
    ("1372 B", &["--udp", "--bitrate", "0", "--length", "1372"]),
    ("64 B", &["--udp", "--bitrate", "0", "--length", "64"]),
];

/// What is measured of the wire that splits no datagrams itself.
const UNASSISTED: [(&str, &[&str]); 3] = [TCP[0], TCP[1], UDP[0]];

/// Measures the plain wire and each tunnel in turn, so many times.
///
/// # Errors
/// What does not work, with the command.
pub fn speed(
    implementations: &[Implementation],
    rounds: usize,
    time: Duration,
) -> Result<Report, Error> {
    let mut report = Report::new(implementations);
    for round in 1..=rounds {
        report.floor(Floor::measure()?);
        for (n, of) in std::iter::once(None).chain(implementations.iter().map(Some)).enumerate() {
            let name = of.map_or("plain wire", |of| &of.name);
            eprintln!("round {round} of {rounds}: {name}");
            let sample = measure(of, time).map_err(|error| format!("{name}: {error}"))?;
            report.sample(n, sample);
        }
    }
    Ok(report)
}

/// `None` is the plain wire.
fn measure(implementation: Option<&Implementation>, time: Duration) -> Result<Sample, Error> {
    let link = Link::new(implementation)?;
    let run = |options: &[(&str, &[&str])]| -> Result<Vec<Load>, Error> {
        options.iter().map(|(_, options)| link.load(options, time)).collect()
    };
    let mut sample = Sample { idle: link.ping()?, ..Sample::default() };
    sample.tcp = run(&TCP)?;
    sample.udp = run(&UDP)?;
    sample.loaded = link.ping_beside(TCP[0].1, time)?;
    sample.memory = link.memory()?;
    link.split_no_datagrams()?;
    sample.unassisted = run(&UNASSISTED)?;
    Ok(sample)
}
