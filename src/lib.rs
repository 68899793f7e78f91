//! `Node objects -> Mesh -> Desired -> Plan(observed) -> apply -> observe again`
//!
//! The agent, command line and CNI plugin of Gambeson, a WireGuard-first encrypted
//! mesh overlay for Kubernetes. The decisions live in `gambeson_mesh`, keys in
//! `gambeson_keys`, the userspace WireGuard device in `gambeson_tunnel`; this crate does
//! the I/O between them, the cluster and the kernel.

pub mod agent;
pub mod apply;
pub mod cli;
pub mod cluster;
pub mod cni;
pub mod config;
pub mod embed;
pub mod exit;
mod files;
pub mod http;
pub mod rounds;
pub mod status;
pub mod subnet_env;
pub mod supervisor;
pub mod underlay;

/// Version of this program, and the commit that it was built from.
pub const VERSION: &str =
    concat!(env!("CARGO_PKG_VERSION"), " (", env!("GAMBESON_BUILT_FROM"), ")");
