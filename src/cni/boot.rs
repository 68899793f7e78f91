//! The first pod after a boot: host-local's leases are on disk and outlive the pods that had
//! them, and no runtime has to give them back. With a small subnet a few reboots would exhaust
//! it.

use std::fs::{self, File};
use std::io;
use std::net::IpAddr;
use std::path::Path;

use nix::fcntl::{Flock, FlockArg};
use nix::net::if_::if_nametoindex;

use super::config::Delegate;
use crate::files;

/// In a folder that is empty after a boot: leases from before it are forgotten.
const MARK: &str = "leases-are-of-this-boot";

/// Forgets the leases of pods that a reboot ended. Where the bridge is there, pods may be as
/// well, and nothing is forgotten.
pub(super) fn forget_leases(run_dir: &Path, delegate: &Delegate) -> io::Result<()> {
    let mark = run_dir.join(MARK);
    if mark.exists() {
        return Ok(());
    }
    let leases = delegate.leases_dir();
    // host-local's own lock, until the mark is there.
    let lock = match File::options().create(true).append(true).open(leases.join("lock")) {
        Ok(lock) => Some(Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?),
        Err(error) if no_folder(&error) => None,
        Err(error) => return Err(error),
    };
    // Another pod may have been first.
    if lock.is_some() && !mark.exists() && if_nametoindex(delegate.bridge()).is_err() {
        remove_leases(&leases)?;
    }
    files::write_atomic(&mark, b"", 0o644)
}

fn no_folder(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// The file that keeps addresses from being used again at once stays.
fn remove_leases(leases: &Path) -> io::Result<()> {
    for entry in fs::read_dir(leases)? {
        let entry = entry?;
        // An IPv6 address has "_" for ":" where a file system wants it so.
        let name = entry.file_name().to_string_lossy().replace('_', ":");
        if name.parse::<IpAddr>().is_ok() {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}
