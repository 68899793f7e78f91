use std::io;
use std::path::PathBuf;

/// What is wrong with the key file. Each message names the file and the remedy.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "fields are what the message shows")]
pub enum KeyStoreError {
    /// The path names no file.
    #[error("{} is not the path of a key file; give one such as /var/lib/gambeson/keys.json", path.display())]
    NoFileName { path: PathBuf },
    /// A file of no length.
    #[error(
        "key file {} is empty; restore it from a backup, or remove it to give this node a new key", path.display()
    )]
    Empty { path: PathBuf },
    /// Not the document that was written.
    #[error(
        "key file {} is corrupt: {what}; restore it from a backup, or remove it to give this node a new key", path.display()
    )]
    Corrupt { path: PathBuf, what: String },
    /// Readable or writable by others, or not by its owner.
    #[error(
        "key file {} has mode {mode:04o}, not 0600, so its keys may have been read or replaced; \
         check who could, then chmod 0600 it, or remove it to give this node a new key", path.display()
    )]
    Mode { path: PathBuf, mode: u32 },
    /// A symbolic link.
    #[error("key file {} is a symbolic link, which is not followed; put the file itself there", path.display())]
    Symlink { path: PathBuf },
    /// A directory, device, pipe or socket.
    #[error("key file {} is not a regular file; move away what is there", path.display())]
    NotAFile { path: PathBuf },
    /// The file belongs to another user.
    #[error(
        "key file {} belongs to user id {owner}, not {expected}; \
         find out who put it there, then chown it or remove it", path.display()
    )]
    Owner { path: PathBuf, owner: u32, expected: u32 },
    /// The directory belongs to another user, who could replace the file.
    #[error(
        "directory {} of the key file belongs to user id {owner}, not {expected}; \
         chown it or choose another", path.display()
    )]
    DirectoryOwner { path: PathBuf, owner: u32, expected: u32 },
    /// The directory is open to others.
    #[error(
        "directory {} of the key file has mode {mode:04o}, not 0700; chmod 0700 it", path.display()
    )]
    DirectoryMode { path: PathBuf, mode: u32 },
    /// Something else than a directory, or a link to one.
    #[error("{}, which should hold the key file, is not a directory (a link is not followed)", path.display())]
    NotADirectory { path: PathBuf, source: io::Error },
    /// A first key was asked for where keys are.
    #[error("key file {} exists already and is not replaced; remove it to give this node a new key", path.display())]
    Exists { path: PathBuf },
    /// No generation comes after the newest.
    #[error("key file {} has the last generation that there can be", path.display())]
    LastGeneration { path: PathBuf },
    /// The file is there but cannot be read.
    #[error(
        "cannot read key file {}; check its permissions and the disk (no new key is made for it)", path.display()
    )]
    Read { path: PathBuf, source: io::Error },
    /// The file cannot be written.
    #[error("cannot {operation} key file {}; check for a full or read-only disk", path.display())]
    Write { path: PathBuf, operation: &'static str, source: io::Error },
}
