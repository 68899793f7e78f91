//! What a lab writes down about itself, so that the next command, or the one after a crash,
//! finds everything.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::error::{LabError, file_error};
use super::layout::state_dir;
use super::options::{LabName, Options};
use super::process::ProcessId;

/// Everything there is to know about a lab.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct State {
    pub(super) schema: u32,
    pub(super) options: Options,
    /// `lab up` went through.
    pub(super) finished: bool,
    pub(super) api: Option<ApiState>,
    /// Agents by node name.
    pub(super) agents: BTreeMap<String, ProcessId>,
    /// Attached pods by name.
    pub(super) pods: BTreeMap<String, PodState>,
}

/// The API server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ApiState {
    /// Port on the host's loopback address; a restart keeps it.
    pub(super) port: u16,
    pub(super) process: ProcessId,
}

/// An attached pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PodState {
    pub(super) addresses: Vec<IpAddr>,
    /// MTU of its interface in bytes.
    pub(super) mtu: u32,
}

impl State {
    const FILE: &str = "lab.json";

    pub(super) fn new(options: Options) -> Self {
        Self {
            schema: 1,
            options,
            finished: false,
            api: None,
            agents: BTreeMap::new(),
            pods: BTreeMap::new(),
        }
    }

    /// The state of this lab, or `None` when it has none.
    pub(super) fn load(name: &LabName) -> Result<Option<Self>, LabError> {
        read_json(&state_dir(name).join(Self::FILE))
    }

    pub(super) fn save(&self) -> Result<(), LabError> {
        write_json(&self.options.state_dir().join(Self::FILE), self)
    }
}

/// The right to change a lab. Ends with the process that has it.
#[derive(Debug)]
pub(super) struct Lock {
    _file: Flock<File>,
}

impl Lock {
    const FILE: &str = "lock";

    /// Takes the lock of a lab whose folder exists. `None` when there is no such folder.
    pub(super) fn take(name: &LabName) -> Result<Option<Self>, LabError> {
        let path = state_dir(name).join(Self::FILE);
        loop {
            let file = match File::options().create(true).append(true).open(&path) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(file_error("open", path)(error)),
            };
            let file = Flock::lock(file, FlockArg::LockExclusiveNonblock)
                .map_err(|_| LabError::Busy(name.clone()))?;
            // The holder before may have taken the lab down, file and all.
            if is_at(&file, &path) {
                return Ok(Some(Self { _file: file }));
            }
        }
    }
}

fn is_at(file: &File, path: &Path) -> bool {
    let (Ok(held), Ok(named)) = (file.metadata(), fs::metadata(path)) else { return false };
    (held.dev(), held.ino()) == (named.dev(), named.ino())
}

/// Reads a JSON file; `None` when it does not exist.
pub(super) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, LabError> {
    match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|source| LabError::State { path: path.to_owned(), source }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(file_error("read", path)(error)),
    }
}

/// Writes a JSON file in one step.
pub(super) fn write_json(path: &Path, value: &impl Serialize) -> Result<(), LabError> {
    let mut bytes = serde_json::to_vec_pretty(value)
        .map_err(|source| LabError::State { path: path.to_owned(), source })?;
    bytes.push(b'\n');
    write_atomically(path, &bytes)
}

/// Writes a file so that a reader sees all of it or the one before.
pub(super) fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), LabError> {
    let temporary = PathBuf::from(format!("{}.new", path.display()));
    fs::write(&temporary, bytes).map_err(file_error("write", &temporary))?;
    fs::rename(&temporary, path).map_err(file_error("replace", path))
}
