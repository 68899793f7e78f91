//! `Options -> namespaces + API server + agents + pods -> verify`
//!
//! The lab: a cluster of network namespaces on one machine, with real agents, real CNI
//! plugins and a small Node API server. What a user runs with `gambeson lab`, which is the
//! program `gambeson-lab`, and what the
//! integration tests run are the same code.
//!
//! A node is a network namespace in which `/run` and `/var/lib` are folders of its own, so
//! that every program runs with its default paths. A pod is a network namespace, attached
//! by the CNI configuration that its node's agent wrote.

pub mod api;
pub mod cli;
mod client;
mod daemon;
mod error;
mod instance;
mod layout;
mod netns;
mod network;
mod node;
mod options;
pub mod probe;
mod process;
mod progress;
mod report;
mod runtime;
mod state;
mod status;
mod teardown;
pub mod traffic;
mod transports;
pub mod verify;
pub mod wait;

pub use client::{Api, Patch};
pub use daemon::run_api_server;
pub use error::{LabError, LogTail};
pub use instance::{INTERRUPTED, Lab};
pub use layout::{NodeIndex, PodIndex, UNDERLAY_INTERFACE, state_dir};
pub use netns::{Environment, Netns, NetnsError};
pub use node::{Node, Pod};
pub use options::{Family, LabName, Options, OptionsError, WireguardMode, WireguardModes};
pub use process::ProcessId;
pub use progress::Progress;
pub use report::paint;
pub use runtime::{BIN_DIR, CONF_DIR, ConfList};
pub use status::{LabStatus, NodeStatus, PodStatus};
pub use transports::{Transports, TransportsError};
