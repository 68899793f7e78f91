//! The side of the pod `gambeson-tunnel`: one process for each device, as children, whose log
//! is its own.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use gambeson_mesh::session::DeviceName;
use gambeson_tunnel::SOCKET_DIRECTORY;
use tracing::{info, warn};

use crate::exit::Exit;

use super::protocol::{LONGEST, PATIENCE, Reply, Request, START, sockets};
use crate::files;

const POLL: Duration = Duration::from_millis(10);

/// A supervisor that cannot do its work.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Its socket cannot be made.
    #[error("cannot make the socket {}", path.display())]
    Bind {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Nobody can reach it any more.
    #[error("cannot accept connections")]
    Accept(#[source] io::Error),
    /// It is not there.
    #[error("no supervisor {name} answers in {}", dir.display())]
    NotThere {
        /// Its name.
        name: String,
        /// The folder of the sockets.
        dir: PathBuf,
    },
    /// An older one is not done yet.
    #[error("{device} is still served by the older supervisor on {}", socket.display())]
    Older {
        /// A device.
        device: DeviceName,
        /// The other's socket.
        socket: PathBuf,
    },
}

/// Serves requests until the process is ended, with `PROGRAM tunnel` for each device.
///
/// # Errors
/// [`ServeError`]; it returns for no other reason.
pub fn serve(dir: &Path, name: &str, program: &Path) -> Result<(), ServeError> {
    let listener = bind(dir, name)?;
    let mut supervisor = Supervisor { program: program.to_owned(), devices: BTreeMap::new() };
    loop {
        let (stream, _) = listener.accept().map_err(ServeError::Accept)?;
        if let Err(error) = supervisor.converse(stream) {
            warn!(%error, "a request without an answer");
        }
    }
}

/// Whether the supervisor of this name runs, and no older one serves a device any more: then
/// the older ones may end.
///
/// # Errors
/// Why not.
pub fn check(dir: &Path, name: &str) -> Result<(), ServeError> {
    let not_there = || ServeError::NotThere { name: name.to_owned(), dir: dir.to_owned() };
    let all = sockets(dir).map_err(|_| not_there())?;
    let ending = format!("-{name}.sock");
    let is_own = |path: &PathBuf| path.to_string_lossy().ends_with(&ending);
    let own = all.iter().position(is_own).ok_or_else(not_there)?;
    list(&all[own]).map_err(|_| not_there())?;
    for socket in &all[own + 1..] {
        // One that does not answer serves nobody, or nobody can know.
        if let Some(device) = list(socket).unwrap_or_default().first() {
            return Err(ServeError::Older { device: *device, socket: socket.clone() });
        }
    }
    Ok(())
}

fn list(socket: &Path) -> io::Result<Vec<DeviceName>> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(&[&serde_json::to_vec(&Request::List)?[..], b"\n"].concat())?;
    let mut answer = Vec::new();
    stream.take(LONGEST).read_to_end(&mut answer)?;
    Ok(serde_json::from_slice::<Reply>(&answer)?.devices)
}

/// Makes this one's socket, and takes away those of supervisors that are gone.
fn bind(dir: &Path, name: &str) -> Result<UnixListener, ServeError> {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let path = dir.join(format!("{:020}-{name}.sock", since_epoch.as_millis()));
    let bound = || {
        files::create_directory(dir, 0o700)?;
        for socket in sockets(dir)? {
            let gone = UnixStream::connect(&socket).err();
            if gone.is_some_and(|error| error.kind() == io::ErrorKind::ConnectionRefused) {
                let _ = fs::remove_file(socket);
            }
        }
        let listener = UnixListener::bind(&path)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
        Ok(listener)
    };
    let listener = bound().map_err(|source| ServeError::Bind { path: path.clone(), source })?;
    info!(socket = %path.display(), "serving");
    Ok(listener)
}

struct Supervisor {
    program: PathBuf,
    devices: BTreeMap<DeviceName, Child>,
}

impl Supervisor {
    fn converse(&mut self, mut stream: UnixStream) -> io::Result<()> {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut line = String::new();
        BufReader::new((&stream).take(LONGEST)).read_line(&mut line)?;
        let error = match serde_json::from_str(&line) {
            Ok(request) => self.execute(request).err(),
            Err(error) => Some(format!("not a request: {error}")),
        };
        let reply = Reply { error, devices: self.devices.keys().copied().collect() };
        stream.write_all(&serde_json::to_vec(&reply)?)
    }

    fn execute(&mut self, request: Request) -> Result<(), String> {
        // A process ends with its device.
        self.devices.retain(|_, child| matches!(child.try_wait(), Ok(None)));
        match request {
            Request::List => Ok(()),
            Request::End { device } => {
                self.end(device);
                Ok(())
            }
            Request::Start { device, alias, mtu } => {
                // What it asks for anew serves it no more.
                self.end(device);
                let child = self.start(device, &alias, mtu)?;
                info!(%device, pid = child.id(), "serving a device");
                self.devices.insert(device, child);
                Ok(())
            }
        }
    }

    fn end(&mut self, device: DeviceName) {
        let Some(mut child) = self.devices.remove(&device) else { return };
        info!(%device, pid = child.id(), "ending the process of a device");
        if let Err(error) = child.kill().and_then(|()| child.wait()) {
            warn!(%device, %error, "cannot end the process");
        }
    }

    /// Starts the process of a device and waits until it answers.
    fn start(&self, device: DeviceName, alias: &str, mtu: u32) -> Result<Child, String> {
        let mut child = Command::new(&self.program)
            .args(["tunnel", device.as_str(), "--foreground", "--alias", alias])
            .args(["--mtu", &mtu.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| format!("cannot run {}: {error}", self.program.display()))?;
        let last = child.stderr.take().map(forward).unwrap_or_default();
        let end = Instant::now() + START;
        loop {
            match child.try_wait() {
                Ok(None) if answers(device) => return Ok(child),
                Ok(None) if Instant::now() < end => thread::sleep(POLL),
                Ok(None) => {
                    let _ = child.kill().and_then(|()| child.wait());
                    return Err(format!("{device} was not ready within {} s", START.as_secs()));
                }
                Ok(Some(status)) => return Err(why(device, status, &last)),
                Err(error) => return Err(format!("cannot wait for {device}: {error}")),
            }
        }
    }
}

/// A last line that the process wrote.
type LastLine = Arc<Mutex<String>>;

/// Passes a process's log on, and keeps the last line.
fn forward(stderr: ChildStderr) -> LastLine {
    let last = LastLine::default();
    let keep = Arc::clone(&last);
    thread::spawn(move || {
        for line in BufReader::new(stderr).lines().map_while(Result::ok) {
            eprintln!("{line}");
            *keep.lock().unwrap_or_else(PoisonError::into_inner) = line;
        }
    });
    last
}

fn why(device: DeviceName, status: ExitStatus, last: &LastLine) -> String {
    // What it wrote before it ended may still be on its way.
    thread::sleep(POLL);
    let line = last.lock().unwrap_or_else(PoisonError::into_inner);
    let line = line.trim_start_matches("gambeson: ");
    let codes = [Exit::NoTun, Exit::NoPermission].map(|exit| exit as i32);
    let remedy = if status.code().is_some_and(|code| codes.contains(&code)) {
        "; a container gets no /dev/net/tun from runc 1.2.0 to 1.2.3 and crun before 1.20: update \
         it, or set tunnel.privileged of the chart"
    } else {
        ""
    };
    format!("the process of {device} ended ({status}): {line}{remedy}")
}

fn answers(device: DeviceName) -> bool {
    UnixStream::connect(Path::new(SOCKET_DIRECTORY).join(format!("{device}.sock"))).is_ok()
}
