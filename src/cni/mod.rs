//! `container runtime -> gambeson-cni -> bridge, host-local -> pod interface`
//!
//! The CNI plugin, a drop-in for Flannel's: it turns subnet.env into the configuration of
//! the reference `bridge` plugin and delegates to it. And its installation.

pub mod install;
