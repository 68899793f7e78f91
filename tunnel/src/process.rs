//! What a process that holds keys does first.

use std::io;

use nix::errno::Errno;
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use zeroize::Zeroize as _;

/// Keeps this process's memory to itself: it leaves no core dump, and no process without
/// CAP_SYS_PTRACE reads it or attaches to it (`PR_SET_DUMPABLE`, prctl(2)).
///
/// # Errors
/// Those of prctl(2) and setrlimit(2).
pub fn keep_memory_private() -> io::Result<()> {
    prctl::set_dumpable(false)?;
    Ok(setrlimit(Resource::RLIMIT_CORE, 0, 0)?)
}

/// Closes every descriptor but standard input, output and error in the programs that this
/// process starts, whoever opened it.
///
/// # Errors
/// Those of close_range(2), which is there since Linux 5.9, and of reading `/proc/self/fd`.
pub fn keep_descriptors() -> io::Result<()> {
    const FIRST: libc::c_uint = 3;
    let flags = libc::CLOSE_RANGE_CLOEXEC.cast_signed();
    // SAFETY: it closes nothing here and now.
    let result = unsafe { libc::close_range(FIRST, libc::c_uint::MAX, flags) };
    match Errno::result(result) {
        // Before 5.9, or 5.11 with this flag.
        Err(Errno::ENOSYS | Errno::EINVAL) => keep_each_descriptor(),
        result => result.map(drop).map_err(Into::into),
    }
}

fn keep_each_descriptor() -> io::Result<()> {
    for entry in std::fs::read_dir("/proc/self/fd")? {
        let name = entry?.file_name();
        let Some(fd) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
        if fd > libc::STDERR_FILENO {
            // SAFETY: it only sets a flag; a descriptor that is closed by now is an error.
            unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
        }
    }
    Ok(())
}

/// Overwrites what functions that have returned left on this thread's stack: a value that is
/// moved leaves a copy behind, which no destructor erases.
#[inline(never)]
pub(crate) fn wipe_stack() {
    /// Several times what serving a request takes, bytes.
    const DEPTH: usize = 64 << 10;
    let mut area = [0u8; DEPTH];
    area.zeroize();
    std::hint::black_box(&area);
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd as _;

    use super::*;

    fn is_kept(file: &std::fs::File) -> bool {
        // SAFETY: it only reads a flag.
        let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFD) };
        flags & libc::FD_CLOEXEC != 0
    }

    #[test]
    fn descriptors_are_kept_with_and_without_the_system_call() {
        for keep in [keep_descriptors, keep_each_descriptor] {
            let file = std::fs::File::open("/dev/null").unwrap();
            // SAFETY: it only clears a flag.
            unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFD, 0) };
            assert!(!is_kept(&file));
            keep().unwrap();
            assert!(is_kept(&file));
        }
    }
}
