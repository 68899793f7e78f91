use std::error::Error as _;
use std::io;
use std::path::PathBuf;

use serde::Deserialize;
use thiserror::Error;

use super::SUPPORTED_VERSIONS;
use crate::subnet_env::SubnetEnvError;

/// Why the plugin could not do what the container runtime asked.
#[derive(Debug, Error)]
pub enum CniError {
    /// Variables the command needs are not set.
    #[error("required environment variables are missing: {}", .0.join(", "))]
    MissingVariables(Vec<&'static str>),
    /// A variable has a value that cannot be right.
    #[error("{variable} is {value:?}, but it must be {expected}")]
    InvalidVariable {
        /// The variable.
        variable: &'static str,
        /// Its value.
        value: String,
        /// What it should be.
        expected: &'static str,
    },
    /// The configuration asks for another version of the specification.
    #[error("the configuration has cniVersion {0:?}, but the plugin speaks {versions}", versions = SUPPORTED_VERSIONS.join(", "))]
    IncompatibleVersion(String),
    /// The command came with a later version of the specification.
    #[error("the configuration has cniVersion {version:?}, but {command} needs {first} or later")]
    NotInVersion {
        /// The command.
        command: &'static str,
        /// The configuration's version.
        version: String,
        /// The version that has it.
        first: &'static str,
    },
    /// The guard is not in the kernel.
    #[error(
        "the guard is not in place (table `inet gambeson`), so that no pod may start; the \
         Gambeson agent of this node puts it there: see its log and `gambeson status`"
    )]
    NoGuard,
    /// The kernel does not tell whether the guard is there.
    #[error("cannot see whether the guard is in place, so that no pod may start")]
    UnknownGuard(#[source] io::Error),
    /// The saved configurations cannot be listed.
    #[error("cannot list the delegates' saved configurations in {}", path.display())]
    List {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// No pod can be attached.
    #[error(transparent)]
    Unavailable(Box<CniError>),
    /// Standard input cannot be read.
    #[error("cannot read the configuration from standard input")]
    Stdin(#[source] io::Error),
    /// Standard input is not a configuration.
    #[error("the configuration on standard input is not a CNI network configuration")]
    Decode(#[source] serde_json::Error),
    /// The configuration says something it may not.
    #[error("the configuration is wrong: {0}")]
    Config(String),
    /// subnet.env cannot be used.
    #[error(transparent)]
    SubnetEnv(#[from] SubnetEnvError),
    /// The delegate's saved configuration cannot be written.
    #[error("cannot save the delegate's configuration in {}: check that its folder is writable and not full", path.display())]
    Save {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The delegate's saved configuration cannot be read.
    #[error("cannot read the delegate's saved configuration {}", path.display())]
    Load {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The delegate's saved configuration cannot be removed.
    #[error("cannot remove the delegate's saved configuration {}", path.display())]
    Remove {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// CHECK for a container that was never added.
    #[error("container {id} is unknown: there is no {}", path.display())]
    UnknownContainer {
        /// The container.
        id: String,
        /// Where its configuration would be.
        path: PathBuf,
    },
    /// The delegate is not installed.
    #[error(
        "the plugin {name:?} is not in {path:?} (CNI_PATH): install the reference CNI plugins there"
    )]
    DelegateNotFound {
        /// Its name.
        name: String,
        /// Where it was looked for.
        path: String,
    },
    /// The delegate cannot be started, or talked to.
    #[error("cannot run the plugin {}", program.display())]
    DelegateRun {
        /// The delegate.
        program: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The delegate reported an error.
    #[error("the plugin {name:?} failed: {}", reported.msg)]
    Delegate {
        /// Its name.
        name: String,
        /// What it reported.
        reported: Reported,
    },
    /// The delegate said it succeeded and gave no result.
    #[error("the plugin {name:?} succeeded but its result is not a JSON object")]
    DelegateResult {
        /// Its name.
        name: String,
    },
}

/// An error as plugins print it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Reported {
    /// Below 100 as the CNI specification has it.
    pub code: u32,
    /// In one line.
    pub msg: String,
    /// More, or nothing.
    #[serde(default)]
    pub details: String,
}

/// The plugin's own code: the delegate could not be run or understood.
pub(super) const DELEGATE_UNUSABLE: u32 = 100;

impl CniError {
    /// The error code, below 100 as the CNI specification has it.
    pub fn code(&self) -> u32 {
        match self {
            Self::IncompatibleVersion(_) | Self::NotInVersion { .. } => 1,
            Self::UnknownContainer { .. } => 3,
            Self::MissingVariables(_) | Self::InvalidVariable { .. } => 4,
            Self::Stdin(_)
            | Self::Save { .. }
            | Self::Load { .. }
            | Self::List { .. }
            | Self::Remove { .. } => 5,
            Self::Decode(_) => 6,
            Self::Config(_) => 7,
            // "Try again later": the agent is about to write it.
            Self::SubnetEnv(SubnetEnvError::Missing { .. })
            | Self::NoGuard
            | Self::UnknownGuard(_) => 11,
            // "The plugin is not available", the answer of STATUS.
            Self::Unavailable(_) => 50,
            Self::SubnetEnv(SubnetEnvError::Corrupt { .. }) => 6,
            Self::SubnetEnv(_) => 5,
            Self::Delegate { reported, .. } => reported.code,
            Self::DelegateNotFound { .. }
            | Self::DelegateRun { .. }
            | Self::DelegateResult { .. } => DELEGATE_UNUSABLE,
        }
    }

    /// What lies behind the message: the causes, or what the delegate had to add.
    pub fn details(&self) -> String {
        if let Self::Delegate { reported, .. } = self {
            return reported.details.clone();
        }
        let mut causes = Vec::new();
        let mut cause = self.source();
        while let Some(error) = cause {
            causes.push(error.to_string());
            cause = error.source();
        }
        causes.join(": ")
    }
}
