//! `container runtime -> gambeson-cni -> bridge, host-local -> pod interface`
//!
//! The CNI plugin, a drop-in for Flannel's: it turns subnet.env into the configuration of
//! the reference `bridge` plugin and delegates to it. And its installation.

mod boot;
mod config;
mod conflist;
mod delegate;
mod environment;
mod error;
mod guard;
pub mod install;
pub mod link;
mod plugin;
mod saved;
pub mod versions;

pub use conflist::DEFAULT_BRIDGE;
pub use environment::{Command, Environment};
pub use error::CniError;
pub use plugin::{ErrorReport, run};

/// Versions of the CNI specification the plugin speaks, oldest first.
pub const SUPPORTED_VERSIONS: [&str; 7] =
    ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// The newest of [`SUPPORTED_VERSIONS`].
pub const CURRENT_VERSION: &str = "1.1.0";
