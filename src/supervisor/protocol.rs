//! One request and one reply, each a line of JSON, for each connection.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use gambeson_mesh::session::DeviceName;
use serde::{Deserialize, Serialize};

/// A device takes this long to get ready at most.
pub(super) const START: Duration = Duration::from_secs(10);
/// How long either side waits for the other beyond that.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);
/// No request or reply comes near it, in bytes.
pub(super) const LONGEST: u64 = 64 << 10;

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", rename_all_fields = "lowercase")]
pub(super) enum Request {
    /// Make a device and serve it.
    Start {
        /// Its name.
        device: DeviceName,
        /// Its alias.
        alias: String,
        /// In bytes.
        mtu: u32,
    },
    /// End the process of a device, if there is one.
    End {
        /// Its name.
        device: DeviceName,
    },
    /// Say which devices are served.
    List,
}

/// What is answered.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Reply {
    /// What went wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) error: Option<String>,
    /// The devices that are served now.
    #[serde(default)]
    pub(super) devices: Vec<DeviceName>,
}

/// The sockets in the folder, the newest first.
pub(super) fn sockets(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut paths = Vec::new();
    for entry in entries {
        paths.push(entry?.path());
    }
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "sock"));
    // Each begins with the time of its start, at a fixed width.
    paths.sort_by(|a, b| b.cmp(a));
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_read_as_it_was_written() {
        let device = DeviceName::parse("gambeson2").unwrap();
        for request in [
            Request::Start { device, alias: "gambeson".to_owned(), mtu: 1440 },
            Request::End { device },
            Request::List,
        ] {
            let text = serde_json::to_string(&request).unwrap();
            assert_eq!(serde_json::from_str::<Request>(&text).unwrap(), request, "{text}");
        }
        let foreign = r#"{"end":{"device":"wg0"}}"#;
        assert!(serde_json::from_str::<Request>(foreign).is_err());
    }
}
