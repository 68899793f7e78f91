//! Placeholder: underlay.
