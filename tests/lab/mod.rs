//! The lab: its API server against the real kubectl and the kube crate, and its promise to
//! leave nothing behind.

mod api;
mod kubectl;
mod life;
pub(crate) mod mesh;
