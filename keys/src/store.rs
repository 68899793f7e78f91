//! Keys on disk: one JSON file, mode 0600, in a directory of mode 0700.
//!
//! A file that is there but cannot be used is an error, never a reason for a new key: a
//! node that silently changed its key would lose every peer.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, Flock, FlockArg, OFlag, openat, renameat};
use nix::sys::stat::{Mode, fstatat};
use nix::unistd::{Uid, UnlinkatFlags, unlinkat};
use zeroize::Zeroizing;

use crate::ring::Entry;
use crate::{Answer, ClusterSecret, Generation, KeyRing, Secrets};

mod document;
mod error;

pub use error::KeyStoreError;

/// Largest file that is read, in bytes. Two keys take under 200.
const LIMIT: usize = 16 * 1024;

/// The key file of a node.
#[derive(Debug, Clone)]
pub struct KeyStore {
    path: PathBuf,
    owner: Uid,
}

impl KeyStore {
    /// The store at this path, by default `/var/lib/gambeson/keys.json`. Touches nothing yet.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), owner: Uid::effective() }
    }

    /// Where the keys are.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads the keys. `None` only when there is no such file.
    ///
    /// # Errors
    /// Anything else that is wrong with the file or its directory; each error names the file
    /// and the remedy. No key is made in place of one that cannot be read.
    pub fn load(&self) -> Result<Option<KeyRing>, KeyStoreError> {
        let (directory_path, name) = self.split()?;
        let Some(directory) = self.open_directory(directory_path)? else { return Ok(None) };
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let file = match openat(&directory, &*name, flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(Errno::ENOENT) => return Ok(None),
            Err(Errno::ELOOP) => return Err(KeyStoreError::Symlink { path: self.path.clone() }),
            Err(errno) => return Err(self.read_error(errno.into())),
        };
        self.check_file(&file)?;
        let mode = mode_of(&directory).map_err(|source| self.read_error(source))?;
        if mode & 0o077 != 0 {
            return Err(KeyStoreError::DirectoryMode { path: directory_path.to_owned(), mode });
        }
        self.read(file).map(Some)
    }

    /// Makes the first key, durably: when this returns, the key survives a power cut. It
    /// answers what was asked for before.
    ///
    /// # Errors
    /// [`KeyStoreError::Exists`] when there is a file already, whatever its state, and any
    /// failure to write.
    pub fn create(
        &self,
        first: Generation,
        answer: Answer,
        secret: Option<ClusterSecret>,
    ) -> Result<KeyRing, KeyStoreError> {
        let (directory, name) = self.lock()?;
        match fstatat(&*directory, &*name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Err(Errno::ENOENT) => {}
            Ok(_) => return Err(KeyStoreError::Exists { path: self.path.clone() }),
            Err(errno) => return Err(self.read_error(errno.into())),
        }
        let id = secret.as_ref().map(ClusterSecret::id);
        let ring = KeyRing::first(first, Entry::generate(id), answer, Secrets::new(secret));
        self.write(&directory, &name, ring.iter(), (ring.answer(), ring.secrets()))?;
        Ok(ring)
    }

    /// Makes the key of the next generation beside the newest one, durably, and drops older
    /// ones.
    ///
    /// # Errors
    /// Any failure to write; the ring is as it was.
    pub fn add_next(
        &self,
        ring: &mut KeyRing,
        answer: Answer,
        secret: Option<ClusterSecret>,
    ) -> Result<(), KeyStoreError> {
        let next = ring.newest().next().ok_or_else(|| self.last_generation())?;
        let (directory, name) = self.lock()?;
        let entry = Entry::generate(secret.as_ref().map(ClusterSecret::id));
        let secrets = with_secret(ring.secrets(), secret);
        let keys = ring.newest_alone().chain([(next, &entry)]);
        self.write(&directory, &name, keys, (&answer, &secrets))?;
        ring.add_next(next, entry, (answer, secrets));
        Ok(())
    }

    /// Takes away every key but the newest, from the disk and from memory. The file that had them
    /// is overwritten, as far as the file system writes in place.
    ///
    /// # Errors
    /// Any failure to write. The ring is as it was, unless only overwriting failed.
    pub fn retire_older(&self, ring: &mut KeyRing) -> Result<(), KeyStoreError> {
        let (directory, name) = self.lock()?;
        let flags = OFlag::O_WRONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let former = openat(&*directory, &*name, flags, Mode::empty()).map(File::from);
        self.write(&directory, &name, ring.newest_alone(), (ring.answer(), ring.secrets()))?;
        ring.keep_newest();
        if let Ok(former) = former {
            overwrite(former).map_err(|source| self.write_error("erase a former", source))?;
        }
        Ok(())
    }

    /// Forgets every secret but that of the newest key, durably.
    ///
    /// # Errors
    /// Any failure to write; the ring is as it was.
    pub fn forget_older_secrets(&self, ring: &mut KeyRing) -> Result<(), KeyStoreError> {
        let (directory, name) = self.lock()?;
        let newest = ring.secret_ids().get(&ring.newest()).copied();
        let known = newest.and_then(|id| ring.secrets().get(id)).cloned();
        let secrets = Secrets::new(known);
        self.write(&directory, &name, ring.iter(), (ring.answer(), &secrets))?;
        ring.set_secrets(secrets);
        Ok(())
    }

    /// Opens the directory, made where it is missing. The lock makes the temporary this
    /// process's alone, so that one left by a crash can be removed.
    fn lock(&self) -> Result<(Flock<File>, OsString), KeyStoreError> {
        let (directory_path, name) = self.split()?;
        let directory = self.make_directory(directory_path)?;
        let directory = Flock::lock(directory, FlockArg::LockExclusive)
            .map_err(|(_, errno)| self.write_error("lock the directory of", errno.into()))?;
        Ok((directory, name))
    }

    fn split(&self) -> Result<(&Path, OsString), KeyStoreError> {
        let name = self.path.file_name();
        let name = name.ok_or_else(|| KeyStoreError::NoFileName { path: self.path.clone() })?;
        let directory = match self.path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        Ok((directory, name.to_owned()))
    }

    /// Opens the directory of the store, or `None` when there is none. One in which somebody
    /// else can put or remove files is refused before anything in it is believed.
    fn open_directory(&self, path: &Path) -> Result<Option<File>, KeyStoreError> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let directory = match nix::fcntl::open(path, flags, Mode::empty()) {
            Ok(directory) => File::from(directory),
            Err(Errno::ENOENT) => return Ok(None),
            Err(errno @ (Errno::ENOTDIR | Errno::ELOOP)) => {
                return Err(KeyStoreError::NotADirectory {
                    path: path.to_owned(),
                    source: errno.into(),
                });
            }
            Err(errno) => return Err(self.read_error(errno.into())),
        };
        let metadata = directory.metadata().map_err(|source| self.read_error(source))?;
        let mode = metadata.mode() & 0o7777;
        if metadata.uid() != self.owner.as_raw() {
            let (owner, expected) = (metadata.uid(), self.owner.as_raw());
            return Err(KeyStoreError::DirectoryOwner { path: path.to_owned(), owner, expected });
        }
        if mode & 0o022 != 0 {
            return Err(KeyStoreError::DirectoryMode { path: path.to_owned(), mode });
        }
        Ok(Some(directory))
    }

    /// Opens the directory for a first key, making it where it is missing. One of ours that is
    /// merely readable by others, as the kubelet and systemd make them, is closed.
    fn make_directory(&self, path: &Path) -> Result<File, KeyStoreError> {
        let opened = match self.open_directory(path)? {
            Some(directory) => directory,
            None => {
                std::fs::DirBuilder::new()
                    .recursive(true)
                    .mode(0o700)
                    .create(path)
                    .map_err(|source| self.write_error("make the directory of", source))?;
                sync_parent(path).map_err(|source| self.write_error("make durable", source))?;
                self.open_directory(path)?.ok_or_else(|| self.read_error(Errno::ENOENT.into()))?
            }
        };
        if mode_of(&opened).map_err(|source| self.read_error(source))? != 0o700 {
            opened
                .set_permissions(std::fs::Permissions::from_mode(0o700))
                .map_err(|source| self.write_error("close the directory of", source))?;
        }
        Ok(opened)
    }

    fn check_file(&self, file: &File) -> Result<(), KeyStoreError> {
        let path = || self.path.clone();
        let metadata = file.metadata().map_err(|source| self.read_error(source))?;
        if !metadata.is_file() {
            return Err(KeyStoreError::NotAFile { path: path() });
        }
        if metadata.uid() != self.owner.as_raw() {
            let (owner, expected) = (metadata.uid(), self.owner.as_raw());
            return Err(KeyStoreError::Owner { path: path(), owner, expected });
        }
        let mode = metadata.mode() & 0o7777;
        if mode != 0o600 && mode != 0o400 {
            return Err(KeyStoreError::Mode { path: path(), mode });
        }
        Ok(())
    }

    fn read(&self, mut file: File) -> Result<KeyRing, KeyStoreError> {
        // A fixed buffer, because one that grows leaves copies of the secret behind.
        let mut buffer = Zeroizing::new([0_u8; LIMIT]);
        let mut length = 0;
        while length < LIMIT {
            match file.read(&mut buffer[length..]) {
                Ok(0) => break,
                Ok(count) => length += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(self.read_error(source)),
            }
        }
        if length == 0 {
            return Err(KeyStoreError::Empty { path: self.path.clone() });
        }
        if length == LIMIT {
            let what = format!("longer than {LIMIT} bytes");
            return Err(KeyStoreError::Corrupt { path: self.path.clone(), what });
        }
        document::parse(&buffer[..length])
            .map_err(|what| KeyStoreError::Corrupt { path: self.path.clone(), what })
    }

    fn write<'a>(
        &self,
        directory: &File,
        name: &OsString,
        keys: impl Iterator<Item = (Generation, &'a Entry)>,
        what_for: (&Answer, &Secrets),
    ) -> Result<(), KeyStoreError> {
        let bytes = document::render(keys, what_for)
            .map_err(|source| self.write_error("encode", io::Error::other(source)))?;
        let temporary = temporary_name(name);
        match unlinkat(directory, &*temporary, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => {}
            Err(errno) => return Err(self.write_error("clear a leftover of", errno.into())),
        }
        let written = write_new(directory, &temporary, &bytes).and_then(|()| {
            renameat(directory, &*temporary, directory, &**name)?;
            directory.sync_all()
        });
        written.map_err(|source| {
            // Best effort: a leftover is removed by the next write anyway.
            let _ = unlinkat(directory, &*temporary, UnlinkatFlags::NoRemoveDir);
            self.write_error("write", source)
        })
    }

    fn last_generation(&self) -> KeyStoreError {
        KeyStoreError::LastGeneration { path: self.path.clone() }
    }

    fn read_error(&self, source: io::Error) -> KeyStoreError {
        KeyStoreError::Read { path: self.path.clone(), source }
    }

    fn write_error(&self, operation: &'static str, source: io::Error) -> KeyStoreError {
        KeyStoreError::Write { path: self.path.clone(), operation, source }
    }
}

/// Secrets with this one as the newest; of the others, the newest stays for peers that have not
/// followed.
fn with_secret(secrets: &Secrets, secret: Option<ClusterSecret>) -> Secrets {
    let Some(secret) = secret else { return secrets.clone() };
    let others: Vec<_> = secrets.iter().filter(|known| **known != secret).cloned().collect();
    Secrets::new(others.last().cloned().into_iter().chain([secret]))
}

fn temporary_name(name: &OsString) -> OsString {
    let mut temporary = OsString::from(".");
    temporary.push(name);
    temporary.push(".tmp");
    temporary
}

fn write_new(directory: &File, name: &OsString, bytes: &[u8]) -> io::Result<()> {
    let flags =
        OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let file = openat(directory, &**name, flags, Mode::from_bits_truncate(0o600))?;
    let mut file = File::from(file);
    // The umask may have taken bits away.
    file.set_permissions(std::fs::Permissions::from_mode(0o600))?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Zeros in place of what a file holds that no name leads to any more.
fn overwrite(mut file: File) -> io::Result<()> {
    let length = file.metadata()?.len().min(LIMIT as u64);
    io::copy(&mut io::repeat(0).take(length), &mut file)?;
    file.sync_all()
}

fn mode_of(file: &File) -> io::Result<u32> {
    Ok(file.metadata()?.mode() & 0o7777)
}

fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => File::open(parent)?.sync_all(),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
