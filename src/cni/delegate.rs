use std::ffi::OsStr;
use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Output, Stdio};

use serde_json::{Map, Value};

use super::error::{DELEGATE_UNUSABLE, Reported};
use super::{CniError, Command};

const LONGEST_QUOTE: usize = 1024;

/// The plugin that does the work, found on disk.
#[derive(Debug)]
pub(super) struct Plugin {
    name: String,
    program: PathBuf,
}

impl Plugin {
    /// Looks for the plugin in the folders of CNI_PATH.
    pub(super) fn find(name: &str, path: &OsStr) -> Result<Self, CniError> {
        let program = std::env::split_paths(path)
            .filter(|folder| !folder.as_os_str().is_empty())
            .map(|folder| folder.join(name))
            .find(|program| program.is_file())
            .ok_or_else(|| CniError::DelegateNotFound {
                name: name.to_owned(),
                path: path.to_string_lossy().into_owned(),
            })?;
        if is_this_program(&program) {
            let problem = format!("\"delegate.type\" is {name:?}, the plugin itself");
            return Err(CniError::Config(problem));
        }
        Ok(Self { name: name.to_owned(), program })
    }

    /// Attaches the container and gives the result as the delegate printed it.
    pub(super) fn add(&self, conf: &[u8]) -> Result<Vec<u8>, CniError> {
        let result = self.run(Command::Add, conf)?;
        match serde_json::from_slice::<Map<String, Value>>(&result) {
            Ok(_) => Ok(result),
            Err(_) => Err(CniError::DelegateResult { name: self.name.clone() }),
        }
    }

    /// Sees that the container is attached as it was.
    pub(super) fn check(&self, conf: &[u8]) -> Result<(), CniError> {
        self.run(Command::Check, conf).map(drop)
    }

    /// Detaches the container.
    pub(super) fn del(&self, conf: &[u8]) -> Result<(), CniError> {
        self.run(Command::Del, conf).map(drop)
    }

    // The other CNI_ variables are inherited.
    fn run(&self, command: Command, conf: &[u8]) -> Result<Vec<u8>, CniError> {
        let output = std::process::Command::new(&self.program)
            .env("CNI_COMMAND", command.as_str())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .and_then(|child| converse(child, conf))
            .map_err(|source| CniError::DelegateRun { program: self.program.clone(), source })?;
        if output.status.success() {
            return Ok(output.stdout);
        }
        let reported = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| Reported {
            code: DELEGATE_UNUSABLE,
            msg: output.status.to_string(),
            details: String::from_utf8_lossy(&output.stdout).chars().take(LONGEST_QUOTE).collect(),
        });
        Err(CniError::Delegate { name: self.name.clone(), reported })
    }
}

// Writes from a thread of its own: a delegate may print before it has read everything, and
// neither side must wait for the other.
fn converse(mut child: Child, input: &[u8]) -> io::Result<Output> {
    let stdin = child.stdin.take();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // A delegate that does not read its input says in its output why.
            let _ = stdin.map(|mut stdin| stdin.write_all(input));
        });
        child.wait_with_output()
    })
}

// By any name, this program as its own delegate would start itself for ever.
fn is_this_program(program: &Path) -> bool {
    match (fs::metadata(program), fs::metadata("/proc/self/exe")) {
        (Ok(theirs), Ok(ours)) => (theirs.dev(), theirs.ino()) == (ours.dev(), ours.ino()),
        _ => false,
    }
}
