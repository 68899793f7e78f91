//! What the tunnel costs and carries, beside other userspace WireGuards, as tables.
//!
//! [`attack`] is `implementations x conditions x rounds -> what becomes of a flow`, and
//! [`speed`] is `tunnels x measurements x rounds -> throughput, latency, processor time`. All
//! run in turn, in network namespaces of their own, and the tables have the medians.

pub mod attack;
mod flow;
mod host;
pub mod speed;
pub mod stranger;
mod world;

use std::path::PathBuf;

/// What went wrong.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// A userspace WireGuard, which takes the device's name as its last argument and goes to the
/// background.
#[derive(Debug, Clone)]
pub struct Implementation {
    /// What it is called in the table.
    pub name: String,
    /// Its file.
    pub program: PathBuf,
    /// Before the device's name.
    pub arguments: Vec<String>,
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<_> = values.collect();
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
