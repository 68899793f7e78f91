//! What several tests need.

pub(crate) mod lab;
pub(crate) mod namespace;
