//! The JSON in the key file: `{"schema":1,"request":"...","revoke":true,"keys":[{"generation":0,
//! "made":0,"private-key":"..."}]}`. `request` is what the newest key answers, and `revoke` says
//! that older ones go at once; `made` is in seconds since the Unix epoch; `secrets` are the
//! cluster's, and `secret` of a key is which of them. Each may be missing.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::key::ENCODED;
use crate::ring::Entry as Key;
use crate::{Answer, ClusterSecret, Generation, KeyRing, PrivateKey, SecretId, Secrets};

const SCHEMA: u32 = 1;

/// Bytes that one key takes in the file, at most.
const ENTRY: usize = 160;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document<'a> {
    schema: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    request: Option<String>,
    #[serde(default, skip_serializing_if = "is_false")]
    revoke: bool,
    #[serde(borrow, default, skip_serializing_if = "Vec::is_empty")]
    secrets: Vec<&'a str>,
    #[serde(borrow)]
    keys: Vec<Entry<'a>>,
}

/// Borrows from the file's buffer, so that the secret is copied nowhere.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Entry<'a> {
    generation: Generation,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    made: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    secret: Option<SecretId>,
    private_key: &'a str,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_false(value: &bool) -> bool {
    !value
}

/// Reads the document, or says what is wrong without quoting anything of it.
pub(super) fn parse(bytes: &[u8]) -> Result<KeyRing, String> {
    let document: Document<'_> = serde_json::from_slice(bytes).map_err(|error| {
        // serde_json quotes values in its messages; its position is enough and no secret.
        format!("not the expected JSON at line {} column {}", error.line(), error.column())
    })?;
    if document.schema != SCHEMA {
        return Err(format!("schema {} is not {SCHEMA}, the one known here", document.schema));
    }
    let answer = Answer { request: document.request, revoke: document.revoke };
    let mut keys = BTreeMap::new();
    for entry in document.keys {
        let generation = entry.generation;
        let key = PrivateKey::decode(entry.private_key)
            .ok_or_else(|| format!("the key of generation {generation} is not one"))?;
        if keys.insert(generation, Key { key, made: entry.made, secret: entry.secret }).is_some() {
            return Err(format!("generation {generation} is there twice"));
        }
    }
    let secrets: Option<Vec<_>> = document.secrets.into_iter().map(ClusterSecret::decode).collect();
    let secrets = Secrets::new(secrets.ok_or_else(|| "a secret in it is not one".to_owned())?);
    let unknown = keys.values().filter_map(|key| key.secret).find(|id| secrets.get(*id).is_none());
    if let Some(id) = unknown {
        return Err(format!("the secret {id}, of which a key speaks, is missing"));
    }
    KeyRing::from_parts(keys, answer, secrets).ok_or_else(|| "it holds no key".to_owned())
}

/// 32 bytes in base64.
type Text = Zeroizing<[u8; ENCODED]>;

fn encoded(bytes: &[u8; 32]) -> Text {
    let mut text = Zeroizing::new([b'='; ENCODED]);
    // 32 bytes always fill 44 characters exactly; were it otherwise, the check on reading back
    // would refuse the text.
    let _ = STANDARD.encode_slice(bytes, text.as_mut());
    text
}

fn as_str(text: &Text) -> &str {
    std::str::from_utf8(text.as_ref()).unwrap_or_default()
}

/// The document for these keys.
pub(super) fn render<'a>(
    keys: impl Iterator<Item = (Generation, &'a Key)>,
    (answer, secrets): (&Answer, &Secrets),
) -> Result<Zeroizing<Vec<u8>>, serde_json::Error> {
    let keys: Vec<(Generation, &Key, Text)> =
        keys.map(|(generation, key)| (generation, key, encoded(key.key.as_bytes()))).collect();
    let entries = keys.iter().map(|(generation, key, text)| Entry {
        generation: *generation,
        made: key.made,
        secret: key.secret,
        private_key: as_str(text),
    });
    let secrets: Vec<Text> = secrets.iter().map(|secret| encoded(secret.as_bytes())).collect();
    // Room for all of it, because a buffer that grows leaves copies of the secret behind. Each
    // byte of the request takes six at most, as a control character.
    let room = ENTRY * (keys.len() + secrets.len() + 1)
        + 6 * answer.request.as_ref().map_or(0, String::len);
    let Answer { request, revoke } = answer.clone();
    let document = Document {
        schema: SCHEMA,
        request,
        revoke,
        secrets: secrets.iter().map(as_str).collect(),
        keys: entries.collect(),
    };
    let mut bytes = Zeroizing::new(Vec::with_capacity(room));
    serde_json::to_writer(&mut *bytes, &document)?;
    bytes.push(b'\n');
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_generations_are_read_back() {
        let keys = (6..8).map(|n| (Generation::new(n), Key::generate(None))).collect();
        let request = Some("\u{1}".repeat(256));
        let answer = Answer { request, revoke: true };
        let secret = "dwdtCnMYpX08FsFyUbJmRd9ML4frwJkqsXf7pR25LCo=";
        let secrets = Secrets::new([ClusterSecret::parse(secret).unwrap()]);
        let ring = KeyRing::from_parts(keys, answer.clone(), secrets.clone()).unwrap();
        let bytes = render(ring.iter(), (ring.answer(), ring.secrets())).unwrap();
        assert!(bytes.len() < ENTRY * 4 + 6 * 256);
        let read = parse(&bytes).unwrap();
        assert_eq!(read.publics(), ring.publics());
        assert_eq!(read.newest(), Generation::new(7));
        assert_eq!((read.answer(), read.secrets()), (&answer, &secrets));
        assert!(read.age(std::time::SystemTime::now()).unwrap().as_secs() < 60);
        assert!(read.private(Generation::new(7)).is_some());
        assert!(read.private(Generation::new(8)).is_none());
    }

    #[test]
    fn messages_do_not_quote_the_file() {
        let secret = "dwdtCnMYpX08FsFyUbJmRd9ML4frwJkqsXf7pR25LCo=";
        for text in [
            format!("\"{secret}\""),
            format!("{{\"schema\":1,\"keys\":\"{secret}\"}}"),
            format!("{{\"schema\":1,\"{secret}\":0}}"),
            format!(
                "{{\"schema\":1,\"keys\":[{{\"generation\":0,\"private-key\":\"{secret} \"}}]}}"
            ),
        ] {
            let message = parse(text.as_bytes()).unwrap_err();
            assert!(!message.contains(&secret[..8]), "{message}");
        }
    }
}
