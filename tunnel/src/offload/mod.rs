//! What network cards do for TCP and UDP, and a TUN device leaves to us: `super-packet ->
//! packets` on the way out, `packets -> super-packets` on the way in, and checksums.
//!
//! A super-packet is up to 64 KiB of one flow under one header, so that the host's network
//! stack runs once for dozens of packets. A [`Header`] before it says how it is cut.

mod checksum;
mod coalesce;
mod header;
mod packet;
mod split;
#[cfg(test)]
mod tests;

pub(crate) use coalesce::{Coalescer, MAX_PACKETS, Merged};
pub(crate) use header::{HEADER_LEN, Header};
pub(crate) use split::Split;

/// What the kernel takes and gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Offload {
    /// Single packets with their checksums.
    Nothing,
    /// TCP (TSO).
    Tcp,
    /// TCP and UDP (USO, Linux 6.2).
    TcpAndUdp,
}
