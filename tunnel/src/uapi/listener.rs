//! The socket file: made 0600, a stale one replaced, a live one respected, ours removed.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::sys::socket::{
    self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
};
use nix::sys::stat::{Mode, fchmod};

use crate::error::TunnelError;

/// A listening configuration socket. Its file goes away with it.
pub(crate) struct Listener {
    socket: UnixListener,
    path: PathBuf,
    /// Device and inode of the file, to tell it from one that has replaced it.
    file: (u64, u64),
}

impl Listener {
    /// Listens on `DIRECTORY/NAME.sock`, with mode 0600 from the first moment.
    pub(crate) fn bind(directory: &Path, name: &str) -> Result<Self, TunnelError> {
        let path = directory.join(format!("{name}.sock"));
        let failed = |operation, path: &Path| {
            let path = path.to_owned();
            move |source| TunnelError::Socket { operation, path, source }
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(directory)
            .map_err(failed("make the directory", directory))?;
        remove_stale(&path)?;
        let socket = listen_at(&path).map_err(failed("listen on", &path))?;
        let file = fs::symlink_metadata(&path).map_err(failed("look at", &path))?;
        Ok(Self { socket, path, file: (file.dev(), file.ino()) })
    }

    /// The next connection, without waiting.
    pub(crate) fn accept(&self) -> io::Result<UnixStream> {
        self.socket.accept().map(|(stream, _)| stream)
    }

    /// Whether the file is still there and ours. Deleting it is how one asks a userspace
    /// WireGuard to end.
    pub(crate) fn is_in_place(&self) -> bool {
        fs::symlink_metadata(&self.path).is_ok_and(|file| (file.dev(), file.ino()) == self.file)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if self.is_in_place()
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "socket not removed");
        }
    }
}

fn listen_at(path: &Path) -> io::Result<UnixListener> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    // The file that bind makes takes the mode of the socket, so that it is never open to
    // others, not even before a chmod.
    fchmod(&fd, Mode::S_IRUSR | Mode::S_IWUSR)?;
    bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    listen(&fd, Backlog::new(64)?)?;
    Ok(fd.into())
}

/// Tries whether somebody listens, without waiting.
fn connect(path: &Path) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    socket::connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(fd)
}

/// Removes the socket that a killed process has left, if nobody answers on it.
fn remove_stale(path: &Path) -> Result<(), TunnelError> {
    let failed = |operation| {
        let path = path.to_owned();
        move |source| TunnelError::Socket { operation, path, source }
    };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("look at")(error)),
        Ok(file) if !file.file_type().is_socket() => {
            return Err(failed("replace what is not a socket at")(
                io::ErrorKind::AlreadyExists.into(),
            ));
        }
        Ok(_) => {}
    }
    match connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(failed("remove the stale socket"))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        // Of a process that hangs, the queue of connections may be full.
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            Err(TunnelError::SocketInUse { path: path.to_owned() })
        }
        Ok(_) => Err(TunnelError::SocketInUse { path: path.to_owned() }),
        Err(error) => Err(failed("connect to")(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_hangs_with_a_full_queue_is_respected() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("wg0.sock");
        let _hung = listen_at(&path).unwrap();
        let mut queued = Vec::new();
        while let Ok(connection) = connect(&path) {
            queued.push(connection);
        }
        let error = Listener::bind(folder.path(), "wg0").err().unwrap().to_string();
        assert!(error.contains("another process serves"), "{error}");
    }
}
