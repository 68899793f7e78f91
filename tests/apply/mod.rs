//! The kernel of a node, observed and changed for real: each test in namespaces of its own.

mod events;
mod firewall;
mod links;
mod round;
mod routes;
mod vxlan;
pub(crate) mod wireguard;
