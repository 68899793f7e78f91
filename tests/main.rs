//! Integration tests: real namespaces, TUN devices, nft, CNI plugins and `wg`.
// Clippy allows these in test functions; here the helpers around them are tests as well.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod admission;
mod agent;
mod api;
mod apply;
mod attack;
mod boot;
mod changeover;
mod chaos;
mod chart;
mod cni;
mod common;
mod container;
mod docs;
mod embed;
mod fail_closed;
mod hostile;
mod image;
mod kernel;
mod kubectl;
mod lab;
mod leak;
mod mesh;
mod migration;
mod nat;
mod preshared;
mod repair;
mod rotation;
mod scale;
mod soak;
mod start;
mod status;
mod survive;
mod transports;
mod tunnel;
mod underlay;
mod vm;
