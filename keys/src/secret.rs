//! `a secret of the cluster + two public keys -> the preshared key of their session`
//!
//! WireGuard mixes a preshared key into each handshake, so that whoever can break X25519 one day
//! cannot read what was recorded (paper, section 5.2). One secret in a file gives each pair of
//! keys one of its own: HKDF-SHA256 (RFC 5869) over it and both keys in order.

use std::fmt;
use std::sync::Arc;

use hkdf::Hkdf;
use sha2::Sha256;
use zeroize::Zeroizing;

use crate::key::decode;
use crate::{PublicKey, SecretId};

/// First word of a file with a secret of the whole cluster. Others may follow for other schemes.
const CLUSTER: &str = "cluster";
/// Longest file that is looked at, in bytes.
const LONGEST: usize = 1024;
/// What the derived values are for, so that none is ever another.
const KEY_INFO: &[u8] = b"gambeson preshared key v1";
const ID_INFO: &[u8] = b"gambeson secret identifier v1";

/// A secret that every node of the cluster has. Wiped from memory on drop, never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct ClusterSecret {
    bytes: Zeroizing<[u8; 32]>,
    id: SecretId,
}

/// What is wrong with the text of a secret. Quotes nothing of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SecretError {
    /// Too long to be one.
    #[error("it is longer than {LONGEST} bytes")]
    TooLong,
    /// A scheme that this version does not know.
    #[error("it does not begin with the word cluster, the one scheme that this version knows")]
    Scheme,
    /// Not 32 bytes in base64.
    #[error("after the word cluster there are not 32 bytes in base64, as `wg genpsk` prints them")]
    Encoding,
}

impl ClusterSecret {
    /// Reads `cluster BASE64`, or what `wg genpsk` prints alone.
    ///
    /// # Errors
    /// [`SecretError`].
    pub fn parse(text: &str) -> Result<Self, SecretError> {
        if text.len() > LONGEST {
            return Err(SecretError::TooLong);
        }
        let words: Vec<&str> = text.split_ascii_whitespace().collect();
        match words[..] {
            [CLUSTER, value] | [value] if value != CLUSTER => {
                Self::decode(value).ok_or(SecretError::Encoding)
            }
            [CLUSTER, ..] => Err(SecretError::Encoding),
            _ => Err(SecretError::Scheme),
        }
    }

    /// The secret in strict base64, or `None` for anything else.
    pub(crate) fn decode(text: &str) -> Option<Self> {
        let bytes = decode(text)?;
        let mut id = [0; 8];
        // Eight bytes are far below what HKDF can give.
        Hkdf::<Sha256>::new(None, bytes.as_ref()).expand(ID_INFO, &mut id).ok()?;
        Some(Self { bytes, id: SecretId::from_bytes(id) })
    }

    pub(crate) fn as_bytes(&self) -> &[u8; 32] {
        &self.bytes
    }

    /// Which one it is.
    pub fn id(&self) -> SecretId {
        self.id
    }

    /// The preshared key of the session between these keys, the same from either end.
    pub fn preshared_key(&self, one: &PublicKey, other: &PublicKey) -> Zeroizing<[u8; 32]> {
        let (first, second) = if one < other { (one, other) } else { (other, one) };
        let mut key = Zeroizing::new([0; 32]);
        let hkdf = Hkdf::<Sha256>::new(None, self.bytes.as_ref());
        let info = [KEY_INFO, first.as_bytes(), second.as_bytes()];
        // 32 bytes are far below what HKDF can give: this cannot fail.
        let _ = hkdf.expand_multi_info(&info, key.as_mut());
        key
    }
}

impl fmt::Debug for ClusterSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ClusterSecret(redacted, {})", self.id)
    }
}

/// The secrets that a node knows, the oldest first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Secrets(Arc<[ClusterSecret]>);

impl Secrets {
    /// These, the oldest first.
    pub fn new(secrets: impl IntoIterator<Item = ClusterSecret>) -> Self {
        Self(secrets.into_iter().collect())
    }

    /// All of them, the oldest first.
    pub fn iter(&self) -> impl Iterator<Item = &ClusterSecret> {
        self.0.iter()
    }

    /// The one with this identifier.
    pub fn get(&self, id: SecretId) -> Option<&ClusterSecret> {
        self.iter().find(|secret| secret.id == id)
    }

    /// Which one a preshared key between these keys was made of, if any.
    pub fn origin(&self, key: &[u8; 32], one: &PublicKey, other: &PublicKey) -> Option<SecretId> {
        let made = |secret: &&ClusterSecret| *secret.preshared_key(one, other) == *key;
        self.iter().find(made).map(ClusterSecret::id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PrivateKey;

    const TEXT: &str = "dwdtCnMYpX08FsFyUbJmRd9ML4frwJkqsXf7pR25LCo=";

    #[test]
    fn a_file_has_a_scheme_or_is_that_of_wg() {
        let secret = ClusterSecret::parse(TEXT).unwrap();
        assert_eq!(ClusterSecret::parse(&format!("cluster {TEXT}\n")).unwrap(), secret);
        for (text, error) in [
            (String::new(), SecretError::Scheme),
            ("cluster".to_owned(), SecretError::Encoding),
            ("cluster abc".to_owned(), SecretError::Encoding),
            (format!("pairs {TEXT}"), SecretError::Scheme),
            (format!("cluster {TEXT} {TEXT}"), SecretError::Encoding),
            (TEXT.replace('=', ""), SecretError::Encoding),
            ("x".repeat(2000), SecretError::TooLong),
        ] {
            assert_eq!(ClusterSecret::parse(&text), Err(error), "{text}");
        }
    }

    #[test]
    fn each_pair_of_keys_has_its_own_from_either_end() {
        let secret = ClusterSecret::parse(TEXT).unwrap();
        let [a, b, c] = [(); 3].map(|()| PrivateKey::generate().public());
        let key = secret.preshared_key(&a, &b);
        assert_eq!(key, secret.preshared_key(&b, &a));
        assert_ne!(key, secret.preshared_key(&a, &c));
        assert!(key.iter().any(|byte| *byte != 0));
        let other = ClusterSecret::parse("//////////////////////////////////////////8=").unwrap();
        assert_ne!(other.id(), secret.id());
        let secrets = Secrets::new([other.clone(), secret.clone()]);
        assert_eq!(secrets.origin(&key, &b, &a), Some(secret.id()));
        assert_eq!(secrets.origin(&other.preshared_key(&a, &b), &a, &b), Some(other.id()));
        assert_eq!(secrets.origin(&[7; 32], &a, &b), None);
    }

    /// By another implementation of HKDF: python3 with hmac and hashlib.
    #[test]
    fn it_is_hkdf_sha256() {
        let secret = ClusterSecret::parse(TEXT).unwrap();
        let [one, other] = [1, 2].map(|byte| PublicKey::from_bytes([byte; 32]).unwrap());
        let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
        assert_eq!(secret.id().to_string(), "b4776d289102b16c");
        assert_eq!(
            hex(secret.preshared_key(&other, &one).as_ref()),
            "0ab5bff5f8c995de878a09dea066a98d68340a3fac50ef0ee3470c058799a28c"
        );
    }

    #[test]
    fn debug_tells_nothing_secret() {
        let secret = Secrets::new([ClusterSecret::parse(TEXT).unwrap()]);
        assert!(!format!("{secret:?} {secret:#?}").contains(&TEXT[..8]));
    }
}
