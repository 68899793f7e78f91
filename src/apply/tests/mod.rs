//! Each test runs in a network and mount namespace of its own, which go with its thread.

mod events;
mod firewall;
mod links;
pub(crate) mod namespace;
mod render;
mod round;
mod routes;
