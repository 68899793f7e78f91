//! The text of a `get` answer, written piece by piece: it holds keys, so no copy of it may
//! stay in freed memory.

use std::fmt::{self, Write as _};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::time::SystemTime;

use nix::net::if_::if_indextoname;
use zeroize::Zeroizing;

use crate::device::{Device, PeerStatus};

/// A piece is written out when it is this long, bytes; a line is much shorter than the rest
/// of the buffer, which thus never moves.
const PIECE: usize = 32 << 10;
const BUFFER: usize = PIECE + (4 << 10);

/// Writes the settings and counters of a device, without the `errno` line.
///
/// # Errors
/// That of the writer.
pub(crate) fn render(
    device: &Device,
    listen_port: u16,
    fwmark: u32,
    out: impl Write,
) -> io::Result<()> {
    let mut text = Text { out, buffer: Zeroizing::new(Vec::with_capacity(BUFFER)) };
    let private_key = device.private_key();
    if *private_key != [0; 32] {
        text.line("private_key", Hex(&private_key))?;
    }
    if listen_port != 0 {
        text.line("listen_port", listen_port)?;
    }
    if fwmark != 0 {
        text.line("fwmark", fwmark)?;
    }
    device.visit_peers(|peer| render_peer(&mut text, peer))?;
    text.flush()
}

fn render_peer<W: Write>(text: &mut Text<W>, peer: &PeerStatus) -> io::Result<()> {
    text.line("public_key", Hex(&peer.public_key))?;
    text.line("preshared_key", Hex(&peer.preshared_key))?;
    text.line("protocol_version", 1)?;
    if let Some(endpoint) = peer.endpoint {
        text.line("endpoint", Address(endpoint))?;
    }
    let handshake = peer
        .last_handshake
        .and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok())
        .unwrap_or_default();
    text.line("last_handshake_time_sec", handshake.as_secs())?;
    text.line("last_handshake_time_nsec", handshake.subsec_nanos())?;
    text.line("tx_bytes", peer.sent)?;
    text.line("rx_bytes", peer.received)?;
    text.line("persistent_keepalive_interval", peer.persistent_keepalive)?;
    for prefix in &peer.allowed_ips {
        text.line("allowed_ip", prefix)?;
    }
    Ok(())
}

struct Text<W> {
    out: W,
    buffer: Zeroizing<Vec<u8>>,
}

impl<W: Write> Text<W> {
    fn line(&mut self, key: &str, value: impl fmt::Display) -> io::Result<()> {
        writeln!(self.buffer, "{key}={value}")?;
        if self.buffer.len() < PIECE { Ok(()) } else { self.flush() }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.write_all(&self.buffer)?;
        self.buffer.clear();
        Ok(())
    }
}

struct Hex<'a>(&'a [u8; 32]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// With the interface's name as scope, as `getaddrinfo` takes it.
struct Address(SocketAddr);

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            SocketAddr::V6(v6) if v6.scope_id() != 0 => {
                f.write_char('[')?;
                write!(f, "{}%", v6.ip())?;
                match if_indextoname(v6.scope_id()) {
                    Ok(name) => f.write_str(&name.to_string_lossy())?,
                    Err(_) => write!(f, "{}", v6.scope_id())?,
                }
                write!(f, "]:{}", v6.port())
            }
            address => write!(f, "{address}"),
        }
    }
}
