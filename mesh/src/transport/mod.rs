//! A transport is one pure file: `Mesh -> Desired`.

pub mod wireguard;
