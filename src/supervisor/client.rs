//! The agent's side.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use gambeson_mesh::session::DeviceName;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::protocol::{LONGEST, PATIENCE, Reply, Request, START, sockets};

/// A supervisor says at once what it serves.
const LIST: Duration = Duration::from_secs(1);

/// The supervisors of this node.
#[derive(Debug, Clone)]
pub struct Supervisors {
    dir: PathBuf,
}

/// Why a supervisor did not do it.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// The folder cannot be read.
    #[error("cannot list the tunnel supervisors in {}", dir.display())]
    List {
        /// The folder.
        dir: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// There is none.
    #[error(
        "no tunnel supervisor answers in {}: see whether the DaemonSet gambeson-tunnel has a pod \
         on this node", .0.display()
    )]
    None(PathBuf),
    /// The answer did not come, or is none.
    #[error("the tunnel supervisor on {} gave no answer", socket.display())]
    NoAnswer {
        /// Its socket.
        socket: PathBuf,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
    /// It could not.
    #[error("the tunnel supervisor on {} says: {message}", socket.display())]
    Refused {
        /// Its socket.
        socket: PathBuf,
        /// What it says.
        message: String,
    },
}

impl Supervisors {
    /// Those with a socket in this folder.
    pub fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Has the newest make a device and serve it.
    ///
    /// # Errors
    /// [`AskError`], when there is none or it cannot.
    pub async fn start(&self, device: DeviceName, alias: &str, mtu: u32) -> Result<(), AskError> {
        let request = Request::Start { device, alias: alias.to_owned(), mtu };
        for socket in self.sockets()? {
            if let Ok(stream) = UnixStream::connect(&socket).await {
                return ask(&socket, stream, &request).await.map(drop);
            }
        }
        Err(AskError::None(self.dir.clone()))
    }

    /// Has every one end its process of this device, if it has one.
    ///
    /// # Errors
    /// [`AskError`] of the last that did not.
    pub async fn end(&self, device: DeviceName) -> Result<(), AskError> {
        let mut failed = None;
        for socket in self.sockets()? {
            if let Ok(stream) = UnixStream::connect(&socket).await {
                failed = ask(&socket, stream, &Request::End { device }).await.err().or(failed);
            }
        }
        failed.map_or(Ok(()), Err)
    }

    /// Whether any but the newest that answers serves a device. One that does not answer is not
    /// waited for.
    pub async fn is_any_outdated(&self) -> bool {
        let mut newest = None;
        for socket in self.sockets().unwrap_or_default() {
            let list = async {
                let stream = UnixStream::connect(&socket).await?;
                converse(stream, &Request::List).await
            };
            match timeout(LIST, list).await {
                Ok(Ok(_)) if newest.is_none() => newest = Some(socket),
                Ok(Ok(reply)) if !reply.devices.is_empty() => return true,
                _ => {}
            }
        }
        false
    }

    fn sockets(&self) -> Result<Vec<PathBuf>, AskError> {
        sockets(&self.dir).map_err(|source| AskError::List { dir: self.dir.clone(), source })
    }
}

async fn ask(socket: &Path, stream: UnixStream, request: &Request) -> Result<Reply, AskError> {
    let socket = socket.to_owned();
    let answer = match timeout(START + PATIENCE, converse(stream, request)).await {
        Ok(answer) => answer,
        Err(elapsed) => Err(elapsed.into()),
    };
    match answer {
        Err(source) => Err(AskError::NoAnswer { socket, source }),
        Ok(Reply { error: Some(message), .. }) => Err(AskError::Refused { socket, message }),
        Ok(reply) => Ok(reply),
    }
}

async fn converse(mut stream: UnixStream, request: &Request) -> io::Result<Reply> {
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line).await?;
    let mut answer = Vec::new();
    stream.take(LONGEST).read_to_end(&mut answer).await?;
    Ok(serde_json::from_slice(&answer)?)
}
