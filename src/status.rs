//! Placeholder: status.
