//! `agent -> newest supervisor -> gambeson tunnel`
//!
//! In a cluster a process ends with its pod, so that a tunnel that is the agent's child would
//! end whenever the agent's pod is replaced. There userspace devices are served by processes of
//! another pod, which does nothing but this and has no reason to be replaced. Each such pod has
//! a socket in a folder of the node; the agent asks the newest for a device, and leaves those
//! that run alone.

mod client;
mod protocol;
mod server;

pub use client::{AskError, Supervisors};
pub use server::{ServeError, check, serve};

/// Where the sockets are.
pub const DEFAULT_DIR: &str = "/run/gambeson/tunnels";
