//! What `gambeson status` shows: the types of its JSON, the Unix socket that the agent
//! serves them on, and the table a person reads.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use comfy_table::{Table, presets};
use gambeson_keys::{Generation, PublicKey};
use gambeson_mesh::NodeName;
use gambeson_mesh::desired::Implementation;
use gambeson_mesh::node::Transport;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use tokio::io::AsyncWriteExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;
use tracing::debug;

use crate::rounds::Rounds;

mod rotation;

pub use rotation::{RotationStatus, WaitingPeer};

/// Version of the JSON document. It grows when a field changes its meaning or goes.
pub const SCHEMA: u32 = 1;
/// How long a reader may take to accept the answer.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a question waits for fresh values before it is answered with the last ones.
const FRESH_TIMEOUT: Duration = Duration::from_secs(2);

/// The state of one node's agent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Name of this Node, once known.
    pub node: NodeName,
    /// Who implements WireGuard here, once decided.
    pub implementation: Option<String>,
    /// Generation of this node's key in use.
    pub generation: Option<u64>,
    /// This node's public key in use, in base64.
    pub public_key: Option<String>,
    /// The replacement of this node's key, while it is under way.
    pub rotation: Option<RotationStatus>,
    /// Inner MTU of this node in bytes.
    pub mtu: Option<u32>,
    /// The underlay interface.
    pub underlay: Option<UnderlayStatus>,
    /// Peers in use, by name.
    pub peers: Vec<PeerStatus>,
    /// Nodes that are refused, by name.
    pub refused: Vec<RefusedStatus>,
    /// Packets that the guard stopped.
    pub guard: GuardStatus,
    /// Whether the API server keeps each agent to its own Node.
    pub admission: Admission,
    /// Whether it has to, for this agent to be ready.
    pub admission_required: bool,
    /// Whether pods can be started: guard and subnet.env are in place.
    pub ready: bool,
    /// What the agent waits for before it can do anything.
    pub waiting: Option<String>,
    /// For how many seconds the agent's loop has not gone round, where that is too long.
    pub hangs_for_seconds: Option<u64>,
    /// What is wrong at the moment.
    pub errors: Vec<String>,
    /// What somebody should correct, though everything works.
    pub warnings: Vec<String>,
}

/// The underlay interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnderlayStatus {
    /// Its name.
    pub interface: String,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Addresses that other nodes send to.
    pub endpoints: Vec<IpAddr>,
}

/// One peer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PeerStatus {
    /// Its Node's name.
    pub name: NodeName,
    /// Its pod CIDRs.
    pub pod_cidrs: Vec<IpNet>,
    /// Where packets to it go now.
    pub endpoint: Option<SocketAddr>,
    /// `wireguard-kernel` or `wireguard-userspace`: how this node sends to it.
    pub transport: String,
    /// The device that carries it.
    pub device: String,
    /// Generation of its key in use.
    pub key_generation: u64,
    /// Seconds since the last completed handshake; `null` when there was none.
    pub handshake_age_seconds: Option<u64>,
    /// Bytes received from it.
    pub rx_bytes: u64,
    /// Bytes sent to it.
    pub tx_bytes: u64,
    /// Largest packet that fits to it, in bytes.
    pub mtu: u32,
}

/// A Node that is refused, or whose newest state is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusedStatus {
    /// Its name.
    pub name: NodeName,
    /// What is wrong with it.
    pub reason: String,
    /// Whether its last good state is still in use.
    pub kept: bool,
}

/// The guard, and the packets that were about to leave, or arrived, in clear.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuardStatus {
    /// When its rules were last seen to be exactly what they have to be, in seconds since the
    /// Unix epoch; `null` before the first time.
    pub seen_whole: Option<u64>,
    /// Packets stopped on their way out.
    pub out_packets: u64,
    /// Their bytes.
    pub out_bytes: u64,
    /// Packets stopped on their way in.
    pub in_packets: u64,
    /// Their bytes.
    pub in_bytes: u64,
}

/// Whether the API server keeps each agent to its own Node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Admission {
    /// It has not answered yet.
    #[default]
    Unknown,
    /// There is no other Node to keep this agent from.
    Alone,
    /// It refused to let this agent write on another Node.
    Enforced,
    /// It would have let it.
    Missing,
}

impl Admission {
    /// What is wrong when it is [`Self::Missing`], and what helps.
    pub const MISSING: &str = "the API server lets this agent write on other Nodes, so that one \
        node that is taken over can redirect the traffic of all: apply the admission policies of \
        the chart (admission.enabled) or of deploy/gambeson.yaml";
}

impl fmt::Display for Admission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unknown => "not asked yet",
            Self::Alone => "no other Node",
            Self::Enforced => "enforced",
            Self::Missing => "missing",
        })
    }
}

impl PeerStatus {
    /// Whether nobody on the underlay can read what pods send to it.
    pub fn is_encrypted(&self) -> bool {
        self.transport.starts_with("wireguard")
    }
}

/// How this node sends to a peer, as [`PeerStatus::transport`] names it.
pub fn transport_name(transport: Transport, implementation: Implementation) -> &'static str {
    match (transport, implementation) {
        (Transport::Wireguard, Implementation::Kernel) => "wireguard-kernel",
        (Transport::Wireguard, Implementation::Userspace) => "wireguard-userspace",
        (Transport::HostGw, _) => "host-gw",
        (Transport::Vxlan, _) => "vxlan",
    }
}

impl Status {
    /// Of an agent that knows nothing yet.
    pub fn starting(node: &str) -> Self {
        Self {
            schema: SCHEMA,
            node: node.to_owned(),
            implementation: None,
            generation: None,
            public_key: None,
            rotation: None,
            mtu: None,
            underlay: None,
            peers: Vec::new(),
            refused: Vec::new(),
            guard: GuardStatus::default(),
            admission: Admission::default(),
            admission_required: false,
            ready: false,
            waiting: None,
            hangs_for_seconds: None,
            errors: Vec::new(),
            warnings: Vec::new(),
        }
    }

    /// Why the agent should be started anew, if so.
    pub fn unhealthy(&self) -> Option<String> {
        let seconds = self.hangs_for_seconds?;
        Some(format!("the reconcile loop has not gone round for {seconds} s"))
    }

    /// Why no pod should be started on this node, if so.
    pub fn unready(&self) -> Option<String> {
        let not_yet = || {
            (!self.ready).then(|| match &self.waiting {
                Some(waiting) => format!("waiting: {waiting}"),
                None => "the guard and subnet.env are not in place yet".to_owned(),
            })
        };
        let admission = || {
            let missing = matches!(self.admission, Admission::Unknown | Admission::Missing);
            (self.admission_required && missing).then(|| match self.admission {
                Admission::Missing => format!("--require-admission: {}", Admission::MISSING),
                other => format!("--require-admission: {other}"),
            })
        };
        self.unhealthy().or_else(not_yet).or_else(admission)
    }

    /// With the key this node uses.
    pub fn set_key(&mut self, generation: Generation, key: PublicKey) {
        self.generation = Some(generation.number());
        self.public_key = Some(key.to_string());
    }
}

/// Gives the agent's status, as fresh as it can be had.
#[derive(Debug, Clone)]
pub struct Source {
    last: watch::Receiver<Status>,
    questions: mpsc::Sender<oneshot::Sender<()>>,
    rounds: Rounds,
}

impl Source {
    /// Reads `last`, after having asked through `questions` for it to be renewed, and says when
    /// nobody renews it because the loop hangs.
    pub fn new(
        last: watch::Receiver<Status>,
        questions: mpsc::Sender<oneshot::Sender<()>>,
        rounds: Rounds,
    ) -> Self {
        Self { last, questions, rounds }
    }

    /// The status after a fresh look at the kernel, or the last one where that takes long.
    pub async fn fresh(&self) -> Status {
        let (answer, answered) = oneshot::channel();
        if self.questions.try_send(answer).is_ok() {
            // Late or lost: the last status is the answer then.
            let _ = timeout(FRESH_TIMEOUT, answered).await;
        }
        self.last()
    }

    /// The last status.
    pub fn last(&self) -> Status {
        let hangs_for_seconds = self.rounds.hangs().map(|since| since.as_secs());
        Status { hangs_for_seconds, ..self.last.borrow().clone() }
    }
}

/// Why the status socket cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another agent answers on it.
    #[error(
        "another gambeson agent answers on {}; stop it first, or give --socket another path",
        .0.display()
    )]
    InUse(PathBuf),
    /// It cannot be made.
    #[error("cannot make the status socket {}", path.display())]
    Bind {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Makes the socket, in place of one that a former agent left behind.
///
/// # Errors
/// [`SocketError`], when it cannot be made or another agent answers on it.
pub async fn bind(path: &Path) -> Result<UnixListener, SocketError> {
    let failed = |source| SocketError::Bind { path: path.to_owned(), source };
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(failed)?;
    }
    match UnixStream::connect(path).await {
        Ok(_) => return Err(SocketError::InUse(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(failed)?;
        }
        Err(error) => return Err(failed(error)),
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    Ok(listener)
}

/// Answers every connection with one JSON document, for ever.
pub async fn serve(listener: UnixListener, source: Source) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let source = source.clone();
                tokio::spawn(async move {
                    if let Err(error) = answer(stream, &source).await {
                        debug!(%error, "a status reader went away");
                    }
                });
            }
            Err(error) => {
                debug!(%error, "cannot accept on the status socket");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn answer(mut stream: UnixStream, source: &Source) -> io::Result<()> {
    let mut document = serde_json::to_vec(&source.fresh().await)?;
    document.push(b'\n');
    timeout(WRITE_TIMEOUT, stream.write_all(&document)).await??;
    stream.shutdown().await
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.summary(f)?;
        if !self.peers.is_empty() {
            writeln!(f, "\n{}", self.peer_table())?;
        }
        if !self.refused.is_empty() {
            writeln!(f, "\nRefused:")?;
            for refused in &self.refused {
                let kept = if refused.kept { " (its last good state stays in use)" } else { "" };
                writeln!(f, "  {}: {}{kept}", refused.name, refused.reason)?;
            }
        }
        for (heading, lines) in [("Errors", &self.errors), ("Warnings", &self.warnings)] {
            if !lines.is_empty() {
                writeln!(f, "\n{heading}:")?;
            }
            for line in lines {
                writeln!(f, "  {line}")?;
            }
        }
        Ok(())
    }
}

impl Status {
    fn summary(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match (&self.waiting, self.unready()) {
            (Some(waiting), _) => format!("waiting: {waiting}"),
            (None, Some(why)) => format!("not ready: {why}"),
            (None, None) => "ready".to_owned(),
        };
        let unknown = || "-".to_owned();
        writeln!(f, "Node            {}", self.node)?;
        writeln!(f, "State           {state}")?;
        let implementation = self.implementation.clone().unwrap_or_else(unknown);
        writeln!(f, "WireGuard       {implementation}")?;
        let key = self.public_key.clone().unwrap_or_else(unknown);
        match self.generation {
            Some(generation) => writeln!(f, "Public key      {key} (generation {generation})")?,
            None => writeln!(f, "Public key      {key}")?,
        }
        if let Some(rotation) = &self.rotation {
            writeln!(f, "Key rotation    {rotation}")?;
        }
        let mtu = self.mtu.map_or_else(unknown, |mtu| mtu.to_string());
        writeln!(f, "Pod MTU         {mtu}")?;
        if let Some(underlay) = &self.underlay {
            let endpoints: Vec<_> = underlay.endpoints.iter().map(IpAddr::to_string).collect();
            let (name, mtu) = (&underlay.interface, underlay.mtu);
            writeln!(f, "Underlay        {name} (MTU {mtu}), {}", endpoints.join(", "))?;
        }
        let GuardStatus { seen_whole, out_packets, in_packets, .. } = self.guard;
        let whole = match seen_whole {
            Some(time) => format!("whole {}", age(seconds_since(time))),
            None => "not seen whole yet".to_owned(),
        };
        writeln!(
            f,
            "Guard           {whole}, {out_packets} packets stopped going out, {in_packets} coming in"
        )?;
        writeln!(f, "Admission       {}", self.admission)?;
        writeln!(f, "Peers           {} in use, {} refused", self.peers.len(), self.refused.len())
    }

    fn peer_table(&self) -> Table {
        let mut table = Table::new();
        table.load_style(presets::NOTHING).set_header([
            "PEER",
            "POD CIDRS",
            "ENDPOINT",
            "TRANSPORT",
            "DEVICE",
            "KEY",
            "HANDSHAKE",
            "RX",
            "TX",
            "MTU",
        ]);
        for peer in &self.peers {
            let cidrs: Vec<_> = peer.pod_cidrs.iter().map(IpNet::to_string).collect();
            table.add_row([
                peer.name.clone(),
                cidrs.join("\n"),
                peer.endpoint.map_or_else(|| "-".to_owned(), |e| e.to_string()),
                peer.transport.clone(),
                peer.device.clone(),
                peer.key_generation.to_string(),
                peer.handshake_age_seconds.map_or_else(|| "never".to_owned(), age),
                bytes(peer.rx_bytes),
                bytes(peer.tx_bytes),
                peer.mtu.to_string(),
            ]);
        }
        table
    }
}

/// Seconds since a time that is given in seconds since the Unix epoch.
fn seconds_since(time: u64) -> u64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |now| now.as_secs().saturating_sub(time))
}

fn age(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds}s ago"),
        120..7200 => format!("{}m ago", seconds / 60),
        7200..172_800 => format!("{}h ago", seconds / 3600),
        _ => format!("{}d ago", seconds / 86_400),
    }
}

#[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1024.0;
    let mut unit = UNITS[0];
    for larger in &UNITS[1..] {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = larger;
    }
    format!("{value:.1} {unit}")
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;

    use super::*;

    fn status() -> Status {
        Status {
            implementation: Some("userspace".into()),
            generation: Some(3),
            public_key: Some("k".repeat(44)),
            mtu: Some(1440),
            underlay: Some(UnderlayStatus {
                interface: "eth0".into(),
                mtu: 1500,
                endpoints: vec!["192.0.2.1".parse().unwrap()],
            }),
            peers: vec![PeerStatus {
                name: "node-2".into(),
                pod_cidrs: vec!["10.244.2.0/24".parse().unwrap()],
                endpoint: Some("192.0.2.2:51820".parse().unwrap()),
                transport: "wireguard-userspace".into(),
                device: "gambeson0".into(),
                key_generation: 0,
                handshake_age_seconds: Some(61),
                rx_bytes: 1_572_864,
                tx_bytes: 12,
                mtu: 1440,
            }],
            refused: vec![RefusedStatus {
                name: "node-3".into(),
                reason: "public-key: a low-order point".into(),
                kept: true,
            }],
            guard: GuardStatus { seen_whole: Some(0), ..GuardStatus::default() },
            ready: true,
            ..Status::starting("node-1")
        }
    }

    #[test]
    fn the_table_has_everything_a_person_asks_for() {
        let text = status().to_string();
        for part in [
            "node-1",
            "ready",
            "userspace",
            "generation 3",
            "eth0 (MTU 1500), 192.0.2.1",
            "d ago, 0 packets stopped going out",
            "node-2",
            "10.244.2.0/24",
            "192.0.2.2:51820",
            "61s ago",
            "1.5 MiB",
            "12 B",
            "node-3: public-key: a low-order point (its last good state stays in use)",
        ] {
            assert!(text.contains(part), "{part} is missing in\n{text}");
        }
    }

    #[test]
    fn waiting_and_errors_are_said() {
        let status = Status {
            waiting: Some("a pod CIDR".into()),
            errors: vec!["UDP port 51820 is taken".into()],
            warnings: vec!["a typing error".into()],
            ..Status::starting("node-1")
        };
        let text = status.to_string();
        assert!(text.contains("waiting: a pod CIDR"), "{text}");
        assert!(text.contains("not seen whole yet"), "{text}");
        assert!(text.contains("Errors:\n  UDP port 51820 is taken\n"), "{text}");
        assert!(text.contains("Warnings:\n  a typing error\n"), "{text}");
    }

    #[tokio::test]
    async fn the_socket_gives_one_document_and_outlives_a_crash() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run/agent.sock");
        let (_last, receiver) = watch::channel(status());
        let (questions, mut asked) = mpsc::channel::<oneshot::Sender<()>>(1);
        tokio::spawn(async move {
            while let Some(question) = asked.recv().await {
                let _ = question.send(());
            }
        });
        let source = Source::new(receiver, questions, Rounds::new(Duration::MAX));
        // Left behind by a process that was killed.
        drop(bind(&path).await.unwrap());
        let task = tokio::spawn(serve(bind(&path).await.unwrap(), source));
        let mut document = String::new();
        let mut stream = UnixStream::connect(&path).await.unwrap();
        stream.read_to_string(&mut document).await.unwrap();
        assert_eq!(serde_json::from_str::<Status>(&document).unwrap(), status());
        assert!(matches!(bind(&path).await, Err(SocketError::InUse(_))));
        task.abort();
    }
}
