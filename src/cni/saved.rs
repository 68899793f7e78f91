use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::CniError;
use crate::files;

const DIRECTORY_MODE: u32 = 0o700;
const FILE_MODE: u32 = 0o600;

/// The interface that Kubernetes gives a pod.
const FIRST_INTERFACE: &str = "eth0";

/// The delegate's configuration of one interface of a container, kept from ADD to DEL.
///
/// It is in `ID:INTERFACE`, and that of eth0 in `ID` too, where Flannel's plugin keeps what it
/// has, one per container, and looks for it. An `ID` without `ID:eth0` is Flannel's, or of a
/// version that did likewise, and stands for whatever interface there is.
#[derive(Debug)]
pub(super) struct Saved {
    path: PathBuf,
    /// The file under the container's name alone.
    shared: PathBuf,
    /// Whether that file is this interface's, or else of `first`.
    is_first: bool,
    first: PathBuf,
}

impl Saved {
    /// The file of an interface of a container, whose names must be checked already.
    pub(super) fn of(data_dir: &Path, container_id: &str, interface: &str) -> Self {
        Self {
            path: data_dir.join(format!("{container_id}:{interface}")),
            shared: data_dir.join(container_id),
            is_first: interface == FIRST_INTERFACE,
            first: data_dir.join(format!("{container_id}:{FIRST_INTERFACE}")),
        }
    }

    /// Every interface of every container that has a file.
    pub(super) fn all(data_dir: &Path) -> Result<Vec<(String, String)>, CniError> {
        let list = |source| CniError::List { path: data_dir.to_owned(), source };
        let entries = match fs::read_dir(data_dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(list(source)),
        };
        let mut all = BTreeSet::new();
        for entry in entries {
            let name = entry.map_err(list)?.file_name();
            // A temporary file, or nothing of ours.
            let Some(name) = name.to_str().filter(|name| !name.starts_with('.')) else { continue };
            let (id, interface) = name.split_once(':').unwrap_or((name, FIRST_INTERFACE));
            all.insert((id.to_owned(), interface.to_owned()));
        }
        Ok(all.into_iter().collect())
    }

    pub(super) fn path(&self) -> PathBuf {
        self.path.clone()
    }

    /// The saved bytes, or `None` when there is no file.
    pub(super) fn load(&self) -> Result<Option<Vec<u8>>, CniError> {
        match load(&self.path)? {
            None if self.owns_shared() => load(&self.shared),
            found => Ok(found),
        }
    }

    pub(super) fn store(&self, bytes: &[u8]) -> Result<(), CniError> {
        store(&self.path, bytes)?;
        if self.is_first { store(&self.shared, bytes) } else { Ok(()) }
    }

    pub(super) fn remove(&self) -> Result<(), CniError> {
        let owns_shared = self.owns_shared();
        remove(&self.path)?;
        if owns_shared { remove(&self.shared) } else { Ok(()) }
    }

    /// Whether the container's file is this interface's as far as can be told.
    fn owns_shared(&self) -> bool {
        self.is_first || (!self.path.exists() && !self.first.exists())
    }
}

fn load(path: &Path) -> Result<Option<Vec<u8>>, CniError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(CniError::Load { path: path.to_owned(), source }),
    }
}

fn store(path: &Path, bytes: &[u8]) -> Result<(), CniError> {
    let directory = path.parent().unwrap_or(path);
    files::create_directory(directory, DIRECTORY_MODE)
        .and_then(|()| files::write_atomic(path, bytes, FILE_MODE))
        .map_err(|source| CniError::Save { path: path.to_owned(), source })
}

fn remove(path: &Path) -> Result<(), CniError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(CniError::Remove { path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}
