use std::ffi::OsStr;
use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Output, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde_json::{Map, Value};

use super::error::{DELEGATE_UNUSABLE, Reported};
use super::{CniError, Command};

const LONGEST_QUOTE: usize = 1024;
/// Many pods at once wait for each other's leases. A kubelet gives up after two minutes.
const LIMIT: Duration = Duration::from_secs(60);

/// The plugin that does the work, found on disk.
#[derive(Debug)]
pub(super) struct Plugin {
    name: String,
    program: PathBuf,
    /// For a container other than that of this process's environment.
    container: Option<(String, String)>,
}

impl Plugin {
    /// Looks for the plugin in the folders of CNI_PATH.
    pub(super) fn find(name: &str, path: &OsStr) -> Result<Self, CniError> {
        let program = std::env::split_paths(path)
            .filter(|folder| !folder.as_os_str().is_empty())
            .map(|folder| folder.join(name))
            .find(|program| program.is_file())
            .ok_or_else(|| CniError::DelegateNotFound {
                name: name.to_owned(),
                path: path.to_string_lossy().into_owned(),
            })?;
        if is_this_program(&program) {
            let problem = format!("\"delegate.type\" is {name:?}, the plugin itself");
            return Err(CniError::Config(problem));
        }
        Ok(Self { name: name.to_owned(), program, container: None })
    }

    /// For this interface of this container, whose namespace is not known.
    pub(super) fn for_container(self, id: &str, interface: &str) -> Self {
        Self { container: Some((id.to_owned(), interface.to_owned())), ..self }
    }

    /// Attaches the container and gives the result as the delegate printed it.
    pub(super) fn add(&self, conf: &[u8]) -> Result<Vec<u8>, CniError> {
        let result = self.run(Command::Add, conf)?;
        match serde_json::from_slice::<Map<String, Value>>(&result) {
            Ok(_) => Ok(result),
            Err(_) => Err(CniError::DelegateResult { name: self.name.clone() }),
        }
    }

    /// Sees that the container is attached as it was.
    pub(super) fn check(&self, conf: &[u8]) -> Result<(), CniError> {
        self.run(Command::Check, conf).map(drop)
    }

    /// Detaches the container.
    pub(super) fn del(&self, conf: &[u8]) -> Result<(), CniError> {
        self.run(Command::Del, conf).map(drop)
    }

    // The other CNI_ variables are inherited.
    fn run(&self, command: Command, conf: &[u8]) -> Result<Vec<u8>, CniError> {
        let mut program = std::process::Command::new(&self.program);
        if let Some((id, interface)) = &self.container {
            program.env("CNI_CONTAINERID", id).env("CNI_IFNAME", interface).env_remove("CNI_NETNS");
        }
        program.env("CNI_COMMAND", command.as_str());
        let output = run_for(&mut program, conf, LIMIT)
            .map_err(|source| CniError::DelegateRun { program: self.program.clone(), source })?;
        if output.status.success() {
            return Ok(output.stdout);
        }
        let reported = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| Reported {
            code: DELEGATE_UNUSABLE,
            msg: output.status.to_string(),
            details: String::from_utf8_lossy(&output.stdout).chars().take(LONGEST_QUOTE).collect(),
        });
        Err(CniError::Delegate { name: self.name.clone(), reported })
    }
}

/// Runs a plugin for no longer than `limit`, with this on its standard input.
pub(super) fn run_for(
    program: &mut std::process::Command,
    input: &[u8],
    limit: Duration,
) -> io::Result<Output> {
    let child = program
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .process_group(0)
        .spawn()?;
    converse(child, input, limit)
}

// Writes from a thread of its own: a delegate may print before it has read everything, and
// neither side must wait for the other. Another ends what takes longer than `limit`.
fn converse(mut child: Child, input: &[u8], limit: Duration) -> io::Result<Output> {
    let stdin = child.stdin.take();
    let group = i32::try_from(child.id()).map(Pid::from_raw).map_err(io::Error::other)?;
    let (ended, wait) = mpsc::channel::<()>();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // A delegate that does not read its input says in its output why.
            let _ = stdin.map(|mut stdin| stdin.write_all(input));
        });
        let watchdog = scope.spawn(move || {
            let hangs = wait.recv_timeout(limit) == Err(RecvTimeoutError::Timeout);
            // With what it has started, which may hold its output open.
            hangs && killpg(group, Signal::SIGKILL).is_ok()
        });
        let output = child.wait_with_output();
        drop(ended);
        match watchdog.join() {
            Ok(true) => Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("did not end within {} s and was ended", limit.as_secs()),
            )),
            _ => output,
        }
    })
}

// By any name, this program as its own delegate would start itself for ever.
fn is_this_program(program: &Path) -> bool {
    match (fs::metadata(program), fs::metadata("/proc/self/exe")) {
        (Ok(theirs), Ok(ours)) => (theirs.dev(), theirs.ino()) == (ours.dev(), ours.ino()),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn shell(script: &str, limit: Duration) -> io::Result<Output> {
        let child = std::process::Command::new("sh")
            .args(["-c", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .process_group(0)
            .spawn()?;
        converse(child, b"input", limit)
    }

    #[test]
    fn a_delegate_that_hangs_is_ended_with_all_it_started() {
        let start = Instant::now();
        let error = shell("sleep 100 & sleep 100", Duration::from_secs(1)).unwrap_err();
        assert!(error.to_string().contains("within 1 s"), "{error}");
        assert!(start.elapsed() < Duration::from_secs(20));
        let output = shell("cat", Duration::from_secs(100)).unwrap();
        assert_eq!(output.stdout, b"input");
        assert!(start.elapsed() < Duration::from_secs(20));
    }
}
