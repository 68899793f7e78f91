//! `gambeson-bench`: see `--help`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use gambeson_bench::{Error, Implementation, attack};

/// Measure the tunnel beside other userspace WireGuards.
///
/// Three hosts in network namespaces; the measured tunnel has a processor to itself. Nothing
/// outside of these namespaces is touched. Needs root.
#[derive(Debug, Parser)]
struct Args {
    /// Our own program.
    #[arg(long, value_name = "FILE")]
    gambeson: PathBuf,

    /// wireguard-go, if it is to be measured as well.
    #[arg(long, value_name = "FILE")]
    wireguard_go: Option<PathBuf>,

    /// How often each is measured; the table has the medians.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
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
    let theirs = args.wireguard_go.map(|program| Implementation {
        name: "wireguard-go".into(),
        program,
        arguments: Vec::new(),
    });
    let all: Vec<_> = std::iter::once(ours).chain(theirs).collect();
    println!("{}", attack(&all, args.rounds)?);
    Ok(())
}
