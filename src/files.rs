//! Files that another process may read at any moment: they change in one step or not at all.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

/// Puts `contents` at `path` with exactly `mode`: a temporary file beside it, fsync, rename,
/// fsync of the directory. A reader sees the old file or the new one, also after a crash.
///
/// # Errors
/// Whatever the file system says. Nothing but the old file, if any, is then left behind.
pub(crate) fn write_atomic(path: &Path, contents: &[u8], mode: u32) -> io::Result<()> {
    let temporary = temporary_beside(path)?;
    let written = write_new(&temporary, contents, mode).and_then(|()| fs::rename(&temporary, path));
    if let Err(error) = written {
        let _ = fs::remove_file(&temporary);
        return Err(error);
    }
    sync_parent(path)
}

/// Puts the symbolic link `path` -> `target` in place in one step, as [`write_atomic`] does.
///
/// # Errors
/// Whatever the file system says. Nothing but the old file, if any, is then left behind.
pub(crate) fn symlink_atomic(target: &Path, path: &Path) -> io::Result<()> {
    let temporary = temporary_beside(path)?;
    let linked =
        std::os::unix::fs::symlink(target, &temporary).and_then(|()| fs::rename(&temporary, path));
    if let Err(error) = linked {
        let _ = fs::remove_file(&temporary);
        return Err(error);
    }
    sync_parent(path)
}

/// Makes a directory and those above it where they are missing. Existing ones keep their mode.
///
/// # Errors
/// Whatever the file system says.
pub(crate) fn create_directory(path: &Path, mode: u32) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(mode).create(path)
}

/// Whether `path` is a regular file with these contents and exactly this mode.
pub(crate) fn holds(path: &Path, contents: &[u8], mode: u32) -> bool {
    let Ok(metadata) = fs::symlink_metadata(path) else { return false };
    metadata.is_file()
        && metadata.permissions().mode() & 0o7777 == mode
        && metadata.len() == contents.len() as u64
        && fs::read(path).is_ok_and(|found| found == contents)
}

// The leading dot and the missing extension keep container runtimes, which read every
// *.conf and *.conflist of a directory, from taking the temporary file for a configuration.
fn temporary_beside(path: &Path) -> io::Result<PathBuf> {
    let name = path.file_name().and_then(|name| name.to_str()).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidInput, "the path does not end in a file name")
    })?;
    let short: String = name.chars().take(64).collect();
    Ok(path.with_file_name(format!(".{short}.{:016x}", rand::random::<u64>())))
}

fn write_new(path: &Path, contents: &[u8], mode: u32) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    file.set_permissions(Permissions::from_mode(mode))?;
    file.write_all(contents)?;
    file.sync_all()
}

fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => File::open(parent)?.sync_all(),
        _ => File::open(".")?.sync_all(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn replaces_contents_and_mode_and_leaves_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        write_atomic(&path, b"one", 0o4755).unwrap();
        write_atomic(&path, b"two", 0o644).unwrap();
        assert!(holds(&path, b"two", 0o644));
        assert_eq!(names(directory.path()), ["file"]);
    }

    #[test]
    fn a_symbolic_link_in_the_way_is_replaced_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let victim = directory.path().join("victim");
        fs::write(&victim, "untouched").unwrap();
        let path = directory.path().join("file");
        std::os::unix::fs::symlink(&victim, &path).unwrap();
        assert!(!holds(&path, b"untouched", 0o644));
        write_atomic(&path, b"new", 0o600).unwrap();
        assert_eq!(fs::read_to_string(&victim).unwrap(), "untouched");
        assert!(holds(&path, b"new", 0o600));
    }

    #[test]
    fn a_failure_leaves_no_temporary_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("taken");
        fs::create_dir_all(path.join("child")).unwrap();
        assert!(write_atomic(&path, b"x", 0o644).is_err());
        assert!(symlink_atomic(Path::new("x"), &path).is_err());
        assert_eq!(names(directory.path()), ["taken"]);
    }
}
