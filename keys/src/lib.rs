//! `OS randomness -> PrivateKey -> KeyStore (disk) -> KeyRing -> PublicKey -> annotation`.
//!
//! The only crate that touches private keys. Without the feature `private` it holds the
//! public value types alone.
#![forbid(unsafe_code)]

mod generation;
#[cfg(feature = "private")]
mod key;
mod public;
#[cfg(feature = "private")]
mod ring;
#[cfg(feature = "private")]
mod secret;
mod secret_id;
#[cfg(feature = "private")]
mod store;

pub use generation::Generation;
#[cfg(feature = "private")]
pub use key::PrivateKey;
pub use public::{PublicKey, PublicKeyError};
#[cfg(feature = "private")]
pub use ring::{Answer, KeyRing};
#[cfg(feature = "private")]
pub use secret::{ClusterSecret, SecretError, Secrets};
pub use secret_id::{SecretId, SecretIdError};
#[cfg(feature = "private")]
pub use store::{KeyStore, KeyStoreError};
