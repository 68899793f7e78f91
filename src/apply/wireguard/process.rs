//! The processes of userspace devices: `gambeson tunnel`, which outlives the agent.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use gambeson_mesh::desired::LINK_ALIAS;
use gambeson_mesh::session::DeviceName;
use gambeson_tunnel::SOCKET_DIRECTORY;
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use tokio::io::AsyncReadExt as _;
use tokio::net::UnixStream;
use tokio::process::Command;
use tokio::time::{sleep, timeout};

use crate::apply::ApplyError;
use crate::supervisor::Supervisors;

/// A device takes this long to get ready at most.
const START: Duration = Duration::from_secs(10);
/// A process whose device is gone ends within this time, or is killed.
const END: Duration = Duration::from_secs(1);
const POLL: Duration = Duration::from_millis(10);

/// The configuration socket of a device.
pub(super) fn socket(device: DeviceName) -> PathBuf {
    Path::new(SOCKET_DIRECTORY).join(format!("{device}.sock"))
}

/// Who starts the process of a userspace device.
#[derive(Debug)]
pub(in crate::apply) enum Tunnels {
    /// This process, by this program.
    Own(PathBuf),
    /// A supervisor, which outlives the pod of this process.
    Supervised(Supervisors),
}

/// Has the device's process started, which outlives this one, and waits until it answers.
pub(in crate::apply) async fn start(
    tunnels: &Tunnels,
    device: DeviceName,
    mtu: u32,
) -> Result<(), ApplyError> {
    match tunnels {
        Tunnels::Own(program) => start_own(program, device, mtu).await,
        Tunnels::Supervised(supervisors) => supervisors
            .start(device, LINK_ALIAS, mtu)
            .await
            .map_err(|source| ApplyError::Supervisor { device, source }),
    }
}

async fn start_own(program: &Path, device: DeviceName, mtu: u32) -> Result<(), ApplyError> {
    let failed =
        |source| ApplyError::StartTunnel { device, program: program.display().to_string(), source };
    let mut child = Command::new(program)
        .args(["tunnel", device.as_str(), "--alias", LINK_ALIAS, "--mtu", &mtu.to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        // With a child of its own in it, until that one is ready.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)?;
    let group = child.id().and_then(|pid| i32::try_from(pid).ok());
    let mut message = Vec::new();
    let ended = async {
        if let Some(stderr) = &mut child.stderr {
            stderr.read_to_end(&mut message).await?;
        }
        child.wait().await
    };
    let Ok(status) = timeout(START, ended).await else {
        if let Some(Err(error)) = group.map(|group| killpg(Pid::from_raw(group), Signal::SIGKILL)) {
            tracing::warn!(%device, %error, "cannot kill a tunnel process that does not start");
        }
        return Err(ApplyError::TunnelHangs { device, seconds: START.as_secs() });
    };
    let status = status.map_err(failed)?;
    if status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&message);
    let message = message.trim().trim_start_matches("gambeson: ").to_owned();
    Err(ApplyError::Tunnel { device, status, message })
}

/// Whether another program serves the device than one that is started now would be.
pub(in crate::apply) async fn is_outdated(tunnels: &Tunnels, device: DeviceName) -> bool {
    match tunnels {
        Tunnels::Own(program) => {
            let Ok(stream) = UnixStream::connect(socket(device)).await else { return false };
            let pid = stream.peer_cred().ok().and_then(|peer| peer.pid());
            let running = pid.and_then(|pid| file_of(format!("/proc/{pid}/exe")));
            // What cannot be told is left alone.
            running.zip(file_of(program)).is_some_and(|(running, program)| running != program)
        }
        Tunnels::Supervised(supervisors) => supervisors.is_any_outdated().await,
    }
}

/// Which file it is, by device and inode.
fn file_of(path: impl AsRef<Path>) -> Option<(u64, u64)> {
    fs::metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

/// Waits until no process serves the device any more, so that a new one does not meet the
/// old one's socket and port. A process that does not end is killed.
pub(in crate::apply) async fn retire(tunnels: &Tunnels, device: DeviceName) {
    if timeout(END, gone(device)).await.is_ok() {
        return;
    }
    if let Tunnels::Supervised(supervisors) = tunnels {
        // A process of another pod is not to be seen from here.
        tracing::warn!(%device, "a tunnel process without its device does not end; having it ended");
        if let Err(error) = supervisors.end(device).await {
            tracing::warn!(%device, %error, "cannot have the tunnel process ended");
        }
    }
    // One that hangs does not say who it is: its queue of connections may be full.
    for pid in servers(&socket(device)) {
        tracing::warn!(%device, pid, "a tunnel process without its device does not end; killing it");
        if let Err(error) = kill(Pid::from_raw(pid), Signal::SIGKILL) {
            tracing::warn!(%device, pid, %error, "cannot kill the tunnel process");
        }
    }
    if timeout(END, gone(device)).await.is_err() {
        tracing::warn!(%device, "somebody still serves the device that is gone");
    }
}

/// Waits until nobody accepts connections for a device. One that hangs still does, or has a
/// full queue of them.
async fn gone(device: DeviceName) {
    loop {
        match UnixStream::connect(socket(device)).await {
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(_) => return,
        }
        sleep(POLL).await;
    }
}

/// The processes that have a listening socket at this path open, init and this one excepted.
fn servers(path: &Path) -> Vec<i32> {
    let table = fs::read_to_string("/proc/thread-self/net/unix").unwrap_or_default();
    let links: Vec<PathBuf> = table
        .lines()
        .filter_map(|line| listening_at(line, path))
        .map(|inode| format!("socket:[{inode}]").into())
        .collect();
    let has_it = |pid: &i32| {
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        let mut targets = descriptors.filter_map(|entry| fs::read_link(entry.path()).ok());
        targets.any(|target| links.contains(&target))
    };
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    pids.filter(|pid| *pid > 1 && *pid != own).filter(has_it).collect()
}

/// The inode in a line of /proc/net/unix, where it is of a listening socket at this path.
fn listening_at<'a>(line: &'a str, path: &Path) -> Option<&'a str> {
    /// `__SO_ACCEPTCON` of linux/net.h.
    const LISTENING: u32 = 0x10000;
    // Num RefCount Protocol Flags Type St Inode Path
    let mut fields = line.split_ascii_whitespace();
    let flags = u32::from_str_radix(fields.nth(3)?, 16).ok()?;
    let inode = fields.nth(2)?;
    let at = Path::new(fields.next()?);
    (flags & LISTENING != 0 && at == path).then_some(inode)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listening_socket_is_found_in_the_kernels_table() {
        let path = Path::new("/var/run/wireguard/gambeson0.sock");
        let line = "0000000000000000: 00000002 00000000 00010000 0001 01 250919 \
                    /var/run/wireguard/gambeson0.sock";
        assert_eq!(listening_at(line, path), Some("250919"));
        assert_eq!(listening_at(&line.replace("00010000", "00000000"), path), None);
        assert_eq!(listening_at(line, Path::new("/var/run/wireguard/gambeson1.sock")), None);
        for cut in 0..line.len() {
            assert_eq!(listening_at(&line[..cut], path), None);
        }
    }

    #[test]
    fn the_process_that_listens_is_not_this_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.sock");
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert_eq!(servers(&path), Vec::<i32>::new());
    }
}
