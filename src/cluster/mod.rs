//! `API server -> NodeStore -> agent -> Publication -> API server`
//!
//! The only part that talks to Kubernetes: Nodes in; annotations, a condition and Events out.
//! Every task here retries for ever and keeps what is known; none of them touches the kernel.

mod admission;
mod audit;
mod backoff;
mod connect;
mod events;
mod object;
mod publish;
mod rotate;
mod store;
mod watch;

pub use admission::AdmissionTest;
pub use audit::{Audit, audit};
pub use backoff::Backoff;
pub use connect::{ConnectError, Connector, RequestError};
pub use events::{EventWriter, Note, Reason, Recorder};
pub use object::{Condition, NodeObject};
pub use publish::{Difference, Publication, Publisher};
pub use rotate::{Rotated, ask_for_rotation, rotations};
pub use store::{NodeStore, Nodes};
pub use watch::{Health, NodeWatch};

#[cfg(test)]
mod tests;
