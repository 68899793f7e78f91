use std::io::{self, Write as _};
use std::process::ExitCode;

use crate::cni::{self, Environment, ErrorReport, SUPPORTED_VERSIONS};

/// Run as a CNI plugin: configuration on standard input, parameters in the environment.
///
/// Container runtimes start the plugin by the names gambeson-cni and flannel. It reads
/// subnet.env, which the agent writes, and delegates to the bridge plugin. Results and errors
/// are JSON on standard output, as the CNI specification has it.
#[derive(Debug, clap::Args)]
#[command(after_long_help = "Example:
  CNI_COMMAND=VERSION gambeson cni")]
pub(super) struct Args {}

pub(super) fn invoked_as_plugin() -> bool {
    let name = std::env::args_os().next().map(std::path::PathBuf::from);
    matches!(
        name.as_ref().and_then(|p| p.file_name()).and_then(|n| n.to_str()),
        Some("gambeson-cni" | "flannel")
    )
}

pub(super) fn run(_args: &Args) -> ExitCode {
    let environment = match Environment::read(std::env::var_os) {
        Ok(Some(environment)) => environment,
        Ok(None) => return about(),
        Err(error) => return fail(&error.into()),
    };
    match cni::run(&environment, io::stdin().lock()) {
        Ok(output) => print(&output, ExitCode::SUCCESS),
        Err(report) => fail(&report),
    }
}

fn about() -> ExitCode {
    eprintln!(
        "gambeson {}: a CNI plugin, for container runtimes to start. CNI versions: {}",
        env!("CARGO_PKG_VERSION"),
        SUPPORTED_VERSIONS.join(", ")
    );
    ExitCode::SUCCESS
}

fn fail(report: &ErrorReport) -> ExitCode {
    let report = serde_json::to_vec(report).unwrap_or_default();
    print(&report, ExitCode::FAILURE)
}

fn print(output: &[u8], code: ExitCode) -> ExitCode {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(output).and_then(|()| stdout.flush()) {
        Ok(()) => code,
        Err(_) => ExitCode::FAILURE,
    }
}
