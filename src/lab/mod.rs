//! Placeholder: lab.
