//! Placeholder: apply.
