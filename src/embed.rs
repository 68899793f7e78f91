//! The agent inside another program, as k3s embeds Flannel.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use gambeson::embed;
//!
//! let options = embed::options(["--cluster-cidr", "10.42.0.0/16", "--k3s"])?;
//! let mut agent = embed::start(options);
//! let status = agent.ready().await?;
//! println!("{} peers", status.peers.len());
//! agent.stop().await?;
//! # Ok(())
//! # }
//! ```
//!
//! The agent logs by `tracing` to whatever the program has subscribed. It handles no signals and
//! ends no process. Userspace devices outlive the program: they are processes of their own, for
//! which it needs the program `gambeson` beside it (`--tunnel-program`).

use std::ffi::OsString;

use clap::Parser;
use tokio::sync::{oneshot, watch};
use tokio::task::{JoinError, JoinHandle};

use crate::agent::{self, AgentError};
use crate::config::Options;
use crate::status::Status;

/// Options by the names that `gambeson agent` has for them, and by its environment variables.
///
/// # Errors
/// What the command line would say.
pub fn options<I>(arguments: I) -> Result<Options, clap::Error>
where
    I: IntoIterator,
    I::Item: Into<OsString>,
{
    #[derive(Debug, Parser)]
    #[command(name = "gambeson")]
    struct Arguments {
        #[command(flatten)]
        options: Options,
    }

    let name = OsString::from("gambeson");
    let line = std::iter::once(name).chain(arguments.into_iter().map(Into::into));
    Ok(Arguments::try_parse_from(line)?.options)
}

/// Starts an agent in the runtime of the caller. What is wrong with the options is what it ends
/// with.
///
/// # Panics
/// Outside of a tokio runtime.
pub fn start(options: Options) -> Handle {
    let (stop, stopped) = oneshot::channel::<()>();
    let (seen, status) = watch::channel(None);
    let shutdown = async {
        // A handle that is gone cannot stop it any more, which is to stop it.
        let _ = stopped.await;
    };
    Handle { stop, status, task: tokio::spawn(agent::run(options, seen, shutdown)) }
}

/// A running agent. When it is dropped, the agent ends; devices, routes and the guard stay.
#[derive(Debug)]
pub struct Handle {
    stop: oneshot::Sender<()>,
    status: watch::Receiver<Option<Status>>,
    task: JoinHandle<Result<(), AgentError>>,
}

impl Handle {
    /// What the agent says of itself, once it has looked around.
    pub fn status(&self) -> Option<Status> {
        self.status.borrow().clone()
    }

    /// Waits until pods may be started on this node.
    ///
    /// # Errors
    /// What the agent ended with instead.
    pub async fn ready(&mut self) -> Result<Status, AgentError> {
        let ready = self.status.wait_for(|status| status.as_ref().is_some_and(|s| s.ready));
        if let Ok(Some(status)) = ready.await.map(|status| status.clone()) {
            return Ok(status);
        }
        self.ended().await?;
        Err(AgentError::TaskEnded { task: "agent", why: Some("it was stopped".to_owned()) })
    }

    /// Waits until the agent ends, which it does by itself only when it cannot start.
    ///
    /// # Errors
    /// What it ended with.
    pub async fn ended(&mut self) -> Result<(), AgentError> {
        outcome((&mut self.task).await)
    }

    /// Ends the agent; devices, routes and the guard stay as they are.
    ///
    /// # Errors
    /// What it ended with before.
    pub async fn stop(self) -> Result<(), AgentError> {
        drop(self.stop);
        outcome(self.task.await)
    }
}

fn outcome(ended: Result<Result<(), AgentError>, JoinError>) -> Result<(), AgentError> {
    ended.unwrap_or_else(|error| {
        Err(AgentError::TaskEnded { task: "agent", why: Some(error.to_string()) })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_wrong_with_the_options_is_what_it_ends_with() {
        assert!(options(["--colour", "green"]).is_err());
        let wrong = options(["--cluster-cidr", "10.0.0.0/33", "--node-name", "node-1"]).unwrap();
        let mut agent = start(wrong);
        let error = agent.ready().await.unwrap_err().to_string();
        assert!(error.contains("--cluster-cidr"), "{error}");
        assert_eq!(agent.status(), None);
    }
}
