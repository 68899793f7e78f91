//! Userspace devices: the WireGuard cross-platform UAPI
//! (<https://www.wireguard.com/xplatform/>) on the socket of their process.
//!
//! wireguard-control speaks it too, but waits for ever for a process that hangs, starts
//! another program when the socket is not there, and loses errno, which tells a taken port.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use gambeson_keys::PublicKey;
use gambeson_mesh::observed::{ObservedPeer, ObservedWireGuard};
use gambeson_mesh::session::DeviceName;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::process::socket;
use super::{Found, Update, age, invalid, preshared_key, public_key};

/// A device that takes longer for an answer hangs.
const ANSWER: Duration = Duration::from_secs(4);
/// Reads a device, or gives `None` when its process is gone or hangs.
pub(super) async fn read(device: DeviceName) -> Option<Found> {
    let answer = exchange(device, "get=1\n\n").await;
    match answer.and_then(|text| parse(&text, SystemTime::now())) {
        Ok(found) => Some(found),
        Err(error) => {
            tracing::debug!(%device, %error, "userspace device does not answer");
            None
        }
    }
}

pub(super) async fn write(device: DeviceName, update: &Update<'_>) -> io::Result<()> {
    let answer = exchange(device, &render(update)).await?;
    let errno = answer.lines().find_map(|line| line.strip_prefix("errno="));
    check(errno.ok_or_else(|| invalid("an answer without errno"))?)
}

async fn exchange(device: DeviceName, request: &str) -> io::Result<String> {
    timeout(ANSWER, async {
        let mut stream = UnixStream::connect(socket(device)).await?;
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        // An empty line ends the answer; the connection stays open for more requests.
        while !answer.ends_with(b"\n\n") {
            if stream.read_buf(&mut answer).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        String::from_utf8(answer).map_err(|_| invalid("an answer that is not text"))
    })
    .await?
}

pub(super) fn render(update: &Update<'_>) -> String {
    let mut text = "set=1\n".to_owned();
    let mut line = |key: &str, value: &dyn std::fmt::Display| {
        let _ = writeln!(text, "{key}={value}");
    };
    if let Some(key) = update.key {
        line("private_key", &Hex(key.as_bytes()));
    }
    if let Some(port) = update.listen_port {
        line("listen_port", &port);
    }
    if update.clear_fwmark {
        line("fwmark", &0);
    }
    for peer in &update.peers {
        line("public_key", &Hex(&peer.key));
        if peer.remove {
            line("remove", &true);
        }
        if let Some(endpoint) = peer.endpoint {
            line("endpoint", &endpoint);
        }
        if let Some(seconds) = peer.persistent_keepalive {
            line("persistent_keepalive_interval", &seconds);
        }
        if let Some(key) = &peer.preshared_key {
            line("preshared_key", &Hex(key));
        }
        for network in &peer.add_allowed_ips {
            line("allowed_ip", network);
        }
    }
    text.push('\n');
    text
}

struct Hex<'a>(&'a [u8; 32]);

impl std::fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Reads the answer to `get=1`. Keys that are not known here are left out, as the protocol
/// demands.
pub(super) fn parse(text: &str, now: SystemTime) -> io::Result<Found> {
    let mut state = ObservedWireGuard::default();
    let mut preshared_keys = BTreeMap::new();
    let mut peers: BTreeMap<PublicKey, (ObservedPeer, Duration)> = BTreeMap::new();
    let mut peer: Option<PublicKey> = None;
    let mut complete = false;
    for line in text.lines().filter(|line| !line.is_empty()) {
        let (key, value) = line.split_once('=').ok_or_else(|| invalid("a line without ="))?;
        match key {
            "private_key" => {
                let private = wireguard_control::Key::from_hex(value)
                    .map_err(|_| invalid("a key that is not hexadecimal"))?;
                state.public_key = public_key(private.get_public().as_bytes());
            }
            "listen_port" => state.listen_port = number(value)?,
            "fwmark" => state.fwmark = number(value)?,
            "public_key" => {
                let bytes = wireguard_control::Key::from_hex(value)
                    .map_err(|_| invalid("a key that is not hexadecimal"))?;
                peer = public_key(bytes.as_bytes());
                if let Some(key) = peer {
                    peers.entry(key).or_default();
                }
            }
            "preshared_key" => {
                let bytes = wireguard_control::Key::from_hex(value)
                    .map_err(|_| invalid("a key that is not hexadecimal"))?;
                preshared_keys.extend(peer.zip(preshared_key(&bytes.0)));
            }
            "errno" => {
                check(value)?;
                complete = true;
            }
            _ => {
                if let Some(entry) = peer.and_then(|key| peers.get_mut(&key)) {
                    peer_line(&mut entry.0, &mut entry.1, key, value)?;
                }
            }
        }
    }
    if !complete {
        return Err(invalid("an answer without errno"));
    }
    state.peers = peers
        .into_iter()
        .map(|(key, (mut peer, handshake))| {
            let time = SystemTime::UNIX_EPOCH.checked_add(handshake);
            peer.handshake_age = time.filter(|_| !handshake.is_zero()).map(|time| age(time, now));
            (key, peer)
        })
        .collect();
    Ok(Found { state, preshared_keys })
}

fn peer_line(
    peer: &mut ObservedPeer,
    handshake: &mut Duration,
    key: &str,
    value: &str,
) -> io::Result<()> {
    match key {
        "endpoint" => peer.endpoint = value.parse::<SocketAddr>().ok(),
        "persistent_keepalive_interval" => {
            peer.persistent_keepalive = Some(number(value)?).filter(|seconds| *seconds != 0);
        }
        "allowed_ip" => {
            let network: ipnet::IpNet = number(value)?;
            peer.allowed_ips.insert(network.trunc());
        }
        "rx_bytes" => peer.rx_bytes = number(value)?,
        "tx_bytes" => peer.tx_bytes = number(value)?,
        "last_handshake_time_sec" => *handshake += Duration::from_secs(number(value)?),
        "last_handshake_time_nsec" => *handshake += Duration::from_nanos(number(value)?),
        _ => {}
    }
    Ok(())
}

fn number<T: std::str::FromStr>(text: &str) -> io::Result<T> {
    text.parse().map_err(|_| invalid("a value that cannot be read"))
}

fn check(errno: &str) -> io::Result<()> {
    match number::<i32>(errno)? {
        0 => Ok(()),
        code => Err(io::Error::from_raw_os_error(code.saturating_abs())),
    }
}
