//! Processes by number and start time, so that a number that was given to somebody else in
//! the meantime is never signalled.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::wait::until;

/// How long a process gets to end after each signal.
const GRACE: Duration = Duration::from_secs(5);

/// A process, for as long as it lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its number.
    pub pid: i32,
    /// When it started, in clock ticks since boot (field 22 of `/proc/<pid>/stat`).
    pub started: u64,
}

impl ProcessId {
    /// The process that has this number now.
    pub fn current(pid: i32) -> Option<Self> {
        let stat = Stat::read(pid)?;
        stat.alive.then_some(Self { pid, started: stat.started })
    }

    /// Whether it still runs. A zombie does not.
    pub fn is_alive(self) -> bool {
        Self::current(self.pid) == Some(self)
    }

    /// Sends a signal, if the process still runs.
    pub fn signal(self, signal: Signal) {
        if self.is_alive() {
            // An error only says that it ended in between.
            let _ = kill(Pid::from_raw(self.pid), signal);
        }
    }
}

/// Ends processes, with SIGKILL those that do not end on this signal. False when one of them
/// would not end at all.
pub(super) fn end(processes: &[ProcessId], signal: Signal) -> bool {
    let ended = || processes.iter().all(|process| !process.is_alive());
    for signal in [signal, Signal::SIGKILL] {
        processes.iter().for_each(|process| process.signal(signal));
        if until(Instant::now() + GRACE, || ended().then_some(())).is_some() {
            return true;
        }
    }
    ended()
}

/// Kills what is found until nothing is. One that was just about to start another leaves that
/// one for the next round. False when one of them would not end.
pub(super) fn kill_all(find: impl Fn() -> Vec<ProcessId>) -> bool {
    loop {
        let processes = find();
        if processes.is_empty() {
            return true;
        }
        if !end(&processes, Signal::SIGKILL) {
            return false;
        }
    }
}

/// All processes in the network namespaces with these identities.
pub(super) fn in_namespaces(identities: &[(u64, u64)]) -> Vec<ProcessId> {
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid: &i32| {
            fs::metadata(format!("/proc/{pid}/ns/net"))
                .is_ok_and(|metadata| identities.contains(&(metadata.dev(), metadata.ino())))
        })
        .filter_map(ProcessId::current)
        .collect()
}

/// All processes whose command line has these arguments after the program, in this order.
pub(super) fn with_arguments(arguments: &[&str]) -> Vec<ProcessId> {
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid: &i32| {
            let Ok(line) = fs::read(format!("/proc/{pid}/cmdline")) else { return false };
            let mut words = line.split(|byte| *byte == 0).skip(1);
            arguments.iter().all(|argument| words.next() == Some(argument.as_bytes()))
        })
        .filter_map(ProcessId::current)
        .collect()
}

struct Stat {
    alive: bool,
    started: u64,
}

impl Stat {
    fn read(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name in parentheses may hold anything; fields count from behind it.
        let (_, rest) = stat.rsplit_once(") ")?;
        let fields: Vec<&str> = rest.split(' ').collect();
        let alive = match *fields.first()? {
            "X" => false,
            // The first thread has ended. Others may still be on their way, and until they
            // have ended too, the process has its sockets and files.
            "Z" => fields.get(17)?.parse::<u32>().ok()? > 1,
            _ => true,
        };
        Some(Self { alive, started: fields.get(19)?.parse().ok()? })
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_process_is_known_by_its_start_and_can_be_ended() {
        let mut child = Command::new("sleep").arg("60").stdin(Stdio::null()).spawn().unwrap();
        let process = ProcessId::current(child.id().try_into().unwrap()).unwrap();
        assert!(process.is_alive());
        let somebody_else = ProcessId { started: process.started + 1, ..process };
        assert!(!somebody_else.is_alive());
        assert!(end(&[process, somebody_else], Signal::SIGTERM));
        assert!(!process.is_alive());
        child.wait().unwrap();
    }

    #[test]
    fn processes_are_found_by_their_arguments() {
        let seconds = format!("60.{}", std::process::id());
        let mut child = Command::new("sleep").arg(&seconds).spawn().unwrap();
        let pid: i32 = child.id().try_into().unwrap();
        // The command line is that of the parent until the child has become the program.
        let found = until(Instant::now() + GRACE, || {
            with_arguments(&[&seconds]).iter().any(|process| process.pid == pid).then_some(())
        });
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(found.is_some());
    }
}
