//! `/dev/urandom -> PrivateKey -> KeyStore (disk) -> PublicKey -> annotation`.
//!
//! The only crate that touches private keys. Without the feature `private` it holds the
//! public value types alone.
#![forbid(unsafe_code)]

mod generation;
mod public;

pub use generation::Generation;
pub use public::{PublicKey, PublicKeyError};
