//! The JSON in the key file: `{"schema":1,"keys":[{"generation":0,"private-key":"..."}]}`.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::key::ENCODED;
use crate::{Generation, KeyRing, PrivateKey};

const SCHEMA: u32 = 1;

/// Bytes that one key takes in the file, at most.
const ENTRY: usize = 128;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document<'a> {
    schema: u32,
    #[serde(borrow)]
    keys: Vec<Entry<'a>>,
}

/// Borrows from the file's buffer, so that the secret is copied nowhere.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Entry<'a> {
    generation: Generation,
    private_key: &'a str,
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
    let mut keys = BTreeMap::new();
    for entry in document.keys {
        let generation = entry.generation;
        let key = PrivateKey::decode(entry.private_key)
            .ok_or_else(|| format!("the key of generation {generation} is not one"))?;
        if keys.insert(generation, key).is_some() {
            return Err(format!("generation {generation} is there twice"));
        }
    }
    KeyRing::from_keys(keys).ok_or_else(|| "it holds no key".to_owned())
}

/// The document for these keys.
pub(super) fn render(ring: &KeyRing) -> Result<Zeroizing<Vec<u8>>, serde_json::Error> {
    let keys: Vec<(Generation, Zeroizing<[u8; ENCODED]>)> = ring
        .iter()
        .map(|(generation, key)| {
            let mut text = Zeroizing::new([b'='; ENCODED]);
            // 32 bytes always fill 44 characters exactly; were it otherwise, the check on
            // reading back would refuse the text.
            let _ = STANDARD.encode_slice(key.as_bytes(), text.as_mut());
            (generation, text)
        })
        .collect();
    let entries = keys.iter().map(|(generation, text)| Entry {
        generation: *generation,
        private_key: std::str::from_utf8(text.as_ref()).unwrap_or_default(),
    });
    let document = Document { schema: SCHEMA, keys: entries.collect() };
    // Room for all of it, because a buffer that grows leaves copies of the secret behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(ENTRY * (document.keys.len() + 1)));
    serde_json::to_writer(&mut *bytes, &document)?;
    bytes.push(b'\n');
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_generations_are_read_back() {
        let keys = (6..8).map(|n| (Generation::new(n), PrivateKey::generate())).collect();
        let ring = KeyRing::from_keys(keys).unwrap();
        let bytes = render(&ring).unwrap();
        assert!(bytes.len() < ENTRY * 3);
        let read = parse(&bytes).unwrap();
        assert_eq!(read.publics(), ring.publics());
        assert_eq!(read.current(), Generation::new(6));
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
