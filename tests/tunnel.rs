//! The userspace tunnel as operators use it: the real binary, `wg`, `wg-quick`, `ip`, `ping`
//! and `iperf3` on throw-away hosts.

mod configuration;
pub(crate) mod datapath;
mod host;
mod lifecycle;
mod traffic;
