use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::Failure;
use crate::config::DEFAULT_SOCKET;
use crate::exit::Exit;
use crate::status::Status;

/// Longer than the agent takes to answer from memory when the kernel does not.
const READ_TIMEOUT: Duration = Duration::from_secs(10);

/// Show this node's peers, and what is refused and why
///
/// Asks the agent on this node. The JSON document has a schema version and the fields of the
/// table, with ages in seconds and sizes in bytes.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  gambeson status
  gambeson status --check ready || echo no pod should start here
  gambeson status --json | jq '.peers[] | select(.handshake_age_seconds == null) | .name'")]
pub(super) struct Args {
    /// Print one JSON document
    #[arg(long)]
    json: bool,
    /// Print nothing, and fail with the reason unless it is so
    #[arg(long, value_name = "WHAT", conflicts_with = "json")]
    check: Option<Check>,
    /// Unix socket of the agent
    #[arg(long, env = "GAMBESON_SOCKET", value_name = "FILE", default_value = DEFAULT_SOCKET)]
    socket: PathBuf,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Check {
    /// The agent goes on
    Healthy,
    /// Pods can be started: the guard and subnet.env are in place
    Ready,
}

/// Why there is no status to show.
#[derive(Debug, thiserror::Error)]
enum StatusError {
    #[error(
        "no agent answers on {}; start `gambeson agent` on this node, or give --socket the path \
         it was started with",
        .0.display()
    )]
    NotRunning(PathBuf, #[source] io::Error),
    #[error("not allowed to ask the agent on {}; run as root", .0.display())]
    NotAllowed(PathBuf, #[source] io::Error),
    #[error("the agent on {} gave no answer", .0.display())]
    NoAnswer(PathBuf, #[source] io::Error),
    #[error("the agent on {} answers in a form this version does not know", .0.display())]
    Unknown(PathBuf, #[source] serde_json::Error),
}

pub(super) fn run(args: Args) -> Result<(), Failure> {
    let document = ask(&args.socket).map_err(|e| Failure::new(Exit::Failure, e))?;
    let status = || {
        serde_json::from_str::<Status>(&document)
            .map_err(|source| StatusError::Unknown(args.socket.clone(), source))
    };
    let problem = match args.check {
        Some(Check::Healthy) => status()?.unhealthy(),
        Some(Check::Ready) => status()?.unready(),
        None => return print(&if args.json { document } else { status()?.to_string() }),
    };
    problem.map_or(Ok(()), |problem| Err(Failure::new(Exit::CheckFailed, problem)))
}

fn print(text: &str) -> Result<(), Failure> {
    match io::stdout().write_all(text.as_bytes()) {
        // The reader had enough, for example `gambeson status | head -1`.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => Ok(written?),
    }
}

fn ask(socket: &Path) -> Result<String, StatusError> {
    let mut stream = UnixStream::connect(socket).map_err(|source| match source.kind() {
        io::ErrorKind::PermissionDenied => StatusError::NotAllowed(socket.to_owned(), source),
        _ => StatusError::NotRunning(socket.to_owned(), source),
    })?;
    let mut document = String::new();
    stream
        .set_read_timeout(Some(READ_TIMEOUT))
        .and_then(|()| stream.read_to_string(&mut document))
        .map_err(|source| StatusError::NoAnswer(socket.to_owned(), source))?;
    Ok(document)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_that_does_not_run_is_said_with_its_socket() {
        let error = ask(Path::new("/nonexistent/agent.sock")).unwrap_err().to_string();
        assert!(error.contains("/nonexistent/agent.sock"), "{error}");
        assert!(error.contains("gambeson agent"), "{error}");
    }
}
