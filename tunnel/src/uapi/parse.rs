//! The text of a `set` request: line by line into a [`DeviceUpdate`]. Sans-I/O.
//!
//! The protocol is WireGuard's cross-platform userspace one; where its description is silent,
//! wireguard-go is followed.

use std::net::SocketAddr;
use std::net::SocketAddrV6;

use ipnet::IpNet;
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use zeroize::Zeroizing;

use crate::device::{AllowedIpChange, DeviceUpdate, PeerUpdate};

/// Collects the lines of one request.
#[derive(Default)]
pub(crate) struct Parser {
    update: DeviceUpdate,
}

impl Parser {
    /// Takes one line without its end.
    ///
    /// # Errors
    /// EPROTO if the line is not of the form `key=value`, EINVAL if it has no meaning.
    pub(crate) fn line(&mut self, line: &str) -> Result<(), Errno> {
        let (key, value) = line.split_once('=').ok_or(Errno::EPROTO)?;
        if key == "public_key" {
            self.update.peers.push(PeerUpdate::new(*parse_key(value)?));
            return Ok(());
        }
        match self.update.peers.last_mut() {
            Some(peer) => peer_line(peer, key, value),
            None => device_line(&mut self.update, key, value),
        }
    }

    /// The request, at its empty line.
    pub(crate) fn finish(self) -> DeviceUpdate {
        self.update
    }
}

fn device_line(update: &mut DeviceUpdate, key: &str, value: &str) -> Result<(), Errno> {
    match key {
        "private_key" => update.private_key = Some(parse_key(value)?),
        "listen_port" => update.listen_port = Some(parse_number(value)?),
        // As a number, or as `wg` takes it.
        "fwmark" => update.fwmark = Some(parse_fwmark(value)?),
        "replace_peers" => update.replace_peers = parse_true(value)?,
        "protocol_version" => parse_version(value)?,
        _ => return Err(Errno::EINVAL),
    }
    Ok(())
}

fn peer_line(peer: &mut PeerUpdate, key: &str, value: &str) -> Result<(), Errno> {
    match key {
        "remove" => peer.remove = parse_true(value)?,
        "update_only" => peer.update_only = parse_true(value)?,
        "preshared_key" => peer.preshared_key = Some(parse_key(value)?),
        "endpoint" => peer.endpoint = Some(parse_endpoint(value)?),
        "persistent_keepalive_interval" => peer.persistent_keepalive = Some(parse_number(value)?),
        "replace_allowed_ips" => {
            parse_true(value)?;
            peer.allowed_ips.push(AllowedIpChange::Clear);
        }
        "allowed_ip" => peer.allowed_ips.push(parse_allowed_ip(value)?),
        "protocol_version" => parse_version(value)?,
        _ => return Err(Errno::EINVAL),
    }
    Ok(())
}

/// 32 bytes in hexadecimal.
fn parse_key(value: &str) -> Result<Zeroizing<[u8; 32]>, Errno> {
    let mut key = Zeroizing::new([0; 32]);
    if value.len() != 64 {
        return Err(Errno::EINVAL);
    }
    for (byte, pair) in key.iter_mut().zip(value.as_bytes().chunks_exact(2)) {
        let digit = |c: u8| char::from(c).to_digit(16).ok_or(Errno::EINVAL);
        *byte = u8::try_from(digit(pair[0])? << 4 | digit(pair[1])?).map_err(|_| Errno::EINVAL)?;
    }
    Ok(key)
}

/// Digits only: no sign.
fn parse_number<N: std::str::FromStr>(value: &str) -> Result<N, Errno> {
    if !value.bytes().all(|c| c.is_ascii_digit()) {
        return Err(Errno::EINVAL);
    }
    value.parse().map_err(|_| Errno::EINVAL)
}

fn parse_fwmark(value: &str) -> Result<u32, Errno> {
    match value.strip_prefix("0x") {
        Some(hex) if hex.bytes().all(|c| c.is_ascii_hexdigit()) => {
            u32::from_str_radix(hex, 16).map_err(|_| Errno::EINVAL)
        }
        Some(_) => Err(Errno::EINVAL),
        None => parse_number(value),
    }
}

fn parse_true(value: &str) -> Result<bool, Errno> {
    if value == "true" { Ok(true) } else { Err(Errno::EINVAL) }
}

fn parse_version(value: &str) -> Result<(), Errno> {
    if value == "1" { Ok(()) } else { Err(Errno::EINVAL) }
}

/// `address:port` or `[address]:port`, with `%interface` for link-local ones.
fn parse_endpoint(value: &str) -> Result<SocketAddr, Errno> {
    let address = match value.parse() {
        Ok(address) => address,
        Err(_) => parse_scoped(value)?,
    };
    if address.port() == 0 || address.ip().is_unspecified() {
        return Err(Errno::EINVAL);
    }
    Ok(address)
}

/// A scope by interface name, which the standard library does not read.
fn parse_scoped(value: &str) -> Result<SocketAddr, Errno> {
    let (inner, port) =
        value.strip_prefix('[').and_then(|rest| rest.rsplit_once("]:")).ok_or(Errno::EINVAL)?;
    let (ip, interface) = inner.split_once('%').ok_or(Errno::EINVAL)?;
    let scope = if_nametoindex(interface).map_err(|_| Errno::EINVAL)?;
    let ip = ip.parse().map_err(|_| Errno::EINVAL)?;
    Ok(SocketAddrV6::new(ip, parse_number(port)?, 0, scope).into())
}

/// `address/length`; with `-` in front to remove it, or `+` to say that it is added.
fn parse_allowed_ip(value: &str) -> Result<AllowedIpChange, Errno> {
    let (remove, value) = match value.strip_prefix('-') {
        Some(value) => (true, value),
        None => (false, value.strip_prefix('+').unwrap_or(value)),
    };
    let prefix: IpNet = value.parse().map_err(|_| Errno::EINVAL)?;
    Ok(if remove { AllowedIpChange::Remove(prefix) } else { AllowedIpChange::Add(prefix) })
}
