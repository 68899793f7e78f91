//! Puts the plugin and its configuration where the container runtime looks for them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

pub use super::conflist::{FLANNEL_NAME, PLUGIN_NAME, REFERENCE_PLUGINS};
use super::{conflist, versions};
use crate::files;

/// Where container runtimes look for CNI plugins.
pub const DEFAULT_BIN_DIR: &str = "/opt/cni/bin";
/// Where container runtimes look for CNI configuration.
pub const DEFAULT_CONF_DIR: &str = "/etc/cni/net.d";
/// Where the reference plugins are that a node may lack: Debian's folder, and the image's.
pub const DEFAULT_PLUGINS_DIR: &str = "/usr/lib/cni";
/// File name of the configuration: the one Flannel uses, so that it is replaced, not joined.
pub const CONFLIST_NAME: &str = "10-flannel.conflist";

const BINARY_MODE: u32 = 0o755;
pub(super) const CONFLIST_MODE: u32 = 0o644;

/// Why the plugin could not be installed.
#[derive(Debug, Error)]
pub enum InstallError {
    /// The program cannot be read.
    #[error("cannot read the program to install, {}", path.display())]
    ReadProgram {
        /// The program.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A folder cannot be made.
    #[error("cannot make the folder {}: check that the path above it is a writable folder", path.display())]
    Directory {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A file cannot be written.
    #[error(
        "cannot write {}: check that its folder is mounted writable and not full", path.display()
    )]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A file cannot be removed.
    #[error("cannot remove {}: check that its folder is mounted writable", path.display())]
    Remove {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// There is a configuration that cannot be read, or cannot work.
    #[error("{}: {problem}", path.display())]
    Conflist {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and what helps.
        problem: String,
    },
}

/// What became of the name `flannel`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FlannelName {
    /// It leads to our plugin.
    Ours,
    /// It is somebody else's and was not touched.
    Foreign,
}

/// Installs `program` into `bin_dir` as `gambeson-cni`, mode 0755 whatever the mode of
/// `program`, and, where that name is free or ours already, `flannel` as a symbolic link to
/// it. The link is also how ours is told from Flannel's: that one is a file, or a link to
/// something else.
///
/// # Errors
/// [`InstallError`]; what was there before is then still there, whole.
pub fn write_binaries(program: &Path, bin_dir: &Path) -> Result<FlannelName, InstallError> {
    let contents = fs::read(program)
        .map_err(|source| InstallError::ReadProgram { path: program.to_owned(), source })?;
    make_directory(bin_dir)?;
    write(&bin_dir.join(PLUGIN_NAME), &contents, BINARY_MODE)?;

    let link = bin_dir.join(FLANNEL_NAME);
    match fs::symlink_metadata(&link) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            files::symlink_atomic(Path::new(PLUGIN_NAME), &link)
                .map_err(|source| InstallError::Write { path: link, source })?;
            Ok(FlannelName::Ours)
        }
        _ if fs::read_link(&link).is_ok_and(|target| target == Path::new(PLUGIN_NAME)) => {
            Ok(FlannelName::Ours)
        }
        _ => Ok(FlannelName::Foreign),
    }
}

/// Copies the reference plugins that `bin_dir` lacks from `plugins_dir`, and gives their names.
/// Those that are there, of whatever version, are left alone.
///
/// # Errors
/// [`InstallError`], when one that is missing cannot be copied.
pub fn lay_down_plugins(
    plugins_dir: &Path,
    bin_dir: &Path,
) -> Result<Vec<&'static str>, InstallError> {
    let missing = REFERENCE_PLUGINS.into_iter().filter(|name| !bin_dir.join(name).exists());
    let mut copied = Vec::new();
    for name in missing {
        let path = plugins_dir.join(name);
        let contents = match fs::read(&path) {
            Ok(contents) => contents,
            // Not every source has every one.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(source) => return Err(InstallError::ReadProgram { path, source }),
        };
        make_directory(bin_dir)?;
        write(&bin_dir.join(name), &contents, BINARY_MODE)?;
        copied.push(name);
    }
    Ok(copied)
}

/// Writes the configuration for pods on `bridge` into `conf_dir`, with what an operator has
/// added to the one that is there. Returns whether it wrote.
///
/// A runtime takes the network for ready as soon as the file appears, so the agent calls this
/// only once the guard and subnet.env are in place.
///
/// # Errors
/// [`InstallError`]; what was there before is then still there, whole.
pub fn write_conflist(conf_dir: &Path, bridge: &str) -> Result<bool, InstallError> {
    make_directory(conf_dir)?;
    let path = conf_dir.join(CONFLIST_NAME);
    let refuse = |problem: String| InstallError::Conflist { path: path.clone(), problem };
    let present = match fs::read(&path) {
        Ok(bytes) => Some(bytes),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(refuse(format!("cannot be read: {error}"))),
    };
    let contents =
        conflist::wanted(present.as_deref(), bridge, versions::OLDEST).map_err(refuse)?;
    write(&path, &contents, CONFLIST_MODE)
}

pub(super) fn make_directory(path: &Path) -> Result<(), InstallError> {
    files::create_directory(path, 0o755)
        .map_err(|source| InstallError::Directory { path: path.to_owned(), source })
}

pub(super) fn write(path: &Path, contents: &[u8], mode: u32) -> Result<bool, InstallError> {
    if files::holds(path, contents, mode) {
        return Ok(false);
    }
    files::write_atomic(path, contents, mode)
        .map_err(|source| InstallError::Write { path: path.to_owned(), source })?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;
    use crate::cni::DEFAULT_BRIDGE;

    fn mode(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
    }

    fn program(directory: &Path, contents: &str) -> PathBuf {
        let path = directory.join("gambeson");
        fs::write(&path, contents).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o4711)).unwrap();
        path
    }

    #[test]
    fn installs_and_upgrades_without_the_set_user_id_bit() {
        let directory = tempfile::tempdir().unwrap();
        let bin = directory.path().join("cni/bin");
        for contents in ["one", "two"] {
            let program = program(directory.path(), contents);
            assert_eq!(write_binaries(&program, &bin).unwrap(), FlannelName::Ours);
            for name in [PLUGIN_NAME, FLANNEL_NAME] {
                assert_eq!(fs::read_to_string(bin.join(name)).unwrap(), contents);
            }
            assert_eq!(mode(&bin.join(PLUGIN_NAME)), 0o755);
        }
        fs::set_permissions(bin.join(PLUGIN_NAME), fs::Permissions::from_mode(0o4755)).unwrap();
        write_binaries(&program(directory.path(), "two"), &bin).unwrap();
        assert_eq!(mode(&bin.join(PLUGIN_NAME)), 0o755);
        assert_eq!(fs::read_dir(&bin).unwrap().count(), 2);
    }

    #[test]
    fn lays_down_the_plugins_that_are_missing_alone() {
        let directory = tempfile::tempdir().unwrap();
        let (from, bin) = (directory.path().join("from"), directory.path().join("bin"));
        for folder in [&from, &bin] {
            fs::create_dir(folder).unwrap();
        }
        for name in ["bridge", "host-local", "dhcp"] {
            fs::write(from.join(name), "new").unwrap();
        }
        fs::write(bin.join("host-local"), "the node's").unwrap();
        assert_eq!(lay_down_plugins(&from, &bin).unwrap(), ["bridge"]);
        assert_eq!(mode(&bin.join("bridge")), 0o755);
        assert_eq!(fs::read_to_string(bin.join("host-local")).unwrap(), "the node's");
        assert!(!bin.join("dhcp").exists());
        assert!(lay_down_plugins(&from, &bin).unwrap().is_empty());
    }

    #[test]
    fn leaves_a_foreign_flannel_alone() {
        let directory = tempfile::tempdir().unwrap();
        let program = program(directory.path(), "ours");
        let bin = directory.path().join("bin");
        fs::create_dir(&bin).unwrap();
        fs::write(bin.join(FLANNEL_NAME), "flannel's").unwrap();
        assert_eq!(write_binaries(&program, &bin).unwrap(), FlannelName::Foreign);
        assert_eq!(fs::read_to_string(bin.join(FLANNEL_NAME)).unwrap(), "flannel's");

        fs::remove_file(bin.join(FLANNEL_NAME)).unwrap();
        symlink("cni", bin.join(FLANNEL_NAME)).unwrap();
        assert_eq!(write_binaries(&program, &bin).unwrap(), FlannelName::Foreign);
        assert_eq!(fs::read_link(bin.join(FLANNEL_NAME)).unwrap(), Path::new("cni"));
        assert_eq!(fs::read_to_string(bin.join(PLUGIN_NAME)).unwrap(), "ours");
    }

    #[test]
    fn writes_the_conflist_only_when_it_differs() {
        let directory = tempfile::tempdir().unwrap();
        let conf = directory.path().join("net.d");
        assert!(write_conflist(&conf, DEFAULT_BRIDGE).unwrap());
        assert!(!write_conflist(&conf, DEFAULT_BRIDGE).unwrap());
        let path = conf.join(CONFLIST_NAME);
        assert_eq!(mode(&path), 0o644);
        fs::write(&path, "{}").unwrap();
        assert!(write_conflist(&conf, DEFAULT_BRIDGE).unwrap());
        assert_eq!(fs::read_to_string(&path).unwrap(), conflist::DEFAULT);
        assert!(write_conflist(&conf, "br7").unwrap());
        let named = fs::read_to_string(&path).unwrap();
        assert!(named.contains("\"bridge\": \"br7\""), "{named}");
        let error = write_conflist(&conf, "br8").unwrap_err().to_string();
        assert!(error.contains(path.to_str().unwrap()) && error.contains("br7"), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), named);
    }

    #[test]
    fn a_failure_names_the_path() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        fs::write(&file, "").unwrap();
        let error = write_conflist(&file.join("net.d"), DEFAULT_BRIDGE).unwrap_err().to_string();
        assert!(error.contains(file.to_str().unwrap()), "{error}");
        fs::create_dir_all(directory.path().join("net.d").join(CONFLIST_NAME)).unwrap();
        let error = write_conflist(&directory.path().join("net.d"), DEFAULT_BRIDGE)
            .unwrap_err()
            .to_string();
        assert!(error.contains(CONFLIST_NAME), "{error}");
    }
}
