//! Which version of the CNI specification the reference plugins of a node speak.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde::Deserialize;

use super::delegate::run_for;
use super::{CURRENT_VERSION, conflist::REFERENCE_PLUGINS};

/// Flannel's, which every reference plugin speaks.
pub const OLDEST: &str = "0.3.1";
/// How long a plugin may take to say its versions.
const LIMIT: Duration = Duration::from_secs(5);

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Answer {
    supported_versions: Vec<String>,
}

/// The newest version, which lets runtimes ask whether pods may start, where every reference
/// plugin in `bin_dir` that the configuration needs speaks it; else the oldest.
pub fn spoken_in(bin_dir: &Path) -> &'static str {
    let needed = REFERENCE_PLUGINS.iter().filter(|name| **name != "static");
    let all = needed.into_iter().all(|name| speaks(&bin_dir.join(name), CURRENT_VERSION));
    if all { CURRENT_VERSION } else { OLDEST }
}

fn speaks(program: &Path, version: &str) -> bool {
    let mut command = Command::new(program);
    command.env("CNI_COMMAND", "VERSION");
    let answer = run_for(&mut command, br#"{"cniVersion":"1.0.0"}"#, LIMIT);
    let answer = answer.ok().and_then(|o| serde_json::from_slice::<Answer>(&o.stdout).ok());
    answer.is_some_and(|answer| answer.supported_versions.iter().any(|v| v == version))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn the_newest_only_where_every_plugin_speaks_it() {
        let folder = tempfile::tempdir().unwrap();
        let plugin = |name: &str, versions: &str| {
            let path = folder.path().join(name);
            let script = format!("#!/bin/sh\necho '{{\"supportedVersions\":[{versions}]}}'\n");
            fs::write(&path, script).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        };
        assert_eq!(spoken_in(folder.path()), OLDEST);
        for name in ["bridge", "host-local", "loopback", "portmap"] {
            plugin(name, r#""1.0.0","1.1.0""#);
        }
        assert_eq!(spoken_in(folder.path()), "1.1.0");
        plugin("portmap", r#""0.4.0","1.0.0""#);
        assert_eq!(spoken_in(folder.path()), OLDEST);
        plugin("portmap", "no JSON");
        assert_eq!(spoken_in(folder.path()), OLDEST);
    }
}
