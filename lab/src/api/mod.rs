//! `HTTP request -> User -> Target -> Faults -> Policies -> Store -> JSON, Table or watch stream`
//!
//! A small Node API server: enough of kube-apiserver for the kube crate and a real
//! `kubectl`, with optimistic concurrency, watches that resume, and faults on demand.
//! It runs as a process of its own, so that it can be killed and started again like a
//! control plane; its journal makes a restart keep every resource version.

pub mod access;
pub mod admission;
mod discovery;
mod error;
mod fault;
mod handler;
mod log;
mod object;
mod patch;
mod resource;
mod selector;
mod server;
mod store;
mod table;
mod target;
mod watch;

pub use error::ApiError;
pub use fault::{Effect, Fault};
pub use log::LoggedRequest;
pub(super) use object::timestamp;
pub use server::{ServeError, Server};
pub use store::{Store, StoreError};
