//! Entering network namespaces. A thread of its own enters, so that the caller never has to
//! find its way back.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::thread;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

use super::layout::NETNS_ROOT;

/// Why a namespace could not be entered.
#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    /// The namespace has no name below `/run/netns`.
    #[error("cannot open the network namespace {name}")]
    Open {
        /// Its name.
        name: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The kernel refused.
    #[error("cannot enter the network namespace {name}; the lab needs root")]
    Enter {
        /// Its name.
        name: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A mount of the node's private view failed.
    #[error("cannot mount {target} for {name}")]
    Mount {
        /// Name of the network namespace.
        name: String,
        /// Where the mount goes.
        target: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// No thread could be started.
    #[error("cannot start a thread for {name}")]
    Thread {
        /// Name of the network namespace.
        name: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A program could not be started.
    #[error("cannot run {program} in {name}")]
    Spawn {
        /// Name of the network namespace.
        name: String,
        /// The program.
        program: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// A named network namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// The namespace of this name, whether it exists or not.
    pub fn named(name: impl Into<String>) -> Self {
        Self { name: name.into() }
    }

    /// Its name, as `ip netns` shows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its file below `/run/netns`.
    pub fn path(&self) -> PathBuf {
        Path::new(NETNS_ROOT).join(&self.name)
    }

    /// Device and inode, which identify a namespace; `None` when it does not exist.
    pub fn identity(&self) -> Option<(u64, u64)> {
        let metadata = fs::metadata(self.path()).ok()?;
        Some((metadata.dev(), metadata.ino()))
    }

    /// Runs `work` in the namespace, on a thread of its own. Sockets that it makes stay in
    /// the namespace wherever they are used.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, NetnsError> {
        on_thread(&self.name, || self.enter().map(|()| work()))?
    }

    /// Moves the calling thread into the namespace for good.
    pub fn enter(&self) -> Result<(), NetnsError> {
        let file = File::open(self.path())
            .map_err(|source| NetnsError::Open { name: self.name.clone(), source })?;
        setns(file, CloneFlags::CLONE_NEWNET)
            .map_err(|errno| NetnsError::Enter { name: self.name.clone(), source: errno.into() })
    }
}

/// What a program on a node or in a pod sees: the network namespace, and a mount namespace
/// in which a node's own folders stand for `/run` and `/var/lib`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Environment {
    netns: Netns,
    /// Holds `run` and `var-lib`. `None` in a pod.
    folder: Option<PathBuf>,
}

impl Environment {
    /// Of a node.
    pub fn node(netns: Netns, folder: PathBuf) -> Self {
        Self { netns, folder: Some(folder) }
    }

    /// Of a pod.
    pub fn pod(netns: Netns) -> Self {
        Self { netns, folder: None }
    }

    /// Its network namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Where a path on the node is found from outside.
    pub fn host_path(&self, path: &Path) -> PathBuf {
        let Some(folder) = &self.folder else { return path.to_owned() };
        for (mounted, own) in [("/run", "run"), ("/var/run", "run"), ("/var/lib", "var-lib")] {
            if let Ok(rest) = path.strip_prefix(mounted) {
                return folder.join(own).join(rest);
            }
        }
        path.to_owned()
    }

    /// Starts a program there.
    pub fn spawn(&self, command: &mut Command) -> Result<Child, NetnsError> {
        let program = command.get_program().to_string_lossy().into_owned();
        let name = self.netns.name.clone();
        on_thread(&self.netns.name, || {
            self.enter()?;
            command.spawn().map_err(|source| NetnsError::Spawn { name, program, source })
        })?
    }

    /// Becomes a program there. Returns only when that fails.
    pub fn exec(&self, command: &mut Command) -> NetnsError {
        if let Err(error) = self.enter() {
            return error;
        }
        NetnsError::Spawn {
            name: self.netns.name.clone(),
            program: command.get_program().to_string_lossy().into_owned(),
            source: command.exec(),
        }
    }

    /// Moves the calling thread, and what it starts, there for good.
    fn enter(&self) -> Result<(), NetnsError> {
        self.netns.enter()?;
        unshare(CloneFlags::CLONE_NEWNS).map_err(|errno| NetnsError::Enter {
            name: self.netns.name.clone(),
            source: errno.into(),
        })?;
        // Nothing mounted here shows outside; namespaces made outside later show here.
        self.mount(None, Path::new("/"), MsFlags::MS_SLAVE | MsFlags::MS_REC)?;
        if let Some(folder) = &self.folder {
            let (run, var_lib) = (folder.join("run"), folder.join("var-lib"));
            let bind = MsFlags::MS_BIND | MsFlags::MS_REC;
            self.mount(Some(Path::new(NETNS_ROOT)), &run.join("netns"), bind)?;
            self.mount(Some(&var_lib), Path::new("/var/lib"), bind)?;
            self.mount(Some(&run), Path::new("/run"), bind)?;
        }
        self.mount_sysfs()
    }

    /// `/sys` shows the devices of the namespace it was mounted in.
    fn mount_sysfs(&self) -> Result<(), NetnsError> {
        let target = Path::new("/sys");
        umount2(target, MntFlags::MNT_DETACH)
            .and_then(|()| {
                mount(Some("sysfs"), target, Some("sysfs"), MsFlags::empty(), None::<&str>)
            })
            .map_err(|errno| self.mount_error(target, errno))
    }

    fn mount(&self, from: Option<&Path>, to: &Path, flags: MsFlags) -> Result<(), NetnsError> {
        mount(from, to, None::<&str>, flags, None::<&str>)
            .map_err(|errno| self.mount_error(to, errno))
    }

    fn mount_error(&self, target: &Path, errno: nix::Error) -> NetnsError {
        NetnsError::Mount {
            name: self.netns.name.clone(),
            target: target.to_owned(),
            source: errno.into(),
        }
    }
}

/// Runs `work` on a thread of its own, whose namespaces may change. A panic goes on in the
/// caller.
fn on_thread<T: Send>(name: &str, work: impl FnOnce() -> T + Send) -> Result<T, NetnsError> {
    thread::scope(|scope| {
        let handle = thread::Builder::new()
            .name(format!("in-{name}"))
            .spawn_scoped(scope, work)
            .map_err(|source| NetnsError::Thread { name: name.to_owned(), source })?;
        handle.join().map_err(|panic| std::panic::resume_unwind(panic))
    })
}
