//! Measurements from inside a namespace. Each runs on a thread that has entered it.

pub mod capture;
pub mod ping;
pub mod tcp;
