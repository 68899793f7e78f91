//! What can go wrong with a lab.

use std::io;
use std::path::PathBuf;

use super::api::admission::PolicyError;
use super::api::{ServeError, StoreError};
use super::layout::state_dir;
use super::netns::NetnsError;
use super::options::{LabName, OptionsError};

/// A lab operation that failed. Each message names the object and, where there is one, the
/// remedy.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// The options make no lab.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// A namespace could not be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The API server's store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The API server's policies.
    #[error(transparent)]
    Policies(#[from] PolicyError),
    /// The API server.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// There is a lab of this name already.
    #[error("lab {0} exists already; take it down with: gambeson lab down --name {0}")]
    Exists(LabName),
    /// There is no such lab.
    #[error("there is no lab {0}; make one with: gambeson lab up --name {0}")]
    Missing(LabName),
    /// `lab up` did not finish, or is not finished.
    #[error("lab {0} was never finished; take it down with: gambeson lab down --name {0}")]
    Unfinished(LabName),
    /// Somebody else is at work on this lab.
    #[error("another command is at work on lab {0}")]
    Busy(LabName),
    /// Not root.
    #[error("the lab makes network namespaces and needs root")]
    NotRoot,
    /// The lab was interrupted while it came up.
    #[error("interrupted")]
    Interrupted,
    /// A file or folder of the lab.
    #[error("cannot {action} {path}")]
    File {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The description of a lab cannot be understood.
    #[error("{path} is no description of a lab")]
    State {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// A program that the lab needs could not be run.
    #[error("cannot run {program}; install {package}")]
    Program {
        /// The program.
        program: String,
        /// The Debian package that has it.
        package: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// `ip` refused.
    #[error("ip failed in {place}: {message}")]
    Ip {
        /// Name of the namespace.
        place: String,
        /// What it said.
        message: String,
    },
    /// A process of the lab did not start, or ended.
    #[error("{name} did not start{log}")]
    Daemon {
        /// What it is.
        name: String,
        /// The end of its log.
        log: LogTail,
    },
    /// A process of the lab would not end.
    #[error("{0} would not end, not even on SIGKILL")]
    Stuck(String),
    /// The agent did not get its node ready in time.
    #[error("the agent of {node} wrote no CNI configuration within {seconds} s{log}")]
    NotReady {
        /// The node.
        node: String,
        /// How long it was waited for.
        seconds: u64,
        /// The end of the agent's log.
        log: LogTail,
    },
    /// No packet came through between two nodes.
    #[error("no packet got from {from} to {to} within {seconds} s{log}")]
    NoPath {
        /// The sending pod or node.
        from: String,
        /// The receiving pod or node.
        to: String,
        /// How long it was tried.
        seconds: u64,
        /// The end of the sending agent's log.
        log: LogTail,
    },
    /// A CNI plugin failed.
    #[error("CNI {command} of {pod} failed in plugin {plugin}: {message}")]
    Cni {
        /// ADD or DEL.
        command: &'static str,
        /// The pod.
        pod: String,
        /// The plugin.
        plugin: String,
        /// What it said.
        message: String,
    },
    /// A CNI configuration makes no sense.
    #[error("cannot use the CNI configuration {path}: {reason}")]
    CniConfiguration {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The lab's API server did not answer as it should.
    #[error("{what} failed at the lab's API server")]
    Api {
        /// The request.
        what: String,
        /// What came back.
        #[source]
        source: Box<kube::Error>,
    },
    /// Not a node, or not a pod, of the lab.
    #[error("lab {lab} has no {kind} \"{name}\"; it has {known}")]
    Unknown {
        /// The lab.
        lab: LabName,
        /// What was looked for.
        kind: &'static str,
        /// The name asked for.
        name: String,
        /// The names it has.
        known: String,
    },
    /// Something was left behind.
    #[error("lab {lab} is not all gone, see {}; try again: gambeson lab down --name {lab}",
        state_dir(.lab).display())]
    Left {
        /// The lab.
        lab: LabName,
        /// What could not be removed.
        #[source]
        source: Box<LabError>,
    },
    /// A measurement could not be made.
    #[error("cannot {what}")]
    Measure {
        /// What was tried.
        what: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The async runtime of the API server or its client.
    #[error("cannot start the async runtime")]
    Runtime(#[source] io::Error),
}

/// The last lines of a log, below the message that they explain.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogTail(String);

impl LogTail {
    const LINES: usize = 15;

    /// The end of this log; empty when it cannot be read.
    pub fn of(path: &std::path::Path) -> Self {
        let bytes = std::fs::read(path).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text.lines().collect();
        let tail = &lines[lines.len().saturating_sub(Self::LINES)..];
        if tail.is_empty() {
            return Self::default();
        }
        Self(format!("; the end of {}:\n  {}", path.display(), tail.join("\n  ")))
    }
}

impl std::fmt::Display for LogTail {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// An error with all its causes, in one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// `File` with the operation and the path, for `map_err`.
pub(super) fn file_error(
    action: &'static str,
    path: impl Into<PathBuf>,
) -> impl FnOnce(io::Error) -> LabError {
    let path = path.into();
    move |source| LabError::File { action, path, source }
}
