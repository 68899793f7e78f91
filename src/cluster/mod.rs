//! Placeholder: cluster.
