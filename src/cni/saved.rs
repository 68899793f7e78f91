use std::fs;
use std::io;
use std::path::PathBuf;

use super::CniError;
use crate::files;

const DIRECTORY_MODE: u32 = 0o700;
const FILE_MODE: u32 = 0o600;

/// The delegate's configuration of one container, kept from ADD to DEL.
#[derive(Debug)]
pub(super) struct Saved {
    path: PathBuf,
}

impl Saved {
    /// The file of `container_id`, which must be checked already, in `data_dir`.
    pub(super) fn of(data_dir: PathBuf, container_id: &str) -> Self {
        Self { path: data_dir.join(container_id) }
    }

    pub(super) fn path(&self) -> PathBuf {
        self.path.clone()
    }

    /// The saved bytes, or `None` when there is no file.
    pub(super) fn load(&self) -> Result<Option<Vec<u8>>, CniError> {
        match fs::read(&self.path) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(CniError::Load { path: self.path(), source }),
        }
    }

    pub(super) fn store(&self, bytes: &[u8]) -> Result<(), CniError> {
        let directory = self.path.parent().unwrap_or(&self.path);
        files::create_directory(directory, DIRECTORY_MODE)
            .and_then(|()| files::write_atomic(&self.path, bytes, FILE_MODE))
            .map_err(|source| CniError::Save { path: self.path(), source })
    }

    pub(super) fn remove(&self) -> Result<(), CniError> {
        match fs::remove_file(&self.path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(CniError::Remove { path: self.path(), source })
            }
            _ => Ok(()),
        }
    }
}
