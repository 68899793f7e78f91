//! What several tests need.

pub(crate) mod agent;
pub(crate) mod container;
pub(crate) mod image;
pub(crate) mod lab;
pub(crate) mod namespace;
pub(crate) mod scenario;
