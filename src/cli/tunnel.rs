use super::Failure;

/// Placeholder for tunnel.
#[derive(Debug, clap::Args)]
pub(super) struct Args {}

pub(super) fn run(_args: Args) -> Result<(), Failure> {
    Ok(())
}
