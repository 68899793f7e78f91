//! `gambeson-bench`: see `--help`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use gambeson_bench::attack::attack;
use gambeson_bench::speed::speed;
use gambeson_bench::{Error, Implementation};

/// Measure the tunnel beside other userspace WireGuards.
///
/// Hosts are network namespaces. Nothing outside of them is touched. Needs root, iperf3, ping,
/// ethtool, socat, tc and wg.
#[derive(Debug, Parser)]
struct Args {
    /// What is measured.
    what: What,

    /// Our own program.
    #[arg(long, value_name = "FILE")]
    gambeson: PathBuf,

    /// Where the others are: wireguard-go, boringtun-cli, gotatun. Those that are not there
    /// are left out.
    #[arg(long, value_name = "FOLDER")]
    peers: Option<PathBuf>,

    /// How often each is measured; the tables have the medians.
    #[arg(long, default_value_t = 3)]
    rounds: usize,

    /// How long each load of `speed` takes, s.
    #[arg(long, default_value_t = 4)]
    seconds: u64,

    /// Where a picture of `speed` goes (SVG).
    #[arg(long, value_name = "FILE")]
    chart: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum What {
    /// Throughput, latency, processor time and memory.
    Speed,
    /// What becomes of a flow beside floods and a slow neighbour.
    Attack,
}

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("gambeson-bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> Result<(), Error> {
    let arguments = vec!["tunnel".to_owned()];
    let ours = Implementation { name: "gambeson".into(), program: args.gambeson, arguments };
    let others = args.peers.map(|folder| {
        [("wireguard-go", &[][..]), ("boringtun-cli", KEEP), ("gotatun", KEEP)]
            .map(|(name, arguments)| Implementation {
                name: name.into(),
                program: folder.join(name),
                arguments: arguments.iter().map(|&argument| argument.to_owned()).collect(),
            })
            .into_iter()
            .filter(|other| other.program.exists())
    });
    let mut all: Vec<_> = std::iter::once(ours).chain(others.into_iter().flatten()).collect();
    match args.what {
        What::Attack => {
            // The one that the others are measured by.
            all.truncate(2);
            println!("{}", attack(&all, args.rounds)?);
        }
        What::Speed => {
            let report = speed(&all, args.rounds, Duration::from_secs(args.seconds))?;
            println!("{report}");
            if let Some(file) = args.chart {
                std::fs::write(file, report.chart())?;
            }
        }
    }
    Ok(())
}

/// They would give up root, which the namespaces need.
const KEEP: &[&str] = &["--disable-drop-privileges"];
