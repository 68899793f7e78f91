//! `TUN -> seal -> UDP` and `UDP -> open -> TUN`: a userspace WireGuard device for Linux.
//!
//! [`run`] makes the TUN device, serves the cross-platform configuration socket that `wg`,
//! `wg-quick` and `wireguard-control` talk to, and moves packets until the device is deleted
//! or a signal asks for the end. [`Device`] is the same without I/O.
//!
//! Plain threads move bytes and settings: a `worker` for each processor has a queue of the TUN
//! device and sockets of its own, and does all that a packet needs; `handshakes` answers what is
//! not data; `config` serves the configuration socket. The calling thread runs timers and watches
//! signals and links.

mod allowed_ips;
mod batch;
mod device;
mod endpoint;
mod error;
mod handshakes;
#[cfg(feature = "internals")]
pub mod internals;
mod ip;
mod netlink;
mod noise;
mod offload;
mod process;
mod shared;
mod tun;
mod tunnel;
mod uapi;
mod udp;
mod worker;

pub use batch::{Batch, Destination, Outbox};
pub use device::{
    AllowedIpChange, Datagram, Device, DeviceUpdate, Origin, PeerId, PeerStatus, PeerUpdate, TICK,
};
pub use endpoint::{Endpoint, Source};
pub use error::TunnelError;
pub use process::{keep_descriptors, keep_memory_private};
pub use tunnel::{DEFAULT_MTU, Datapath, Options, SOCKET_DIRECTORY, Tunnel, run};
