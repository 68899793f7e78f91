//! What must hold before anything is touched, with an error that says what to do.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use socket2::{Domain, Protocol, Socket, Type};

use super::AgentError;

/// `CAP_NET_ADMIN` (linux/capability.h).
const CAP_NET_ADMIN: u32 = 12;
const TUN: &str = "/dev/net/tun";
const FIPS: &str = "/proc/sys/crypto/fips_enabled";

/// Checks that this process may configure the network.
pub(super) fn net_admin() -> Result<(), AgentError> {
    let status = fs::read_to_string("/proc/self/status").map_err(AgentError::ReadCapabilities)?;
    match effective_capabilities(&status) {
        Some(set) if set & (1 << CAP_NET_ADMIN) == 0 => Err(AgentError::NoNetAdmin),
        _ => Ok(()),
    }
}

fn effective_capabilities(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

/// Checks that cryptography outside of the kernel may be used.
pub(super) fn userspace(allowed_in_fips: bool) -> Result<(), AgentError> {
    userspace_where(fs::read_to_string(FIPS).ok().as_deref(), allowed_in_fips)
}

fn userspace_where(fips_enabled: Option<&str>, allowed: bool) -> Result<(), AgentError> {
    let fips = fips_enabled.is_some_and(|value| value.trim() == "1");
    if fips && !allowed { Err(AgentError::Fips) } else { Ok(()) }
}

/// Checks that a TUN device can be made.
pub(super) fn tun() -> Result<(), AgentError> {
    match fs::OpenOptions::new().read(true).write(true).open(TUN) {
        Ok(_) => Ok(()),
        Err(source) => Err(AgentError::NoTun(source)),
    }
}

/// Checks that a UDP port that no device of ours has yet is free, in both families.
pub(super) fn udp_port(port: u16) -> Result<(), AgentError> {
    let any: [SocketAddr; 2] =
        [(Ipv4Addr::UNSPECIFIED, port).into(), (Ipv6Addr::UNSPECIFIED, port).into()];
    for address in any {
        match bind(address) {
            Err(source) if source.kind() == io::ErrorKind::AddrInUse => {
                return Err(AgentError::PortTaken { port, source });
            }
            // A family that is off cannot be in the way.
            Ok(()) | Err(_) => {}
        }
    }
    Ok(())
}

fn bind(address: SocketAddr) -> io::Result<()> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.bind(&address.into())
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    #[test]
    fn capabilities_are_read_as_the_kernel_prints_them() {
        let status = "Name:\tx\nCapPrm:\t0\nCapEff:\t000001ffffffffff\nCapBnd:\t0\n";
        assert_eq!(effective_capabilities(status), Some(0x1ff_ffff_ffff));
        assert_eq!(effective_capabilities("Name:\tx\n"), None);
    }

    #[test]
    fn userspace_on_a_fips_host_wants_to_be_allowed() {
        for other in [None, Some("0\n"), Some("")] {
            assert!(userspace_where(other, false).is_ok());
        }
        let error = userspace_where(Some("1\n"), false).unwrap_err().to_string();
        assert!(error.contains("FIPS") && error.contains("--allow-userspace-in-fips"), "{error}");
        assert!(userspace_where(Some("1\n"), true).is_ok());
    }

    #[test]
    fn a_taken_port_is_named() {
        let holder = UdpSocket::bind("127.0.0.1:0").unwrap();
        let port = holder.local_addr().unwrap().port();
        let error = udp_port(port).unwrap_err().to_string();
        assert!(error.contains(&port.to_string()), "{error}");
        drop(holder);
        udp_port(port).unwrap();
    }
}
