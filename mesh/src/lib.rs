//! `NodeRecord -> Node -> Mesh -> Desired -> Plan(Observed)`: the pure core of Gambeson.
//!
//! Nothing here reads a clock, a file, a socket or the kernel, and nothing here is
//! async. Time is passed in. The agent feeds Node records and what it observed in the
//! kernel, and gets back the ordered actions that turn one into the other.
#![forbid(unsafe_code)]

pub mod changeover;
pub mod desired;
pub mod family;
#[cfg(test)]
mod fixtures;
pub mod health;
pub mod live;
pub mod mac;
pub mod node;
pub mod observed;
pub mod pair;
pub mod plan;
mod preshared;
pub mod rotation;
pub mod session;
#[cfg(test)]
mod sim;
pub mod topology;
pub mod transport;

/// Name of a Kubernetes Node, which is what identifies a peer.
pub type NodeName = String;
