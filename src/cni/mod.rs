//! Placeholder: cni.
